"""Stopping a run between two optimizer steps: signals, a time limit, or a file named STOP in the run folder.

    USR2, TERM      a scheduler's warning        state "preempted",    exit code 85: start it again, it goes on
    --max-time      the time given is used up    state "preempted",    exit code 85
    INT             Ctrl-C                       state "interrupted",  exit code 130
    STOP            a person wants it to end     state "stopped",      exit code 1: jobs that wait for this one stay out

A handler only sets a flag. The ranks look at it together (`Interruption.agree`) at every step boundary and between
validation batches, so all of them stop at the same step whichever of them was told.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from karmma_dist.errors import UserError

STOP_FILE = "STOP"

_REASONS = ("", "time limit", "SIGUSR2", "SIGTERM", "SIGINT", STOP_FILE)
"""What can stop a run, the stronger later. A reason's place here is what the ranks compare."""
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_RANKS = 2**32


@dataclass(frozen=True)
class Stop:
    """Why the ranks stop, equal on all of them."""

    reason: str
    rank: int
    """The rank that was told; of several, the highest."""

    @property
    def state(self) -> str:
        """What state.json says."""
        return {"SIGINT": "interrupted", STOP_FILE: "stopped"}.get(self.reason, "preempted")

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return {"interrupted": 130, "stopped": 1, "preempted": 85}[self.state]

    @property
    def advice(self) -> str:
        """What to do to go on."""
        if self.reason == STOP_FILE:
            return f"remove the file {STOP_FILE} and run the same command again to go on"
        return "run the same command again to go on"


class Interruption:
    """Listens for reasons to stop; a context manager that handles the signals for the length of the block.

    Args:
        rank: this process's.
        deadline: `time.monotonic()` by which the process should have ended; None: no limit.
        highest: the highest of a number over all ranks; every rank calls it. The default is for a process alone.
    """

    def __init__(
        self, rank: int = 0, deadline: float | None = None, highest: Callable[[int], int] = lambda number: number
    ) -> None:
        self._rank, self._deadline, self._highest = rank, deadline, highest
        self._signal = 0
        self._longest_step_s = self._longest_save_s = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether this rank was told to stop: for long work of one rank, which no other can join in deciding."""
        return bool(self._signal) or self._is_late()

    def took(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Note how long a step or a save took: the time limit leaves room for the longest of each."""
        self._longest_step_s = max(self._longest_step_s, step_s)
        self._longest_save_s = max(self._longest_save_s, save_s)

    def agree(self, run_dir: Path) -> Stop | None:
        """Whether to stop here. Every rank must call this, and gets the same answer.

        Args:
            run_dir: where rank 0 looks for the file STOP.
        """
        reason = max(self._signal, 1 if self._is_late() else 0)
        if self._rank == 0 and (run_dir / STOP_FILE).exists():
            reason = _REASONS.index(STOP_FILE)
        agreed = self._highest(reason * _RANKS + self._rank)
        reason, rank = divmod(agreed, _RANKS)
        return Stop(_REASONS[reason], rank) if reason else None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._told)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _told(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signal = max(self._signal, _REASONS.index(signal.Signals(number).name))

    def _is_late(self) -> bool:
        if self._deadline is None:
            return False
        return time.monotonic() + self._longest_step_s + self._longest_save_s > self._deadline


def refuse_stop_file(run_dir: Path) -> None:
    """Raise where a person has stopped the run.

    Raises:
        UserError: the run folder holds a file STOP.
    """
    if (run_dir / STOP_FILE).exists():
        raise UserError(f"{run_dir / STOP_FILE} stops this run: remove it to go on")


def parse_duration(text: str) -> float:
    """Seconds of a time limit as sbatch writes it, or with a unit.

    `M`, `M:SS`, `H:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`; or `90s`, `45m`, `12h`, `2d`.

    Raises:
        UserError: it is none of these, or no time at all.
    """
    seconds = _with_unit(text) if text[-1:].isalpha() else _as_sbatch(text)
    if not seconds:
        raise UserError(f"'{text}' is no time limit: write H:MM:SS, D-HH:MM:SS, minutes, or 90s, 45m, 12h, 2d")
    return seconds


def _with_unit(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0


def _as_sbatch(text: str) -> float:
    found = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text)
    if not found:
        return 0.0
    parts = [int(part) for part in found[2].split(":")]
    if found[1] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return float(int(found[1]) * 86400 + hours * 3600 + minutes * 60 + seconds)
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return float(hours * 3600 + minutes * 60 + seconds)
