"""trackio: a database in the run folder, or a server or Space that the recipe names.

    RUN/trackio/        `TRACKIO_DIR=RUN/trackio trackio show` draws it
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import model_validator

from karmma_dist.recipe import Recipe
from karmma_dist.settings import Settings
from karmma_dist.training.trackers.tracker import Tracker, shown_settings, store_id, stored_id

NAME = "trackio"


class TrackioOptions(Settings):
    """Options of the tracker `trackio`."""

    project: str = "karmma-dist"
    """Project of the run."""
    server: str | None = None
    """URL of a trackio server. None: files in the run folder."""
    space: str | None = None
    """Hugging Face Space, OWNER/NAME, instead of a server."""

    @model_validator(mode="after")
    def _one_place(self) -> TrackioOptions:
        if self.server is not None and self.space is not None:
            raise ValueError("set either 'server' or 'space'")
        return self


class Trackio(Tracker):
    """The tracker `trackio`.

    Args:
        options: Project and server.
        recipe: The run's recipe, which is sent along.
        resumed: Optimizer step that the run continues from.
    """

    def __init__(self, options: TrackioOptions, recipe: Recipe, resumed: int) -> None:  # noqa: ARG002
        os.environ["TRACKIO_DIR"] = str((recipe.run_dir / "trackio").absolute())  # read when the package is imported
        from trackio import init

        name = stored_id(recipe, NAME) or recipe.name.replace("/", "-").replace("@", "-")[-64:]
        self._run = init(
            project=options.project, name=name, resume="allow", config=shown_settings(recipe),
            server_url=options.server, space_id=options.space, embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        store_id(recipe, NAME, name)

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log KIND/NAME for each metric."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({**named, "epoch": epoch}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
