"""The status of each loader worker, in memory shared with the trainer, and the cost of each batch.

A worker writes one slot of a shared board: the clip that it reads or decodes, and since when. Slots have no lock that a
killed worker could hold. A torn read could only garble a message, and a worker that stalls or dies no longer writes.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import RawArray

from karmma_dist.shards.format import Clip

_SLOT = struct.Struct("=qqd16s16s64s128s600s")


@dataclass
class LoadStats:
    """The cost of making a batch. Damaged members are not counted."""

    load_s: float = 0.0
    """Seconds from the batch's first read to its collation, in its worker."""
    read_s: float = 0.0
    """Seconds spent reading members, checksums included."""
    bytes_read: int = 0
    """Bytes of the members read."""
    members_read: int = 0
    """Number of members read, metadata of clips included."""
    decode_s: dict[str, float] = field(default_factory=dict)
    """Seconds of decoding, by modality."""
    clips_decoded: dict[str, int] = field(default_factory=dict)
    """Number of decoded clips, by modality."""
    queue_depth: int = 0
    """Number of finished batches in the queue when this one was requested."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """The content of one worker's slot."""

    pid: int
    """Process id; 0 if the worker has not started."""
    num_made: int
    """Number of batches made."""
    since: float
    """Start of the current stage, `time.monotonic()` (the same clock in all processes of a machine)."""
    stage: str
    modality: str
    shard: str
    key: str
    error: str = ""
    """Error that ended the worker, in one line; empty while it works."""

    def __str__(self) -> str:
        """Return a phrase such as "decoding audio of clip P01_01_3 (train-000000.tar)"."""
        stage = f"{self.stage} {self.modality} of" if self.modality else f"{self.stage},"
        return f"{stage} clip {self.key} ({self.shard})" if self.key else self.stage


class StatusBoard:
    """The slots of `num_slots` workers in shared memory; processes started by this one see the same slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._memory = RawArray("c", num_slots * _SLOT.size)

    def write(self, slot: int, status: WorkerStatus) -> None:
        """Replace the status in a slot; each slot has one writer."""
        texts = (status.stage, status.modality, status.shard, status.key, status.error)
        encoded = [text.encode(errors="replace") for text in texts]
        _SLOT.pack_into(self._memory, slot * _SLOT.size, status.pid, status.num_made, status.since, *encoded)

    def read(self, slot: int) -> WorkerStatus:
        """Return the status that a worker wrote last."""
        pid, num_made, since, *texts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        stage, modality, shard, key, error = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        return WorkerStatus(pid, num_made, since, stage or "starting", modality, shard, key, error)

    def fail(self, slot: int, pid: int, error: str) -> None:
        """Write the error that ends a worker, beside its last stage."""
        self.write(slot, replace(self.read(slot), pid=pid, error=error))

    def num_made(self) -> int:
        """Return the number of batches that all workers have made."""
        return sum(self.read(slot).num_made for slot in range(self.num_slots))


class Activity:
    """The record of one maker of batches: it writes the current stage to the board and sums up the cost.

    Args:
        board: Board for the status; None for no board.
        slot: Number of the worker.
        pid: Process id of the worker.
    """

    def __init__(self, board: StatusBoard | None = None, slot: int = 0, pid: int = 0) -> None:
        self._board, self._slot, self._pid = board, slot, pid
        self._num_made = 0
        self._stats = LoadStats()
        self.status = WorkerStatus(pid, 0, time.monotonic(), "starting", "", "", "")

    def start(self, stage: str, clip: Clip | None = None, modality: str = "") -> None:
        """Write the start of a stage to the board."""
        shard, key = ("", "") if clip is None else (clip.shard, clip.key)
        self.status = WorkerStatus(self._pid, self._num_made, time.monotonic(), stage, modality, shard, key)
        if self._board is not None:
            self._board.write(self._slot, self.status)

    @contextmanager
    def reading(self, clip: Clip, modality: str) -> Iterator[None]:
        """Record the reading of one member ("json" for the metadata) inside the block."""
        self.start("reading", clip, modality)
        began = time.perf_counter()
        yield
        member = clip.members[modality]
        self._stats.read_s += time.perf_counter() - began
        self._stats.bytes_read += 0 if member is None else member.size
        self._stats.members_read += 1

    @contextmanager
    def decoding(self, clip: Clip, modality: str) -> Iterator[None]:
        """Record the decoding of one member inside the block."""
        self.start("decoding", clip, modality)
        began = time.perf_counter()
        yield
        seconds, clips = self._stats.decode_s, self._stats.clips_decoded
        seconds[modality] = seconds.get(modality, 0.0) + time.perf_counter() - began
        clips[modality] = clips.get(modality, 0) + 1

    def begin_batch(self) -> None:
        """Reset the cost for a new batch."""
        self._stats = LoadStats()
        self._began = time.perf_counter()

    def end_batch(self) -> LoadStats:
        """Return the cost of the finished batch; until the next one the worker only hands it over."""
        self._num_made += 1
        self.start("handing over")
        self._stats.load_s = time.perf_counter() - self._began
        return self._stats
