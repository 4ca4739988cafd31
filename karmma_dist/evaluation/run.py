"""From a run folder to its results: find the run, load the model, stream the split, evaluate.

`validate` is the same for a model that is being trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.evaluation.bootstrap import add_intervals
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports import Exports
from karmma_dist.evaluation.groups import Groups, participants, read_groups
from karmma_dist.evaluation.predictions import PredictionCollector
from karmma_dist.evaluation.ranks import check_same, gather_when_done, note_progress
from karmma_dist.evaluation.scores import Results
from karmma_dist.evaluation.variants import Sensors, breaks_sound
from karmma_dist.models.pretrained import ModelCard, load_model
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, Recipe, ViewsRecipe, read_run_recipe
from karmma_dist.shards import ShardFolder
from karmma_dist.streaming.batch import prepare
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.rendezvous import ALONE, World
from karmma_dist.training.run_log import BEST, STATE, read_state


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation was of."""

    name: str
    """The run's name, or the weights file's."""
    folder: Path
    """Where its report goes unless told otherwise."""
    data: DataRecipe
    """The clips it was evaluated on; `validation_split` is the split."""
    results: Results
    exported: list[str] = field(default_factory=list)
    """A line about each file of `exports` that was written."""


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


def run_name(run: Path) -> str:
    """What a run is called in a report: as in its recipe, with /best for its best weights, or as its weights file.

    Raises:
        UserError: its recipe cannot be read.
    """
    folder, home = _places(run)
    if not (home / "recipe.yaml").is_file():
        return run.stem
    name = read_run_recipe(home).name
    return name if home == folder else f"{name}/{BEST}"


def _places(run: Path) -> tuple[Path, Path]:
    """The folder of the weights, and that of the run: the one above where these are its best."""
    folder = run if run.is_dir() else run.parent
    return folder, folder.resolve().parent if folder.resolve().name == BEST else folder


def evaluate_run(
    run: Path,
    conditions: Callable[[Sequence[str]], list[Condition]],
    *,
    shards: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    annotations: Path | None = None,
    views: ViewsRecipe | None = None,
    exports: Exports | None = None,
    report: Report = silent,
    world: World = ALONE,
) -> Evaluated:
    """Evaluate a run folder or a weights file. Every rank of `world` must call this; all return the same results.

    Args:
        run: Run folder, its best/, or weights file with its model.yaml beside it.
        conditions: Given the model's modalities, what is there at inference.
        shards: Shards folder; None: the run's own.
        split: Split; None: the run's validation split.
        batch_size: Clips per batch; None: the recipe's. The answers do not depend on it.
        num_workers: Decoding processes; None: the recipe's.
        annotations: Folder with the lists of rare classes and unseen participants; None: the recipe's, if it has one.
        views: Views of each clip, averaged; None: the recipe's.
        exports: Predictions and submissions to write, with whole sensors. A split without labels yields these alone:
            no rows. Rank 0 writes them.
        report: Progress.
        world: This rank among those that share the clips; see `ranks.joined_ranks`.

    Raises:
        UserError: no weights, no shards, shards of other classes than the model's, a split or modality that does not
            exist, a split without labels and nothing to export or a sensor to break, or something that cannot be
            exported.
    """
    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    model, card = load_model(run, device)
    folder, home = _places(run)
    recipe = read_run_recipe(home) if (home / "recipe.yaml").is_file() else None
    if recipe is None and shards is None:
        raise UserError(f"{folder}: no recipe.yaml beside the weights, so name the shards with --shards DIR")
    base = recipe.data if recipe else DataRecipe(shards=str(shards), modalities=list(card.modalities))
    changes = {"shards": shards, "validation_split": split, "num_workers": num_workers}
    data = base.model_copy(update={name: value for name, value in changes.items() if value is not None})
    size = batch_size or (recipe.evaluation.batch_size if recipe else 16)
    name = run_name(run)
    looks = views or (recipe.evaluation.views if recipe else ViewsRecipe())
    wanted = exports or Exports()
    chosen = conditions(model.modalities)
    whole = [condition for condition in chosen if condition.corrupt is None]
    wanted.check(card.heads, whole)
    shard_folder = open_shards(data)
    _check_classes(card, shard_folder)
    clips = EvaluationClips(shard_folder, data, card.inputs, data.validation_split, looks)
    _check_labels(clips, card.heads, wanted, breaks=len(whole) < len(chosen))
    collector = PredictionCollector(model.modalities, whole) if wanted.are_wanted else None
    lists = annotations or (recipe.evaluation.annotations if recipe else None)
    groups = read_groups(Path(lists), model.heads, participants(shard_folder, clips.clips)) if lists else None
    check_same(f"{run} on split '{data.validation_split}' of {shard_folder.where}: {chosen}", world)
    results = _evaluate(model, clips, chosen, size, device, name, groups, collector, report, world)
    if results.rows:
        results = add_intervals(results)
    keys = [clip.key for clip in shard_folder.clips(data.validation_split)]
    exported = [] if collector is None or not world.is_main else wanted.write(collector.finish(), keys)
    return Evaluated(name, folder / "eval", data, results, exported)


def _check_classes(card: ModelCard, folder: ShardFolder) -> None:
    """A class is a number to the model: it must mean the same in the shards."""
    for head, num in card.heads.items():
        there, known = folder.classes.get(head), card.classes.get(head)
        if there is None:
            what = f"the model's head '{head}' is not among the shards' ({', '.join(folder.classes)})"
        elif len(there) != num:
            what = f"the shards have {len(there)} classes of '{head}', the model {num}"
        elif known is not None and known != there:
            number = next(number for number, (a, b) in enumerate(zip(known, there, strict=True)) if a != b)
            what = f"class {number} of '{head}' is '{there[number]}' in the shards and '{known[number]}' to the model"
        else:
            continue
        raise UserError(f"{folder.where}: {what}: evaluate on shards of the model's own dataset")


def _check_labels(clips: EvaluationClips, heads: Mapping[str, int], exports: Exports, breaks: bool) -> None:
    """Found in the index, before hours of prediction."""
    labelled = any(all(clip.labels.get(head) is not None for head in heads) for clip in clips.clips)
    if not labelled and not exports.are_wanted:
        raise UserError(
            f"{clips.folder.where}: split '{clips.split}' has no labels, so nothing can be scored: ask for its "
            "predictions (--predictions FILE.npz or --submission FORMAT FILE), or name another split with --split"
        )
    if not labelled and breaks:
        raise UserError(
            f"{clips.folder.where}: split '{clips.split}' has no labels, and predictions are written with whole "
            "sensors only: leave out --corrupt"
        )


def _evaluate(
    model: Any,
    clips: EvaluationClips,
    conditions: Sequence[Condition],
    batch_size: int,
    device: torch.device,
    name: str,
    groups: Groups | None,
    collector: PredictionCollector | None,
    report: Report,
    world: World,
) -> Results:
    """Every rank its share of the clips."""
    data, num_views = clips.data, clips.views.num
    clips.keeps_sound = any(breaks_sound(condition) for condition in conditions)
    total = len(clips.clips)
    done = 0

    def progress(num: int) -> None:
        nonlocal done
        done = min(total, done + num * world.size)  # rank 0 speaks for all
        note_progress(f"evaluating {name}")
        report(f"eval {name}", done, total)

    size = max(1, batch_size // num_views)
    with on_device(evaluation_batches(clips, size, world.rank, world.size), device) as batches:
        results = evaluate(
            model,
            batches,
            conditions,
            device=device,
            drop_nouns=data.drop_nouns,
            progress=progress,
            gather=gather_when_done if world.size > 1 else None,
            groups=groups,
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

