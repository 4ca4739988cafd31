"""The weights with the best validation score, kept in best/ in addition to the run's latest weights.

    runs/NAME/best/
      weights.safetensors  model.yaml    accepted by eval and by distillation like a run folder
      state.json                         the validation that selected them: metric, value, step, epoch, all metrics
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, nearest
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import BEST, read_state, write_state


class BestWeights:
    """The best weights of a run; only one rank may write them.

    The best score so far is read from best/ itself, so the record always describes the weights stored there, whichever
    checkpoint a run resumes from. Repeating a validation changes nothing, since a score is not better than itself.

    Args:
        recipe: the run's recipe.
        classes: class names per head.
        measured: metrics that validation reports, by name; True if lower is better.

    Raises:
        UserError: validation does not report the metric `training.best_metric`.
    """

    def __init__(self, recipe: Recipe, classes: dict[str, list[str]], measured: Mapping[str, bool]) -> None:
        self._recipe, self._classes = recipe, classes
        self._metric = recipe.training.best_metric
        if self._metric not in measured:
            raise UserError(
                f"training.best_metric: no metric '{self._metric}'{nearest(self._metric, list(measured))}; "
                f"validation reports {', '.join(measured)}"
            )
        self._lower_is_better = measured[self._metric]

    @property
    def folder(self) -> Path:
        """Folder of the best weights."""
        return self._recipe.run_dir / BEST

    @property
    def record(self) -> dict[str, Any]:
        """Metric, value, step and epoch of the best validation so far; empty before the first validation."""
        state = read_state(self.folder)
        return {name: state[name] for name in ("metric", "value", "step", "epoch") if name in state}

    def save_if_better(self, model: KarmmaModel, metrics: dict[str, float], step: int, epoch: int) -> bool:
        """Save `model` if its validation score is the best so far, and return True if it was saved.

        Args:
            model: the validated model, with all its parameters on this rank.
            metrics: its validation metrics.
            step: optimizer steps done.
            epoch: 0-based epoch after which it was validated.
        """
        value, best = metrics.get(self._metric), self.record.get("value")
        if value is None or not math.isfinite(value):
            return False
        if best is not None and math.isfinite(best) and not (value < best if self._lower_is_better else value > best):
            return False
        save_model(model, self.folder, recipe=self._recipe, classes=self._classes)
        write_state(
            self.folder, BEST, metric=self._metric, value=value, step=step, epoch=epoch, metrics=metrics
        )
        return True
