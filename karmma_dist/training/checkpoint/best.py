"""The weights that did best in validation: kept in best/, beside the run's last ones.

    runs/NAME/best/
      weights.safetensors  model.yaml    what eval and a distillation take as they take a run
      state.json                         the validation that chose them: metric, value, step, epoch, all metrics
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, nearest
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import BEST, read_state, write_state


class BestWeights:
    """Keeps the best weights of a run; one rank only may write.

    What is best is read from best/ itself, so that the record is of the weights that lie there, whatever checkpoint a
    run is resumed from: a validation that is repeated is not better than itself and changes nothing.

    Args:
        recipe: the run.
        classes: class names per head.
        measured: names of what validation measures; True if less is better.

    Raises:
        UserError: validation gives no metric of the name `training.best_metric`.
    """

    def __init__(self, recipe: Recipe, classes: dict[str, list[str]], measured: Mapping[str, bool]) -> None:
        self._recipe, self._classes = recipe, classes
        self._metric = recipe.training.best_metric
        if self._metric not in measured:
            raise UserError(
                f"training.best_metric: no metric '{self._metric}'{nearest(self._metric, list(measured))}; "
                f"validation gives {', '.join(measured)}"
            )
        self._lower_is_better = measured[self._metric]

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self._recipe.run_dir / BEST

    @property
    def record(self) -> dict[str, Any]:
        """Metric, value, step and epoch of the best validation so far; empty before the first."""
        state = read_state(self.folder)
        return {name: state[name] for name in ("metric", "value", "step", "epoch") if name in state}

    def offer(self, model: KarmmaModel, metrics: dict[str, float], step: int, epoch: int) -> bool:
        """Keep `model`, whole on this rank, if its validation `metrics` are better than any before.

        Args:
            model: what was validated.
            metrics: what validation gave.
            step: optimizer steps done.
            epoch: 0-based epoch it was validated after.
        """
        value, best = metrics.get(self._metric), self.record.get("value")
        if value is None:
            return False
        if best is not None and not (value < best if self._lower_is_better else value > best):
            return False
        save_model(model, self.folder, recipe=self._recipe, classes=self._classes)
        write_state(
            self.folder, BEST, metric=self._metric, value=value, step=step, epoch=epoch, metrics=metrics
        )
        return True
