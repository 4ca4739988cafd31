"""From a run folder to its results: find the run, load the model, stream the split, evaluate.

`validate` is the same for a model that is being trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.scores import Results
from karmma_dist.evaluation.variants import Sensors, breaks_sound
from karmma_dist.models.pretrained import load_model
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, InputRecipe, Recipe, read_run_recipe
from karmma_dist.streaming.batch import prepare
from karmma_dist.streaming.loader import EvaluationClips, evaluation_batches, open_shards
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.training.rendezvous import World
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
    conditions: Callable[[Sequence[str]], list[Condition]],
    *,
    shards: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    report: Report = silent,
) -> Evaluated:
    """Evaluate a run folder or a weights file.

    Args:
        run: Run folder, its best/, or weights file with its model.yaml beside it.
        conditions: Given the model's modalities, what is there at inference.
        shards: Shards folder; None: the run's own.
        split: Split; None: the run's validation split.
        batch_size: Clips per batch; None: the recipe's. The answers do not depend on it.
        num_workers: Decoding processes; None: the recipe's.
        report: Progress.

    Raises:
        UserError: no weights, no shards, a split or modality that does not exist.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, card = load_model(run, device)
    folder = run if run.is_dir() else run.parent
    home = folder.resolve().parent if folder.resolve().name == BEST else folder
    recipe = read_run_recipe(home) if (home / "recipe.yaml").is_file() else None
    if recipe is None and shards is None:
        raise UserError(f"{folder}: no recipe.yaml beside the weights, so name the shards with --shards DIR")
    base = recipe.data if recipe else DataRecipe(shards=str(shards), modalities=list(card.modalities))
    changes = {"shards": shards, "validation_split": split, "num_workers": num_workers}
    data = base.model_copy(update={name: value for name, value in changes.items() if value is not None})
    size = batch_size or (recipe.evaluation.batch_size if recipe else 16)
    name = run.stem if recipe is None else recipe.name if home == folder else f"{recipe.name}/{BEST}"
    chosen = conditions(model.modalities)
    results = _evaluate(model, data, card.inputs, chosen, size, device, name, report)
    return Evaluated(name, folder / "eval", data, results)


def _evaluate(
    model: Any,
    data: DataRecipe,
    inputs: InputRecipe,
    conditions: Sequence[Condition],
    batch_size: int,
    device: torch.device,
    name: str,
    report: Report,
) -> Results:
    """One process, every clip."""
    clips = EvaluationClips(open_shards(data), data, inputs, data.validation_split)
    clips.keeps_sound = any(breaks_sound(condition) for condition in conditions)
    total = len(clips.clips)
    done = 0

    def progress(num: int) -> None:
        nonlocal done
        done += num
        report(f"eval {name}", done, total)

    with on_device(evaluation_batches(clips, batch_size), device) as batches:
        return evaluate(
            model,
            batches,
            conditions,
            device=device,
            drop_nouns=data.drop_nouns,
            progress=progress,
            sensors=Sensors(model.modalities, inputs, device),
        )


def validate(model: nn.Module, recipe: Recipe, world: World) -> dict[str, float]:
    """Top-1 and top-5 (percent) and loss per head (nats) of a model on its validation split, everything present.

    Every rank must call this and takes its share of the clips; all return the same numbers. Damaged clips are left
    out and counted in `num_damaged`.
    """
    from karmma_dist.training.engine import gather

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
            gather=gather,
        )
    row = results.rows[0]
    measured = ("_top1", "_top5", "_loss")
    scores = {name: value for name, value in row.items() if name.endswith(measured) and value is not None}
    return {**scores, "num_clips": row["num_clips"], "num_damaged": results.summary["num_damaged"]}

