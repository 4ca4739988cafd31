"""The heartbeat of each rank: it ends the job with the name of a dead or hanging rank.

A collective that one rank does not join blocks the others in C++, where no exception reaches them. So each rank runs a
background thread that writes a beat into the job's store once a second, and

* reads the next rank's beat: if it does not change, that rank's process has ended or stopped;
* checks how long its own work has been at one mark (`mark`): beyond the mark's limit, all ranks wait for the rank with
  the fewest marks.

The first rank to find a lost rank writes its name into the store. Then each rank's work has a few seconds to end by
itself (`explain` turns the error of its collective into one line that names the lost rank); after that, its thread ends
the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch.distributed as dist

from karmma_dist.errors import LostRank, Stopped, say

START_S = 600.0
"""Limit in seconds of marks at which kernels are compiled, connections opened or large files written."""
_BEAT_S = 1.0
_POLL_S = 0.02
_GRACE_S = 5.0
_EXIT_CODE = 1
_LOST = "lost"


@dataclass(frozen=True)
class Beat:
    """The state that a rank publishes once a second."""

    count: int
    """Number of this beat; it grows with every beat."""
    marks: int
    """Number of marks that the rank's work has passed, equal on all ranks that wait for each other."""
    doing: str
    """Name of the last mark."""
    host: str
    left: str = ""
    """Reason why the rank left the job; empty while it takes part."""


_NO_BEAT = Beat(0, -1, "starting", "no beat yet")
"""The state of a rank that has published nothing."""


class Heartbeat:
    """The heartbeat of one rank, a context manager around all of its work.

    Args:
        store: Key-value store of the job; the thread opens its own connection.
        rank, size: Rank of this process and world size.
        limit_s: Seconds after which a training step without progress is an error; a missing beat is an error after
            half of this time.
        on_loss: Called in the thread, with the message, before the thread ends the process.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, limit_s: float, on_loss: Callable[[str], None] | None = None
    ) -> None:
        self._store = store.clone()
        self._rank, self._size, self._limit_s, self._on_loss = rank, size, limit_s, on_loss
        self._marked = (0, "starting", START_S, time.monotonic())
        self._left = ""
        self._num_beats = 0
        self._ends = threading.Event()
        self._lost: str | None = None
        self._is_lost = threading.Event()
        self._work_ends = threading.Event()
        self._watched: tuple[int, float] = (-1, time.monotonic())
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def lost(self) -> str | None:
        """The loss of a rank, in one line; None if no rank is lost."""
        return self._lost

    def mark(self, doing: str, limit_s: float | None = None) -> None:
        """Record what this rank does next; every rank must pass the same marks in the same order.

        Args:
            doing: Words that complete "the rank is ...", such as "waiting for a batch".
            limit_s: Seconds that it may take; None: the limit of a training step.
        """
        self._marked = (self._marked[0] + 1, doing, self._limit_s if limit_s is None else limit_s, time.monotonic())

    def raise_if_lost(self) -> None:
        """Check, in a loop that waits, that no rank is lost.

        Raises:
            LostRank: a rank died, hangs or left the job.
        """
        if self._lost is not None:
            self._work_ends.set()
            raise LostRank(f"error: {self._lost}", _EXIT_CODE)

    def explain(self, error: BaseException) -> Stopped | None:
        """Return the lost rank that made a collective fail, waiting until it is known.

        Returns:
            The exception that names it; None if `error` is not a collective's or no rank is lost.
        """
        if not is_collective_error(error):
            return None
        self._work_ends.set()
        self._is_lost.wait(self._limit_s / 2 + 2 * _BEAT_S + _GRACE_S)
        if self._lost is not None:
            return LostRank(f"error: {self._lost}", _EXIT_CODE)
        return None

    def __enter__(self) -> Heartbeat:
        with contextlib.suppress(RuntimeError):  # the thread finds out whether rank 0 and its store are gone
            self._write()  # a rank that dies within its first second is known to the others, too
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work_ends.set()
        self._ends.set()
        self._thread.join(_GRACE_S)

    def leave(self, reason: str) -> None:
        """Tell the other ranks why this rank leaves the job, without waiting at the last barrier."""
        self._work_ends.set()
        self._left = reason
        until = time.monotonic() + 3 * _BEAT_S
        with contextlib.suppress(RuntimeError):  # rank 0 has ended first, and the store with it
            self._write()
            num_left = self._store.add("left", 1)
            # Rank 0 holds the store: it stays until the others have read the reason.
            while self._rank == 0 and num_left < self._size and time.monotonic() < until:
                time.sleep(_POLL_S)
                num_left = self._store.add("left", 0)

    def _run(self) -> None:
        while not self._ends.wait(_BEAT_S):
            loss = self._beat()
            if loss is None:
                continue
            self._lost = loss
            self._is_lost.set()
            if not self._ends.wait(_GRACE_S) and not self._work_ends.is_set():
                if self._on_loss is not None:
                    self._on_loss(loss)
                say(f"error: {loss}", of_another=True)
                os._exit(_EXIT_CODE)  # the work hangs in C++: nothing else ends it
            return

    def _beat(self) -> str | None:
        """Write a beat, read the beats of others, and return the message of a rank's loss; None if no rank is lost."""
        try:
            self._write()
            if self._store.check([_LOST]):
                return self._store.get(_LOST).decode()
            loss = self._neighbour_loss() or self._straggler_loss()
            return self._store.compare_set(_LOST, "", loss).decode() if loss else None
        except RuntimeError:  # includes torch's DistNetworkError
            return None if self._ends.is_set() else "rank 0 died: its key-value store does not answer"

    def _write(self) -> None:
        self._num_beats += 1
        beat = Beat(self._num_beats, self._marked[0], self._marked[1], socket.gethostname(), self._left)
        self._store.set(f"beat/{self._rank}", json.dumps(vars(beat)))

    def _read(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _neighbour_loss(self) -> str | None:
        rank = (self._rank + 1) % self._size
        beat, now = self._read(rank), time.monotonic()
        if beat is None:
            return None
        if beat.left:
            return f"rank {rank} ({beat.host}) stopped: {beat.left}"
        count, since = self._watched
        if beat.count != count:
            self._watched = (beat.count, now)
        elif now - since > self._limit_s / 2:
            silence = f"no sign of life for {now - since:.0f} s"
            return f"rank {rank} ({beat.host}) died or hangs: {silence}, last seen {beat.doing}"
        return None

    def _straggler_loss(self) -> str | None:
        marks, doing, limit_s, since = self._marked
        waited_s = time.monotonic() - since
        if waited_s <= limit_s:
            return None
        beats = {rank: self._read(rank) or _NO_BEAT for rank in range(self._size)}
        fewest = min(beat.marks for beat in beats.values())
        behind = {rank: beat for rank, beat in beats.items() if beat.marks == fewest}
        if fewest >= marks and len(behind) > 1:
            return (
                f"all ranks have hung for {waited_s:.0f} s, {doing}: if this step is only slow, raise "
                "training.collective_timeout_s"
            )
        ranks = ", ".join(f"rank {rank} ({beat.host})" for rank, beat in list(behind.items())[:4])
        slowest = next(iter(behind.values()))
        return (
            f"{ranks} died or hangs: the others have waited {waited_s:.0f} s while it is {slowest.doing} "
            "(training.collective_timeout_s)"
        )


def is_collective_error(error: BaseException) -> bool:
    """Return True if torch's communication raised the error."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


_current: list[Heartbeat] = []


def set_current(heartbeat: Heartbeat | None) -> None:
    """Set the heartbeat that this module's functions use; None: this process is alone."""
    _current[:] = [] if heartbeat is None else [heartbeat]


def mark(doing: str, limit_s: float | None = None) -> None:
    """Call `Heartbeat.mark` if the job has more than one rank."""
    if _current:
        _current[0].mark(doing, limit_s)


def raise_if_lost() -> None:
    """Call `Heartbeat.raise_if_lost` if the job has more than one rank."""
    if _current:
        _current[0].raise_if_lost()


def wait_for(store: dist.Store, key: str) -> None:
    """Wait until `key` is in the store, as long as all ranks are alive.

    Raises:
        Stopped: a rank died, hangs or left the job.
    """
    while not store.check([key]):
        raise_if_lost()
        time.sleep(_POLL_S)
