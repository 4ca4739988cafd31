"""TensorBoard: event files in the run folder."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from karmma_dist.io.files import append_whole
from karmma_dist.recipe import Recipe
from karmma_dist.training.trackers.tracker import Tracker

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
