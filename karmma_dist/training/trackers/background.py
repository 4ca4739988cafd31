"""A tracker in a thread of its own: neither a slow server nor a failing package holds up training."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping

from karmma_dist.errors import one_line
from karmma_dist.training.trackers.tracker import Tracker

_logger = logging.getLogger(__name__)

_CLOSE_S = 60.0
"""Seconds that the end of a run waits for a tracker."""

Measurement = tuple[str, int, int, Mapping[str, float]]


class BackgroundTracker(Tracker):
    """A tracker that is opened and called in a thread. If it fails, that is reported once and the run goes on.

    Args:
        name: Name of the tracker, for messages.
        open_tracker: Opens it, in the thread.
        close_s: Seconds that `close` waits.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], close_s: float = _CLOSE_S) -> None:
        self._name, self._open, self._close_s = name, open_tracker, close_s
        self._queue: queue.SimpleQueue[Measurement | None] = queue.SimpleQueue()
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Hand the metrics to the thread."""
        if not self._has_failed:
            self._queue.put((kind, step, epoch, dict(values)))

    def close(self) -> None:
        """Wait, for a limited time, until everything is written."""
        self._queue.put(None)
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            _logger.warning(
                "tracker %s: not finished after %g s, so its last metrics may be missing; metrics.jsonl has them",
                self._name, self._close_s,
            )  # fmt: skip

    def _run(self) -> None:
        try:
            tracker = self._open()
            while (measurement := self._queue.get()) is not None:
                tracker.write(*measurement)
            tracker.close()
        except ImportError as error:
            package = error.name or self._name
            self._fail(f"the package {package} is missing: pip install 'karmma-dist[{self._name}]'")
        except Exception as error:  # code of other packages may raise any exception
            self._fail(one_line(f"{type(error).__name__}: {error}", 300))

    def _fail(self, problem: str) -> None:
        self._has_failed = True
        _logger.warning("tracker %s: the run goes on without it: %s", self._name, problem)
