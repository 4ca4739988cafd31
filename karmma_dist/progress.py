"""The progress of long work: a bar on a terminal, a plain line from time to time on a pipe or in a job's log."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from karmma_dist.terminal import console, harmless, is_terminal, print_line

_LINE_EVERY_S = 10.0


class Report(Protocol):
    """A progress callback: `report("packing", 3, 12)`, with an optional `note`."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` units of `stage` are finished."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Ignore the progress, for tests and for ranks other than 0."""


class Progress:
    """A `Report` on stderr, used as a context manager.

    On a terminal each stage has a bar; elsewhere a stage prints its first and last unit and one line every ten seconds.
    """

    def __init__(self) -> None:
        self._bars = None
        self._tasks: dict[str, object] = {}
        self._started: dict[str, float] = {}
        self._printed: dict[str, float] = {}
        if is_terminal(err=True):
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False), console=console(err=True),
            )

    def __enter__(self) -> Progress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units of `stage` are finished."""
        stage, note = harmless(stage), harmless(note)
        if self._bars:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total, note=note)
            self._bars.update(self._tasks[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        started = self._started.setdefault(stage, now)
        if stage not in self._printed or now - self._printed[stage] >= _LINE_EVERY_S or done == total:
            self._printed[stage] = now
            print_line(f"{stage}: {done}/{total} after {now - started:.0f} s {note}".rstrip(), err=True)
