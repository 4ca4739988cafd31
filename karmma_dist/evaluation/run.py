"""From a run folder to its results: find the run, plan its evaluation, stream the split, evaluate.

`validate` is the same for a model that is being trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.evaluation.bootstrap import add_intervals
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports import Exports
from karmma_dist.evaluation.plan import Choose, Plan, plan_evaluation
from karmma_dist.evaluation.predictions import PredictionCollector
from karmma_dist.evaluation.ranks import check_same, gather_when_done, note_progress
from karmma_dist.evaluation.scores import Results
from karmma_dist.evaluation.variants import Sensors, breaks_sound
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, Recipe, ViewsRecipe
from karmma_dist.streaming.batch import prepare
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.rendezvous import ALONE, World
from karmma_dist.training.run_log import STATE, read_state


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


def evaluate_run(
    run: Path,
    conditions: Choose,
    *,
    shards: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    annotations: Path | None = None,
    views: ViewsRecipe | None = None,
    exports: Exports | None = None,
    out: Path | None = None,
    report: Report = silent,
) -> Evaluated:
    """Evaluate a run folder or a weights file in this process.

    Args:
        run: Run folder, its best/, or weights file with its model.yaml beside it.
        conditions: Given the model's modalities, what is there at inference.
        shards: Shards folder; None: the run's own.
        split: Split; None: the run's validation split.
        batch_size: Clips per batch; None: the recipe's. The answers do not depend on it.
        num_workers: Decoding processes; None: the recipe's.
        annotations: Folder with the lists of rare classes and unseen participants; None: the recipe's, if it has one.
        views: Views of each clip, averaged; None: the recipe's.
        exports: Predictions and submissions to make, with whole sensors. A split without labels yields these alone:
            no rows.
        out: Folder that results and report are for; None: eval/ beside the weights.
        report: Progress.

    Raises:
        UserError: no weights, no shards, shards of other classes than the model's, a split or modality that does not
            exist, a split without labels and nothing to export or a sensor to break, something that cannot be
            exported, or a folder that cannot be written.
    """
    plan = plan_evaluation(
        run, conditions, shards=shards, split=split, batch_size=batch_size, num_workers=num_workers,
        annotations=annotations, views=views, exports=exports, out=out,
    )  # fmt: skip
    return carry_out(plan, report)


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
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
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
    clips.keeps_sound = any(breaks_sound(condition) for condition in plan.conditions)
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
    results.summary["views"] = clips.views.model_dump()
    return results


def validate(
    model: nn.Module, recipe: Recipe, world: World, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Top-1 and top-5 (percent) and loss per head (nats) of a model on its validation split, everything present.

    Every rank must call this and takes its share of the clips; all return the same numbers. Damaged clips are left
    out and counted in `num_damaged`. `between` is called after each batch, equally often on every rank, and may raise.
    """
    from karmma_dist.training.collectives import gather

    parameter = next(model.parameters())
    data, size = recipe.data, recipe.evaluation.batch_size
    clips = EvaluationClips(open_shards(data), data, recipe.inputs, data.validation_split)
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
    row = results.rows[0]
    measured = ("_top1", "_top5", "_loss")
    scores = {name: value for name, value in row.items() if name.endswith(measured) and value is not None}
    return {**scores, "num_clips": row["num_clips"], "num_damaged": results.summary["num_damaged"]}

