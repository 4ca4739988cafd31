"""What every rank of a job does: join the others, train a chain of recipes, leave in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

from karmma_dist.micro_batches import check_batches
from karmma_dist.progress import Progress, Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.training.collectives import barrier, highest
from karmma_dist.training.engine import process_group
from karmma_dist.training.interruption import Interruption
from karmma_dist.training.loop import Validate, train
from karmma_dist.training.rendezvous import World, find_world
from karmma_dist.training.run_log import finished_names, read_state, write_state


def train_chain(
    chain: Sequence[Recipe],
    validate: Validate,
    resume: str = "auto",
    report: Report | None = None,
    deadline: float | None = None,
) -> dict[str, dict[str, float]]:
    """Train recipes one after the other on the ranks that the environment describes. Every rank must call this.

    What an earlier recipe of the chain has finished is taken as it is, whatever the settings it was trained with;
    `resume` holds for the last recipe.

    Args:
        chain: recipes, each after those it builds on.
        validate: measures a model in training.
        resume: "auto", "never" or a checkpoint.
        report: progress; None: this process's own. Only rank 0 reports.
        deadline: `time.monotonic()` by which the ranks should have saved and ended; None: no limit.

    Returns:
        Each run's last validation, on rank 0; nothing on the others.

    Raises:
        UserError: bad input, see `loop.train`; or a batch that the ranks do not divide.
        Stopped: by a signal, the deadline or a file STOP, after saving; or another rank is gone.
    """
    world = find_world(os.environ)
    last = chain[-1]
    taken = finished_names(chain) if resume == "auto" else finished_names(chain[:-1])
    check_batches(chain, world.size, taken)  # before the first is trained, and before any rank waits for another
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_group(world, last.training.collective_timeout_s, partial(_note_loss, chain, world)))
        interruption = stack.enter_context(Interruption(world.rank, deadline, highest))
        shown = silent if not world.is_main else report or stack.enter_context(Progress())
        scores = {}
        for recipe in chain[:-1]:
            scores[recipe.name] = _train_unless_finished(recipe, world, validate, shown, interruption)
        scores[last.name] = train(last, world, validate, resume=resume, report=shown, interruption=interruption)
        return scores if world.is_main else {}


def _note_loss(chain: Sequence[Recipe], world: World, why: str) -> None:
    """Write down in the run that is being trained that another rank is gone."""
    for recipe in chain if world.is_main else ():
        if read_state(recipe.run_dir).get("state") == "running":
            write_state(recipe.run_dir, "failed", error=why)


def _train_unless_finished(
    recipe: Recipe, world: World, validate: Validate, report: Report, interruption: Interruption
) -> dict[str, float]:
    state = read_state(recipe.run_dir)
    barrier()  # every rank has looked before any trains
    if state.get("state") == "finished":
        report(f"train {recipe.name}", 1, 1, f"already finished in {recipe.run_dir}")
        return dict(state["metrics"])
    return train(recipe, world, validate, report=report, interruption=interruption)
