"""What each loader worker is doing, in memory that the trainer can read, and what each batch cost to make.

A worker writes one slot of a shared board: which clip it reads or decodes, and since when. There is no lock, so a
worker that is killed holds none; a torn read could only garble a message, and a worker that stalls or dies writes no
more.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray

from karmma_dist.shards.format import Clip

_SLOT = struct.Struct("=qqd16s16s64s128s")


@dataclass
class LoadStats:
    """What it cost to make a batch. Members that turned out damaged are not counted."""

    load_s: float = 0.0
    """Seconds from the batch's first read to its collation, in its worker."""
    read_s: float = 0.0
    """Seconds of them spent reading members, checksums included."""
    bytes_read: int = 0
    """Bytes of the members read."""
    members_read: int = 0
    """Members read, the clips' metadata among them."""
    decode_s: dict[str, float] = field(default_factory=dict)
    """Seconds of decoding per modality."""
    clips_decoded: dict[str, int] = field(default_factory=dict)
    """Clips decoded per modality."""
    queue_depth: int = 0
    """Batches that were made and not yet taken when this one was asked for."""


@dataclass(frozen=True, slots=True)
class Doing:
    """One worker's slot."""

    pid: int
    """0: it has not started."""
    num_made: int
    """Batches it has made."""
    since: float
    """When it began with this, `time.monotonic()` (the same clock in all processes of a machine)."""
    stage: str
    modality: str
    shard: str
    key: str

    def __str__(self) -> str:
        """For example "decoding audio of clip P01_01_3 (train-000000.tar)"."""
        what = f"{self.stage} {self.modality} of" if self.modality else f"{self.stage},"
        return f"{what} clip {self.key} ({self.shard})" if self.key else self.stage


class Board:
    """Slots of `num_slots` workers in shared memory; processes started by this one see the same slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._memory = RawArray("c", num_slots * _SLOT.size)

    def write(self, slot: int, doing: Doing) -> None:
        """Replace a slot; each has one writer."""
        texts = (text.encode() for text in (doing.stage, doing.modality, doing.shard, doing.key))
        _SLOT.pack_into(self._memory, slot * _SLOT.size, doing.pid, doing.num_made, doing.since, *texts)

    def read(self, slot: int) -> Doing:
        """What a worker wrote last."""
        pid, num_made, since, *texts = _SLOT.unpack_from(self._memory, slot * _SLOT.size)
        stage, modality, shard, key = (text.rstrip(b"\0").decode(errors="replace") for text in texts)
        return Doing(pid, num_made, since, stage or "starting", modality, shard, key)

    def num_made(self) -> int:
        """Batches all workers have made."""
        return sum(self.read(slot).num_made for slot in range(self.num_slots))


class Activity:
    """Kept by whoever makes batches: says on the board what it is at, and adds up what it costs.

    Args:
        board: where to say it; None: nowhere.
        slot: the worker's number.
        pid: the worker's process.
    """

    def __init__(self, board: Board | None = None, slot: int = 0, pid: int = 0) -> None:
        self._board, self._slot, self._pid = board, slot, pid
        self._num_made = 0
        self._stats = LoadStats()
        self.doing = Doing(pid, 0, time.monotonic(), "starting", "", "", "")

    def say(self, stage: str, clip: Clip | None = None, modality: str = "") -> None:
        """Begin with something."""
        shard, key = ("", "") if clip is None else (clip.shard, clip.key)
        self.doing = Doing(self._pid, self._num_made, time.monotonic(), stage, modality, shard, key)
        if self._board is not None:
            self._board.write(self._slot, self.doing)

    @contextmanager
    def reading(self, clip: Clip, modality: str) -> Iterator[None]:
        """Around the reading of one member ("json" for the metadata)."""
        self.say("reading", clip, modality)
        began = time.perf_counter()
        yield
        member = clip.members[modality]
        self._stats.read_s += time.perf_counter() - began
        self._stats.bytes_read += 0 if member is None else member.size
        self._stats.members_read += 1

    @contextmanager
    def decoding(self, clip: Clip, modality: str) -> Iterator[None]:
        """Around the decoding of one member."""
        self.say("decoding", clip, modality)
        began = time.perf_counter()
        yield
        seconds, clips = self._stats.decode_s, self._stats.clips_decoded
        seconds[modality] = seconds.get(modality, 0.0) + time.perf_counter() - began
        clips[modality] = clips.get(modality, 0) + 1

    def begin_batch(self) -> None:
        """Start counting anew."""
        self._stats = LoadStats()
        self._began = time.perf_counter()

    def end_batch(self) -> LoadStats:
        """What the batch has cost; from here on the worker waits to be asked for another."""
        self._num_made += 1
        self.say("handing over")
        self._stats.load_s = time.perf_counter() - self._began
        return self._stats
