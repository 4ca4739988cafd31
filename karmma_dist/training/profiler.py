"""Traces some optimizer steps for chrome://tracing or ui.perfetto.dev, into runs/NAME/trace/rank0.json.gz."""

from __future__ import annotations

import contextlib
import errno
import gzip
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from karmma_dist.io.disk_errors import make_folder, naming
from karmma_dist.io.files import remove, temporary_name, write_whole

_logger = logging.getLogger(__name__)
_PROBE_BYTES = 1 << 20
_TAIL_BYTES = 64


class Trace:
    """A trace of optimizer steps `start` to `stop - 1`; it is also written if training ends earlier.

    Args:
        steps: start and stop; None: no trace.
        path: output file, .json.gz.
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
        """Write the trace if tracing is running.

        Raises:
            DiskError: the disk is full or fails.
        """
        if self._running is None:
            return
        running, self._running = self._running, None
        self._span.close()
        running.stop()
        make_folder(self._path.parent)
        plain = temporary_name(self._path)  # a folder: the profiler makes further names of that of its file
        try:
            with naming(self._path, plain):
                plain.mkdir()
                _export(running, plain / "trace.json")
            write_whole(self._path, lambda temporary: _compress(plain / "trace.json", temporary))
        finally:
            with contextlib.suppress(OSError):  # a read-only disk must not hide the error
                remove(plain)
        _logger.warning("trace written to %s: open it at ui.perfetto.dev", self._path)


def _export(running: profile, path: Path) -> None:
    """Write a trace. The profiler prints what the disk refuses, and goes on without a file or with a part of it."""
    running.export_chrome_trace(str(path))
    if path.is_file() and _ends_with_brace(path):
        return
    for written in (*path.parent.iterdir(), path):
        with open(written, "ab") as file:
            file.write(bytes(_PROBE_BYTES))  # raises the error that the profiler has met
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _ends_with_brace(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().rstrip().endswith(b"}")


def _compress(source: Path, target: Path) -> None:
    with open(source, "rb") as plain, gzip.open(target, "wb") as packed:
        shutil.copyfileobj(plain, packed)


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
    except BaseException:
        try:
            trace.end()
        except OSError as error:  # must not take the place of the first error
            _logger.warning("no trace: %s", error)
        raise
    trace.end()
