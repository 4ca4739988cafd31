"""Stopping a run between two optimizer steps: signals, a time limit, or a file named STOP in the run folder.

    USR2, TERM      a scheduler's warning        state "preempted",    exit code 85: the same command resumes the run
    --max-time      the time limit is reached    state "preempted",    exit code 85
    INT             Ctrl-C                       state "interrupted",  exit code 130
    STOP            a person ends the run        state "stopped",      exit code 1: dependent jobs do not start

A signal handler only sets a flag. The ranks compare their flags (`PreemptionHandler.agree`) at every step boundary and
between validation batches, so all ranks stop at the same step, whichever of them received the signal.
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
"""Reasons to stop a run, in ascending priority. The ranks compare the index of a reason in this tuple."""
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_RANKS = 2**32


@dataclass(frozen=True)
class Stop:
    """The reason why the ranks stop, equal on all ranks."""

    reason: str
    rank: int
    """The rank with that reason; the highest if several have it."""

    @property
    def state(self) -> str:
        """The run's state in state.json."""
        return {"SIGINT": "interrupted", STOP_FILE: "stopped"}.get(self.reason, "preempted")

    @property
    def exit_code(self) -> int:
        """The exit code of the process."""
        return {"interrupted": 130, "stopped": 1, "preempted": 85}[self.state]

    @property
    def advice(self) -> str:
        """Advice on resuming the run."""
        if self.reason == STOP_FILE:
            return f"remove the file {STOP_FILE} and run the same command again to resume"
        return "run the same command again to resume"


class PreemptionHandler:
    """The reasons to stop on this rank; a context manager that handles signals within its block.

    Args:
        rank: this process's rank.
        deadline: `time.monotonic()` by which the process must have ended; None: no limit.
        highest: returns the maximum of a number over all ranks; every rank calls it. The default is for one process.
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
        """True if this rank has a reason to stop; for long work of a single rank, which cannot call `agree`."""
        return bool(self._signal) or self._is_late()

    def record_durations(self, *, step_s: float = 0.0, save_s: float = 0.0) -> None:
        """Record the duration of a step or a save: the deadline leaves time for the longest of each."""
        self._longest_step_s = max(self._longest_step_s, step_s)
        self._longest_save_s = max(self._longest_save_s, save_s)

    def agree(self, run_dir: Path) -> Stop | None:
        """Return the reason to stop now, or None. Every rank must call this, and all get the same result.

        Args:
            run_dir: folder in which rank 0 looks for the file STOP.
        """
        reason = max(self._signal, 1 if self._is_late() else 0)
        if self._rank == 0 and (run_dir / STOP_FILE).exists():
            reason = _REASONS.index(STOP_FILE)
        agreed = self._highest(reason * _RANKS + self._rank)
        reason, rank = divmod(agreed, _RANKS)
        return Stop(_REASONS[reason], rank) if reason else None

    def __enter__(self) -> PreemptionHandler:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only here
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._signal = max(self._signal, _REASONS.index(signal.Signals(number).name))

    def _is_late(self) -> bool:
        if self._deadline is None:
            return False
        return time.monotonic() + self._longest_step_s + self._longest_save_s > self._deadline


def refuse_stop_file(run_dir: Path) -> None:
    """Refuse to start a run that a person has stopped.

    Raises:
        UserError: the run folder holds a file STOP.
    """
    if (run_dir / STOP_FILE).exists():
        raise UserError(f"{run_dir / STOP_FILE} stops this run: remove the file to resume")


def parse_duration(text: str) -> float:
    """Return the seconds of a time limit, which is in sbatch's format or has a unit.

    `M`, `M:SS`, `H:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`; or `90s`, `45m`, `12h`, `2d`.

    Raises:
        UserError: the text has none of these forms, or the limit is zero.
    """
    seconds = _with_unit(text) if text[-1:].isalpha() else _as_sbatch(text)
    if not seconds:
        raise UserError(f"'{text}' is not a time limit: write H:MM:SS, D-HH:MM:SS, minutes, or 90s, 45m, 12h, 2d")
    return seconds


def _with_unit(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else 0.0


def _as_sbatch(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)-)?(\d+(?::\d+){0,2})", text)
    if not match:
        return 0.0
    parts = [int(part) for part in match[2].split(":")]
    if match[1] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return float(int(match[1]) * 86400 + hours * 3600 + minutes * 60 + seconds)
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return float(hours * 3600 + minutes * 60 + seconds)
