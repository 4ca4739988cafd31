"""The contract of a tracker, and the table of trackers, which other packages extend.

    training:
      trackers: [tensorboard]                                             # the default
      trackers: [tensorboard, {name: wandb, options: {project: epic}}]    # written to the run folder, nothing is sent
      trackers: [{name: mlflow, options: {server: "http://head:5000"}}]   # sent to a server

Nothing is sent anywhere unless the recipe names a server; variables of the environment do not decide that.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from karmma_dist.errors import masked
from karmma_dist.io.files import write_json
from karmma_dist.io.json_fields import read_json
from karmma_dist.plugins import with_plugins
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import TRACKED
from karmma_dist.settings import Settings, flat

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


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

    build: Callable[..., Tracker]
    """Called with the options, if the tracker has any, the recipe, and the optimizer step that the run continues from.
    A resumed run repeats the steps after that step, so metrics of those steps from an earlier process must be replaced.
    """
    options: type[Settings] | None = None
    """Type of the recipe's options of the tracker; None: it has none."""
    is_remote: bool = False
    """True if the tracker is opened and called in a thread of its own: a server or a package that is slow or fails must
    not hold up training."""


def own_trackers() -> dict[str, TrackerType]:
    """Return this package's trackers by name."""
    from karmma_dist.training.trackers.mlflow import MLflow, MLflowOptions
    from karmma_dist.training.trackers.tensorboard import TensorBoard
    from karmma_dist.training.trackers.trackio import Trackio, TrackioOptions
    from karmma_dist.training.trackers.wandb import WandB, WandBOptions

    return {
        "tensorboard": TrackerType(TensorBoard),
        "wandb": TrackerType(WandB, WandBOptions, is_remote=True),
        "mlflow": TrackerType(MLflow, MLflowOptions, is_remote=True),
        "trackio": TrackerType(Trackio, TrackioOptions, is_remote=True),
    }


@cache
def tracker_table() -> dict[str, TrackerType]:
    """Return all trackers by name: ours, and the entry points `karmma_dist.trackers` of other packages."""
    return with_plugins(own_trackers(), "karmma_dist.trackers", TrackerType)


def stored_id(recipe: Recipe, tracker: str) -> str | None:
    """Return the identifier under which a tracker knows the run; None before `store_id`.

    Raises:
        ValueError: the file of identifiers is damaged.
        OSError: the file cannot be read.
    """
    try:
        fields = read_json(recipe.run_dir / TRACKED)
    except FileNotFoundError:
        return None
    return fields.text(tracker, _ID) if tracker in list(fields) else None


def store_id(recipe: Recipe, tracker: str, identifier: str) -> None:
    """Store the identifier under which a tracker knows the run, so that a resumed run continues it."""
    path = recipe.run_dir / TRACKED
    known = read_json(path).unchecked() if path.exists() else {}
    write_json(path, {**known, tracker: identifier})


def shown_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's settings for a tracker, by dotted name, without passwords in URLs."""
    return {name: _without_secrets(value) for name, value in flat(recipe.model_dump(mode="json")).items()}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return masked(value) if isinstance(value, str) else value
