"""Writes a run's metrics to metrics.jsonl in the run folder and to every tracker that the recipe names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import append_whole, json_text, write_whole
from karmma_dist.plugins import find_plugin
from karmma_dist.recipe import Recipe, TrackerRecipe
from karmma_dist.runs.folder import METRICS, metrics_lines, step_of
from karmma_dist.settings import validate
from karmma_dist.training.trackers.background import BackgroundTracker
from karmma_dist.training.trackers.tracker import Tracker, TrackerType, tracker_table


class RunLog:
    """The log of a run: metrics.jsonl and the run's trackers; it exists only on the main rank.

    Args:
        recipe: The run's recipe.
        resumed: Optimizer step that the run continues from; lines of later steps, which it repeats, are removed.

    Raises:
        UserError: the recipe names an unknown tracker, or gives one an unknown option.
    """

    def __init__(self, recipe: Recipe, resumed: int) -> None:
        entries = recipe.training.trackers
        types = [find_plugin(tracker_table(), entry.name, "training.trackers") for entry in entries]
        openers = [_opener(entry, kind, recipe, resumed) for entry, kind in zip(entries, types, strict=True)]
        self.path = recipe.run_dir / METRICS
        lines = metrics_lines(recipe.run_dir)
        if lines:
            kept = [line for line in lines if step_of(line) <= resumed]
            write_whole(self.path, b"".join(line + b"\n" for line in kept if resumed))
        self._trackers = [
            BackgroundTracker(entry.name, opener) if kind.is_remote else opener()
            for entry, kind, opener in zip(entries, types, openers, strict=True)
        ]

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


def _opener(entry: TrackerRecipe, tracker: TrackerType, recipe: Recipe, resumed: int) -> Callable[[], Tracker]:
    """Return a function that opens a tracker, after a check of its options."""
    if tracker.options is None:
        if entry.options:
            raise UserError(f"training.trackers: {entry.name} has no options")
        return partial(tracker.build, recipe, resumed)
    options = validate(entry.options, tracker.options, f"training.trackers ({entry.name})")
    return partial(tracker.build, options, recipe, resumed)
