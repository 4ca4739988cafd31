"""Takes a run folder to its results: finds the run, plans its evaluation, streams the split, evaluates.

With several ranks each sees its share of the clips, and all come to the same results; torch's process group is joined
only then. `validate` is the same for a model that is being trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karmma_dist.distributed import heartbeat
from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import ALONE, World, find_world
from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.corruptions.batches import Sensors, uncut_modalities
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.plan import Plan
from karmma_dist.evaluation.results import Results
from karmma_dist.evaluation.scores import figures_of
from karmma_dist.evaluation.statistics.bootstrap import add_intervals
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, Recipe
from karmma_dist.runs.folder import STATE, read_state
from karmma_dist.streaming.batch import prepare
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from karmma_dist.streaming.prefetch import on_device

_APART_S = 3600.0
"""How long ranks may wait at the end for the slowest: they do not meet before."""


@contextmanager
def joined_ranks() -> Iterator[World]:
    """Join the ranks that torchrun's or Slurm's variables describe. Every rank must call this.

    Raises:
        UserError: the variables do not fit together.
        Stopped: another rank died, hangs or left because of an error.
    """
    world = find_world(os.environ)
    if world.size == 1:
        yield world
        return
    from karmma_dist.distributed.process_group import process_group

    if not world.is_main:
        logging.getLogger("karmma_dist").setLevel(logging.ERROR)  # rank 0 says it
    with process_group(world):
        yield world


def note_progress(doing: str) -> None:
    """Show the other ranks that this one moves. Every rank must call this equally often."""
    heartbeat.mark(doing, heartbeat.START_S)


def check_same(what: str, world: World) -> None:
    """Refuse to put results together that are not of the same evaluation. Every rank must call this.

    Args:
        what: this rank evaluates, in words.
        world: this rank.

    Raises:
        UserError: another rank evaluates something else.
    """
    if world.size == 1:
        return
    from karmma_dist.distributed.collectives import gather

    found = gather([what])
    odd = next((rank for rank, of in enumerate(found) if of != found[0]), None)
    if odd is not None:
        raise UserError(
            f"the ranks of this job share one evaluation, but rank {odd} was given {found[odd]} and rank 0 "
            f"{found[0]}: start one job step per evaluation (srun --ntasks=1)"
        )


def gather_when_done(items: list[Any]) -> list[Any]:
    """The lists of all ranks, in rank order. Every rank must call this, the slowest up to an hour after the first."""
    from karmma_dist.distributed.collectives import barrier, gather

    barrier(_APART_S)
    heartbeat.mark("gathering results", heartbeat.START_S)
    return gather(items)


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation was of."""

    name: str
    """The run's name, or the weights file's."""
    folder: Path
    """Where its results and report go."""
    data: DataRecipe
    """The clips it was evaluated on; `validation_split` is the split."""
    results: Results
    to_export: Callable[[], list[str]] = list
    """Writes the predictions and submissions that were asked for, and returns a line about each file."""


def newest_finished_run(runs_dir: Path) -> Path:
    """The run folder below `runs_dir` that finished last.

    Raises:
        UserError: there is none.
    """
    states = {path.parent: read_state(path.parent) for path in runs_dir.glob(f"**/{STATE}")}
    finished = {run: state["time"] for run, state in states.items() if state.get("state") == "finished"}
    if not finished:
        raise UserError(f"{runs_dir}: no finished run in it: name a run folder, or train one: karmma-dist train RECIPE")
    return max(finished, key=lambda run: finished[run])


def carry_out(plan: Plan, report: Report = silent, world: World = ALONE) -> Evaluated:
    """Evaluate what was planned; the plan's model is left on the device that it ran on.

    Every rank of `world` must call this; all return the same results.

    Args:
        plan: What of.
        report: Progress.
        world: This rank among those that share the clips; see `ranks.joined_ranks`.

    Raises:
        UserError: no clip can be read, or a prediction is not a number.
    """
    device = device_of(world)
    model = plan.model.to(device)
    whole = [condition for condition in plan.conditions if condition.corrupt is None]
    collector = PredictionCollector(model.modalities, whole) if plan.exports.are_wanted else None
    clips = f"split '{plan.clips.split}' of {plan.clips.folder.where}"
    check_same(f"{plan.name} on {clips} ({plan.folder}): {plan.conditions}", world)
    results = _evaluate(plan, model, device, collector, report, world)
    if results.rows:
        results = add_intervals(results)
    data = plan.clips.data
    done = Evaluated(plan.name, plan.folder, data, results)
    if collector is None:
        return done
    keys = [clip.key for clip in plan.clips.folder.clips(data.validation_split)]
    return replace(done, to_export=partial(plan.exports.write, collector.finish(), keys))


def _evaluate(
    plan: Plan,
    model: KarmmaModel,
    device: torch.device,
    collector: PredictionCollector | None,
    report: Report,
    world: World,
) -> Results:
    """Every rank its share of the clips."""
    clips, num_views = plan.clips, plan.clips.views.num
    clips.uncut = uncut_modalities(plan.conditions)
    total = len(clips.clips)
    done = 0

    def progress(num: int) -> None:
        nonlocal done
        done = min(total, done + num * world.size)  # rank 0 speaks for all
        note_progress(f"evaluating {plan.name}")
        report(f"eval {plan.name}", done, total)

    report(f"eval {plan.name}", 0, total)
    size = max(1, plan.batch_size // num_views)
    with on_device(evaluation_batches(clips, size, world.rank, world.size), device) as batches:
        results = evaluate(
            model,
            batches,
            plan.conditions,
            device=device,
            drop_nouns=clips.data.drop_nouns,
            progress=progress,
            gather=gather_when_done if world.size > 1 else None,
            groups=plan.groups,
            num_views=num_views,
            predictions=collector,
            sensors=Sensors(model.modalities, clips.inputs, device),
        )
    if collector is not None and world.size > 1:
        collector.gather(gather_when_done)
    return replace(results, summary=replace(results.summary, views=clips.views.model_dump()))


class Validation:
    """Measures a model that is being trained, as `training.trainer.Validate` asks for."""

    def metrics(self, heads: Collection[str]) -> dict[str, bool]:
        """Return the names of what calling it measures, the one that models are compared by first.

        Args:
            heads: Heads of the model.

        Returns:
            True if less is better, by name.
        """
        figures = [figure for figure in figures_of(list(heads)) if figure.metric.in_validation]
        return {figure.name: figure.metric.lower_is_better for figure in figures}

    def __call__(
        self, model: nn.Module, recipe: Recipe, world: World, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Return every metric of a model on its validation split, everything present: see `metrics`.

        Where that is the training split, only the clips that `data.hold_out` holds out of it are looked at.
        Every rank must call this and takes its share of the clips; all return the same numbers. Damaged clips are left
        out and counted in `num_damaged`. `between` is called after each batch, equally often on every rank, and may
        raise.
        """
        from karmma_dist.distributed.collectives import gather

        parameter = next(model.parameters())
        size = recipe.evaluation.batch_size
        data = recipe.data.model_copy(update={"modalities": recipe.modalities})
        held_out = data.validation_split == data.train_split and data.hold_out > 0
        clips = EvaluationClips(open_shards(data), data, recipe.inputs, data.validation_split, held_out=held_out)
        device, dtype = parameter.device, parameter.dtype
        with on_device(evaluation_batches(clips, size, world.rank, world.size), device) as batches:
            results = evaluate(
                model,  # type: ignore[arg-type]
                (prepare(batch, recipe.inputs, device, dtype) for batch in batches),
                [Condition(tuple(data.modalities))],
                device=device,
                drop_nouns=data.drop_nouns,
                progress=lambda num: between(),  # noqa: ARG005
                gather=gather,
            )
        (row,) = results.rows
        scores = {
            name: value
            for name, value in row.figures.items()
            if value is not None and find_figure(name).metric.in_validation
        }
        return {**scores, "num_clips": row.num_clips, "num_damaged": results.summary.num_damaged}


validate = Validation()
"""The validation that `karmma-dist train` hands to training."""
