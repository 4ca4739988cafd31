"""Weights & Biases: offline files in the run folder, or a server that the recipe names.

    RUN/wandb/offline-run-*/        `wandb sync` sends them later; all processes of a run have the same id
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from karmma_dist.recipe import Recipe
from karmma_dist.settings import Settings
from karmma_dist.training.trackers.tracker import Tracker, shown_settings, store_id, stored_id

NAME = "wandb"


class WandBOptions(Settings):
    """Options of the tracker `wandb`."""

    project: str = "karmma-dist"
    """Project of the run."""
    entity: str | None = None
    """User or team; None: the account's default."""
    server: str | None = None
    """URL of the server, e.g. https://api.wandb.ai; the key is read from WANDB_API_KEY or ~/.netrc. None: offline."""


class WandB(Tracker):
    """The tracker `wandb`.

    Metrics are drawn over the optimizer step, so that the steps that a resumed run repeats replace the earlier ones.

    Args:
        options: Project and server.
        recipe: The run's recipe, which is sent along.
        resumed: Optimizer step that the run continues from.
    """

    def __init__(self, options: WandBOptions, recipe: Recipe, resumed: int) -> None:  # noqa: ARG002
        from wandb import Settings as WandBSettings
        from wandb import init

        identifier = stored_id(recipe, NAME) or secrets.token_hex(8)
        settings: dict[str, Any] = {
            "silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True,
            "x_disable_meta": True, "x_disable_machine_info": True, "init_timeout": 30.0,
        }  # fmt: skip
        if options.server is not None:
            settings["base_url"] = options.server
        self._run = init(
            project=options.project, entity=options.entity, name=recipe.name, id=identifier, resume="allow",
            dir=str(recipe.run_dir), mode="offline" if options.server is None else "online",
            config=shown_settings(recipe), settings=WandBSettings(**settings),
        )  # fmt: skip
        store_id(recipe, NAME, identifier)
        for kind in ("train", "validation"):
            self._run.define_metric(f"{kind}/*", step_metric="optimizer_step")

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log KIND/NAME for each metric."""
        named = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({**named, "optimizer_step": step, "epoch": epoch})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
