"""Which ranks are still there: a dead or hanging rank ends the job with its name, whatever the others wait in.

A collective that one rank does not join blocks the others in C++, where no exception reaches them. So each rank has a
thread beside its work that writes a beat into the job's store once a second, and

* reads the next rank's: one that stands still means that its process is gone or stopped;
* looks at how long its own work has been at one mark (`mark`): past the mark's limit, the rank with the fewest marks
  is the one that all the others wait for.

The first to find out writes it into the store. Then every rank's work has a few seconds to end by itself
(`explain` turns what its collective said into that one line), and a rank that cannot is ended by its thread.
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
"""Limit of marks at which kernels are compiled, connections made or whole files written."""
_BEAT_S = 1.0
_POLL_S = 0.02
_GRACE_S = 5.0
_EXIT_CODE = 1
_LOST = "lost"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    count: int
    """Goes up with every beat."""
    marks: int
    """Marks its work has passed: equal on all ranks that wait for each other."""
    doing: str
    host: str
    left: str = ""
    """Why it left, if it did."""


class Presence:
    """One rank's part, a context manager around all of its work.

    Args:
        store: the job's key-value store; the thread takes a connection of its own.
        rank, size: of this process.
        limit_s: seconds after which a training step that does not move is an error; a rank without a beat is one
            after half of it.
        on_loss: called in the thread before it ends the process, with what happened.
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
        self._found = threading.Event()
        self._work_ends = threading.Event()
        self._watched: tuple[int, float] = (-1, time.monotonic())
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    @property
    def lost(self) -> str | None:
        """What happened to a rank, in one line; None: nothing yet."""
        return self._lost

    def mark(self, doing: str, limit_s: float | None = None) -> None:
        """Say what this rank does next, in the same order on every rank; `limit_s` None: a training step's limit."""
        self._marked = (self._marked[0] + 1, doing, self._limit_s if limit_s is None else limit_s, time.monotonic())

    def raise_if_lost(self) -> None:
        """Raise `Stopped` where a rank is gone: for waiting in a loop."""
        if self._lost is not None:
            self._work_ends.set()
            raise LostRank(f"error: {self._lost}", _EXIT_CODE)

    def explain(self, error: BaseException) -> Stopped | None:
        """What a failed collective means: waits until it is known which rank is gone; None: all are there."""
        if not _is_of_collective(error):
            return None
        self._work_ends.set()
        self._found.wait(self._limit_s / 2 + 2 * _BEAT_S + _GRACE_S)
        if self._lost is not None:
            return LostRank(f"error: {self._lost}", _EXIT_CODE)
        return None

    def __enter__(self) -> Presence:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work_ends.set()
        self._ends.set()
        self._thread.join(_GRACE_S)

    def leave(self, why: str) -> None:
        """Tell the others why this rank goes, which may be without them."""
        self._work_ends.set()
        self._left = why
        until = time.monotonic() + 3 * _BEAT_S
        with contextlib.suppress(RuntimeError):  # rank 0 has gone first and taken the store with it
            self._write()
            gone = self._store.add("left", 1)
            # Rank 0 holds the store: it lets the others read.
            while self._rank == 0 and gone < self._size and time.monotonic() < until:
                time.sleep(_POLL_S)
                gone = self._store.add("left", 0)

    def _run(self) -> None:
        while not self._ends.wait(_BEAT_S):
            why = self._look()
            if why is None:
                continue
            self._lost = why
            self._found.set()
            if not self._ends.wait(_GRACE_S) and not self._work_ends.is_set():
                if self._on_loss is not None:
                    self._on_loss(why)
                say(f"error: {why}", of_another=True)
                os._exit(_EXIT_CODE)  # the work hangs in C++: nothing else ends it
            return

    def _look(self) -> str | None:
        """Write a beat and read what concerns this rank; returns what happened to another."""
        try:
            self._write()
            if self._store.check([_LOST]):
                return self._store.get(_LOST).decode()
            why = self._neighbour() or self._stragglers()
            return self._store.compare_set(_LOST, "", why).decode() if why else None
        except RuntimeError:  # torch's DistNetworkError among them
            return None if self._ends.is_set() else "rank 0 died: its key-value store does not answer"

    def _write(self) -> None:
        self._num_beats += 1
        beat = Beat(self._num_beats, self._marked[0], self._marked[1], socket.gethostname(), self._left)
        self._store.set(f"beat/{self._rank}", json.dumps(vars(beat)))

    def _read(self, rank: int) -> Beat | None:
        key = f"beat/{rank}"
        return Beat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _neighbour(self) -> str | None:
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
            silent = f"no sign of life for {now - since:.0f} s"
            return f"rank {rank} ({beat.host}) died or hangs: {silent}, last seen {beat.doing}"
        return None

    def _stragglers(self) -> str | None:
        marks, doing, limit_s, since = self._marked
        lasts = time.monotonic() - since
        if lasts <= limit_s:
            return None
        beats = {rank: beat for rank in range(self._size) if (beat := self._read(rank)) is not None}
        fewest = min(beat.marks for beat in beats.values())
        behind = {rank: beat for rank, beat in beats.items() if beat.marks == fewest}
        if fewest >= marks and len(behind) > 1:
            return f"all ranks hang for {lasts:.0f} s, {doing}: raise training.collective_timeout_s if it is only slow"
        named = ", ".join(f"rank {rank} ({beat.host})" for rank, beat in list(behind.items())[:4])
        one = next(iter(behind.values()))
        return (
            f"{named} died or hangs: the others wait for {lasts:.0f} s while it is {one.doing} "
            "(training.collective_timeout_s)"
        )


def _is_of_collective(error: BaseException) -> bool:
    """Whether torch's communication said this."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "Timed out")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


_current: list[Presence] = []


def begin(presence: Presence | None) -> None:
    """Make it the one that `mark` and `current` mean; None: there is none."""
    _current[:] = [] if presence is None else [presence]


def current() -> Presence | None:
    """This process's; None where it is alone."""
    return _current[0] if _current else None


def mark(doing: str, limit_s: float | None = None) -> None:
    """`Presence.mark` where there is more than one rank."""
    if _current:
        _current[0].mark(doing, limit_s)


def raise_if_lost() -> None:
    """`Presence.raise_if_lost` where there is more than one rank."""
    if _current:
        _current[0].raise_if_lost()


def wait_for(store: dist.Store, key: str) -> None:
    """Wait until `key` is in the store, for as long as all ranks are there.

    Raises:
        Stopped: one is not.
    """
    while not store.check([key]):
        raise_if_lost()
        time.sleep(_POLL_S)
