"""Writes a run's metrics to metrics.jsonl in the run folder and to every tracker that the recipe names.

    training:
      trackers: [tensorboard]     # the default; other packages register theirs under `karmma_dist.trackers`
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from karmma_dist.io.files import append_whole, json_text, write_whole
from karmma_dist.plugins import find_plugin, with_plugins
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import METRICS, metrics_lines, step_of


class Tracker(ABC):
    """A receiver of a run's metrics, on the main rank."""

    @abstractmethod
    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Record the metrics after an optimizer step.

        Args:
            kind: `train` or `validation`.
            step: Number of optimizer steps done since the beginning of the run.
            epoch: Number of the epoch, counted from 0.
            values: Metrics by name.
        """

    @abstractmethod
    def close(self) -> None:
        """Flush all buffers; called once, at the end."""


@dataclass(frozen=True)
class TrackerType:
    """An entry of the table of trackers."""

    build: Callable[[Recipe, int], Tracker]
    """Called with the recipe and the optimizer step that the run continues from. A resumed run repeats the steps after
    that step, so metrics of those steps from an earlier process must be replaced."""


_numbers = itertools.count()
_VERSION = "brain.Event:2"


class TensorBoard(Tracker):
    """A tracker that writes TensorBoard event files into the run folder.

    The events are those of PyTorch's SummaryWriter, but they are written at once and by this thread: where the disk is
    full, that of SummaryWriter prints a traceback, and training learns of it later or not at all.
    """

    def __init__(self, recipe: Recipe, resumed: int) -> None:
        from torch.utils.tensorboard.writer import Event, SessionLog

        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._path = recipe.run_dir / name
        purge = Event(step=resumed + 1, session_log=SessionLog(status=SessionLog.START))  # hides the repeated steps
        self._add([Event(file_version=_VERSION), Event(step=resumed + 1, file_version=_VERSION), purge])

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:  # noqa: ARG002
        """Add a scalar KIND/NAME for each metric."""
        from torch.utils.tensorboard.summary import scalar
        from torch.utils.tensorboard.writer import Event

        self._add([Event(step=step, summary=scalar(f"{kind}/{name}", value)) for name, value in values.items()])

    def _add(self, events: Sequence[Any]) -> None:
        from torch.utils.tensorboard import RecordWriter

        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        append_whole(self._path, records.getvalue())

    def close(self) -> None:
        """Do nothing: every event is written already."""


_OWN = {"tensorboard": TrackerType(TensorBoard)}


@cache
def tracker_table() -> dict[str, TrackerType]:
    """Return all trackers by name: ours, and the entry points `karmma_dist.trackers` of other packages."""
    return with_plugins(_OWN, "karmma_dist.trackers", TrackerType)


class RunLog:
    """The log of a run: metrics.jsonl and the run's trackers; it exists only on the main rank.

    Args:
        recipe: The run's recipe.
        resumed: Optimizer step that the run continues from; lines of later steps, which it repeats, are removed.

    Raises:
        UserError: the recipe names an unknown tracker.
    """

    def __init__(self, recipe: Recipe, resumed: int) -> None:
        types = [find_plugin(tracker_table(), name, "training.trackers") for name in recipe.training.trackers]
        self.path = recipe.run_dir / METRICS
        lines = metrics_lines(recipe.run_dir)
        if lines:
            kept = [line for line in lines if step_of(line) <= resumed]
            write_whole(self.path, b"".join(line + b"\n" for line in kept if resumed))
        self._trackers = [tracker.build(recipe, resumed) for tracker in types]

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line `{"kind", "step", "epoch", ...values}`; `step` is the number of optimizer steps done."""
        self.write_event(kind, step, epoch, **values)
        for tracker in self._trackers:
            tracker.write(kind, step, epoch, values)

    def write_event(self, kind: str, step: int, epoch: int, **values: Any) -> None:
        """Append one line of other values than metrics, which trackers do not receive."""
        line = json_text({"kind": kind, "step": step, "epoch": epoch, **values})
        append_whole(self.path, f"{line}\n".encode())

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers:
            tracker.close()
