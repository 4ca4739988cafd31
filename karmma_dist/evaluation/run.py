"""Evaluation of a run: find the newest run, carry out a plan on one or several ranks, validate during training.

With several ranks, each rank evaluates its share of the clips and all ranks return the same results; torch's process
group is joined only then. `validate` does the same for a model that is being trained.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
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
from karmma_dist.runs.folder import read_state, run_folders
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.mixture import open_dataset
from karmma_dist.streaming.batch import prepare
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from karmma_dist.streaming.prefetch import on_device

_APART_S = 3600.0
"""Longest wait for the slowest rank at the end: ranks do not meet before."""


@contextmanager
def joined_ranks() -> Iterator[World]:
    """Join the ranks that torchrun's or Slurm's variables describe. Every rank must call this.

    Raises:
        UserError: the variables contradict each other.
        Stopped: another rank died, hangs or left because of an error.
    """
    world = find_world(os.environ)
    if world.size == 1:
        yield world
        return
    from karmma_dist.distributed.process_group import process_group

    if not world.is_main:
        logging.getLogger("karmma_dist").setLevel(logging.ERROR)  # rank 0 logs the rest
    with process_group(world):
        yield world


def check_same(description: str, world: World) -> None:
    """Check that all ranks carry out the same evaluation. Every rank must call this.

    Args:
        description: Description of this rank's evaluation.
        world: This rank.

    Raises:
        UserError: another rank evaluates something else.
    """
    if world.size == 1:
        return
    from karmma_dist.distributed.collectives import gather

    descriptions = gather([description])
    odd = next((rank for rank, other in enumerate(descriptions) if other != descriptions[0]), None)
    if odd is not None:
        raise UserError(
            f"the ranks of this job share one evaluation, but rank {odd} was given {descriptions[odd]} and rank 0 "
            f"{descriptions[0]}: start one job step per evaluation (srun --ntasks=1)"
        )


def gather_when_done(items: list[Any]) -> list[Any]:
    """Return the lists of all ranks, in rank order.

    Every rank must call this; the slowest may call it up to an hour after the first.
    """
    from karmma_dist.distributed.collectives import barrier, gather

    barrier(_APART_S)
    heartbeat.mark("gathering results", heartbeat.START_S)
    return gather(items)


@dataclass(frozen=True)
class Evaluated:
    """An evaluated run with its results."""

    name: str
    """Name of the run, or of the weights file."""
    folder: Path
    """Folder for results and report."""
    data: DataRecipe
    """Data it was evaluated on; `validation_split` is the split."""
    results: Results
    to_export: Callable[[], list[str]] = list
    """Function that writes the requested predictions and submissions, and returns a line about each file."""


def newest_finished_run(runs_dir: Path) -> Path:
    """Return the run folder below `runs_dir` that finished last; a warning names those that cannot be read.

    Raises:
        UserError: no run in the folder is finished.
    """
    finished: dict[Path, float] = {}
    for run, _ in run_folders(runs_dir):
        try:
            state = read_state(run)
        except UserError as error:
            logging.getLogger("karmma_dist").warning("not considered: %s", error)
            continue
        if state.get("state") == "finished":
            finished[run] = float(state.get("time", 0.0))
    if not finished:
        raise UserError(f"{runs_dir}: contains no finished run: name a run folder, or train: karmma-dist train RECIPE")
    return max(finished, key=lambda run: finished[run])


def carry_out(plan: Plan, report: Report = silent, world: World = ALONE) -> Evaluated:
    """Carry out a planned evaluation; the plan's model stays on the device that it ran on.

    Every rank of `world` must call this; all ranks return the same results.

    Args:
        plan: The evaluation.
        report: Called with the progress.
        world: This rank among the ranks that share the clips; see `joined_ranks`.

    Raises:
        UserError: no clip can be read, or a prediction is NaN.
    """
    device = device_of(world)
    model = plan.model.to(device)
    intact = [condition for condition in plan.conditions if condition.corrupt is None]
    collector = PredictionCollector(model.modalities, intact) if plan.exports.are_wanted else None
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
    """Evaluate this rank's share of the clips and gather the results of all ranks."""
    clips, num_views = plan.clips, plan.clips.views.num
    clips.uncut = uncut_modalities(plan.conditions)
    total = len(clips.clips)
    done = 0

    def progress(num: int) -> None:
        nonlocal done
        done = min(total, done + num * world.size)  # an estimate: ranks have almost equal shares
        heartbeat.mark(f"evaluating {plan.name}", heartbeat.START_S)
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
    """Validation of a model that is being trained; it fulfils the protocol `training.trainer.Validate`."""

    def metrics(
        self, heads: Collection[str], datasets: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, bool]:
        """Return the figures that a validation measures, first the figure by which models are compared.

        Args:
            heads: Heads of the model.
            datasets: Heads of each dataset of a mixture, by name. The figures of each are measured, as DATASET/FIGURE,
                and their means over the datasets that have them, as FIGURE.

        Returns:
            True if lower is better, by name of the figure.
        """
        if datasets:
            own = {name: self.metrics(its_heads) for name, its_heads in datasets.items()}
            means = {figure: lower for figures in own.values() for figure, lower in figures.items()}
            parts = {f"{name}/{figure}": lower for name, figures in own.items() for figure, lower in figures.items()}
            return {**means, **parts}
        figures = [figure for figure in figures_of(list(heads)) if figure.metric.in_validation]
        return {figure.name: figure.metric.lower_is_better for figure in figures}

    def __call__(
        self, model: nn.Module, recipe: Recipe, world: World, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Return the figures of a model on its validation split with every modality present: see `metrics`.

        A model of a mixture is validated on each dataset, by the dataset's own heads. If the validation split is the
        training split, only the clips that `data.hold_out` holds out are used.
        Every rank must call this and evaluates its share of the clips; all ranks return the same numbers. Damaged
        clips are left out and counted in `num_damaged`. `between` is called after each batch, equally often on every
        rank, and may raise.
        """
        data = recipe.data.model_copy(update={"modalities": recipe.modalities})
        if not data.mixture:
            return self._of_dataset(model, recipe, data, open_shards(data), world, between)
        assert isinstance(model, KarmmaModel)
        measured = {}
        for name in sorted(data.mixture):
            dataset = open_dataset(data, name)
            own = model.with_heads({head: head for head in model.heads if head in dataset.classes})
            measured[name] = self._of_dataset(own, recipe, data.of_dataset(name), dataset, world, between)
        parts = {f"{name}/{figure}": value for name, figures in measured.items() for figure, value in figures.items()}
        return _over_datasets(measured.values()) | parts

    def _of_dataset(
        self, model: nn.Module, recipe: Recipe, data: DataRecipe, folder: Shards, world: World,
        between: Callable[[], None],
    ) -> dict[str, float]:  # fmt: skip
        from karmma_dist.distributed.collectives import gather

        parameter = next(model.parameters())
        size = recipe.evaluation.batch_size
        held_out = data.validation_split == data.train_split and data.hold_out > 0
        clips = EvaluationClips(folder, data, recipe.inputs, data.validation_split, held_out=held_out)
        device, dtype = parameter.device, parameter.dtype
        with on_device(evaluation_batches(clips, size, world.rank, world.size), device) as batches:
            results = evaluate(
                model,  # type: ignore[arg-type]
                (prepare(batch, recipe.inputs, device, dtype) for batch in batches),
                [Condition(tuple(data.modalities))],
                device=device,
                drop_nouns=data.drop_nouns if "noun" in folder.classes else [],
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


def _over_datasets(measured: Collection[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over the datasets that have it, and the sums of the numbers of clips."""
    counts = ("num_clips", "num_damaged")
    names = dict.fromkeys(name for figures in measured for name in figures if name not in counts)
    values = {name: [figures[name] for figures in measured if name in figures] for name in names}
    means = {name: sum(each) / len(each) for name, each in values.items()}
    return means | {name: sum(figures[name] for figures in measured) for name in counts}


validate = Validation()
"""The validation that `karmma-dist train` passes to the trainer."""
