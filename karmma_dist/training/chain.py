"""A chain of runs: the recipes that build on each other are trained one after the other on the same ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

from karmma_dist.distributed.collectives import barrier, highest
from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError
from karmma_dist.progress import Progress, Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names, read_state, write_state
from karmma_dist.runs.process import is_this_process
from karmma_dist.training.fault_tolerance.preemption import PreemptionHandler
from karmma_dist.training.trainer import Validate, train


def train_chain(
    chain: Sequence[Recipe],
    validate: Validate,
    resume: str = "auto",
    report: Report | None = None,
    deadline: float | None = None,
) -> dict[str, dict[str, float]]:
    """Train recipes one after the other on the ranks that the environment describes. Every rank must call this.

    Finished runs of the earlier recipes are used as they are, regardless of the settings they were trained with.
    `resume` applies to the last recipe.

    Args:
        chain: recipes, each after the recipes it builds on.
        validate: measures a model in training.
        resume: "auto", "never" or the path of a checkpoint.
        report: receives progress on rank 0; None: a progress display of this process.
        deadline: `time.monotonic()` by which the ranks must have saved and ended; None: no limit.

    Returns:
        The metrics of each run's last validation, by run, on rank 0; an empty dict on other ranks.

    Raises:
        UserError: the input is bad (see `train`), or the ranks do not divide a batch evenly.
        Stopped: a signal, the deadline or a file STOP stopped the run, after saving; or another rank is lost.
    """
    world = find_world(os.environ)
    last = chain[-1]
    finished = finished_names(chain) if resume == "auto" else finished_names(chain[:-1])
    check_batches(chain, world.size, finished)  # before training starts, and before any rank waits for another
    with contextlib.ExitStack() as stack:
        on_loss = partial(_record_lost_rank, chain, world)
        stack.enter_context(process_group(world, last.training.collective_timeout_s, on_loss))
        preemption = stack.enter_context(PreemptionHandler(world.rank, deadline, highest))
        rank_report = silent if not world.is_main else report or stack.enter_context(Progress())
        scores = {}
        for recipe in chain[:-1]:
            scores[recipe.name] = _train_unless_finished(recipe, world, validate, rank_report, preemption)
        scores[last.name] = train(last, world, validate, resume=resume, report=rank_report, preemption=preemption)
        return scores if world.is_main else {}


def _record_lost_rank(chain: Sequence[Recipe], world: World, reason: str) -> None:
    """Record in the state of the run that this process trains that another rank is lost."""
    for recipe in chain if world.is_main else ():
        with contextlib.suppress(OSError, UserError):  # the end of this rank, which names the reason, comes next
            state = read_state(recipe.run_dir)
            if state.get("state") == "running" and is_this_process(state):
                write_state(recipe.run_dir, "failed", error=reason)


def _train_unless_finished(
    recipe: Recipe, world: World, validate: Validate, report: Report, preemption: PreemptionHandler
) -> dict[str, float]:
    state = read_state(recipe.run_dir)
    barrier()  # every rank must read the state before any rank trains
    if state.get("state") == "finished":
        report(f"train {recipe.name}", 1, 1, f"already finished in {recipe.run_dir}")
        return dict(state.get("metrics", {}))
    return train(recipe, world, validate, report=report, preemption=preemption)
