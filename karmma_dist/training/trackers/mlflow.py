"""MLflow: a database in the run folder, or a tracking server that the recipe names.

    RUN/mlflow.db        `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows it
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from karmma_dist.recipe import Recipe
from karmma_dist.settings import Settings
from karmma_dist.training.trackers.tracker import Tracker, shown_settings, store_id, stored_id

NAME = "mlflow"

_MOST_TEXT = 500
"""Characters of a parameter's value that every server accepts."""
_MOST_PARAMS = 100
"""Parameters of a request."""


class MLflowOptions(Settings):
    """Options of the tracker `mlflow`."""

    experiment: str = "karmma-dist"
    """Experiment of the run."""
    server: str | None = None
    """URL of the tracking server, e.g. http://head:5000. None: a database in the run folder."""


class MLflow(Tracker):
    """The tracker `mlflow`.

    A metric of a step that a resumed run repeats is written again, with the same value: such a run repeats the numbers.

    Args:
        options: Experiment and server.
        recipe: The run's recipe, which is sent along.
        resumed: Optimizer step that the run continues from.
    """

    def __init__(self, options: MLflowOptions, recipe: Recipe, resumed: int) -> None:  # noqa: ARG002
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        database = f"sqlite:///{(recipe.run_dir / 'mlflow.db').absolute()}"
        self._client = MlflowClient(tracking_uri=options.server or database)
        known = stored_id(recipe, NAME)
        if known is not None:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(options.experiment)
        number = self._client.create_experiment(options.experiment) if experiment is None else experiment.experiment_id
        self._run_id = self._client.create_run(number, run_name=recipe.name).info.run_id
        store_id(recipe, NAME, self._run_id)
        params = [Param(name, str(value)[:_MOST_TEXT]) for name, value in shown_settings(recipe).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[first : first + _MOST_PARAMS])

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log KIND/NAME for each metric."""
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        metrics = [Metric(f"{kind}/{name}", value, now_ms, step) for name, value in {**values, "epoch": epoch}.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)
