"""Traces some optimizer steps for chrome://tracing or ui.perfetto.dev, into runs/NAME/trace/rank0.json.gz."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_logger = logging.getLogger(__name__)


class Trace:
    """A trace of optimizer steps `start` to `stop - 1`; it is also written if training ends earlier.

    Args:
        steps: start and stop; None: no trace.
        path: output file, .json or .json.gz.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path) -> None:
        self._steps, self._path = steps, path
        self._running: profile | None = None
        self._span = contextlib.ExitStack()

    def before_step(self, step: int) -> None:
        """Start, continue or finish tracing. Call this before each optimizer step (0-based)."""
        if self._steps is None:
            return
        start, stop = self._steps
        if step >= stop:
            self.end()
        if not start <= step < stop:
            return
        if self._running is None:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running = profile(activities=activities)
            self._running.start()
        self._span.close()
        self._span.enter_context(record_function(f"step {step}"))

    def end(self) -> None:
        """Write the trace if tracing is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        self._span.close()
        running.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # a link of this name would be written through
        running.export_chrome_trace(str(self._path))
        _logger.warning("trace written to %s: open it at ui.perfetto.dev", self._path)


@contextlib.contextmanager
def tracing(steps: tuple[int, int] | None, run_dir: Path, first: int, total: int) -> Iterator[Trace]:
    """Trace a run that does optimizer steps `first` to `total - 1`; the trace is written at its end at the latest."""
    if steps is not None and (steps[1] <= first or steps[0] >= total):
        _logger.warning(
            "training.profile_steps %s: nothing to trace: this run does steps %d to %d", [*steps], first, total - 1
        )
    trace = Trace(steps, run_dir / "trace" / "rank0.json.gz")
    try:
        yield trace
    finally:
        trace.end()
