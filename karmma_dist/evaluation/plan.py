"""The plan of an evaluation: model, clips and conditions, checked before the first clip is read."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.datasets import choose_dataset
from karmma_dist.evaluation.exports.exports import Exports
from karmma_dist.evaluation.groups import Groups, participants, read_groups
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model
from karmma_dist.recipe import DataRecipe, ViewsRecipe, data_of, read_run_recipe
from karmma_dist.runs.folder import BEST, run_places
from karmma_dist.shards.folder import Shards, check_classes
from karmma_dist.streaming.loader import EvaluationClips, open_shards

Choose = Callable[[Sequence[str]], list[Condition]]
"""Function that returns the conditions to evaluate, given the model's modalities."""


@dataclass(frozen=True)
class Plan:
    """A checked evaluation, which only unreadable clips can still make fail."""

    name: str
    """Name of the run, or of the weights file."""
    folder: Path
    """Folder for results and report."""
    is_scored: bool
    """True if there are results and a report: a clip has a label for every head."""
    model: KarmmaModel
    """The model, on the CPU."""
    clips: EvaluationClips
    """Clips of the split that the model can be shown, and their views."""
    conditions: list[Condition]
    batch_size: int
    groups: Groups | None
    exports: Exports

    @property
    def scored_keys(self) -> list[str]:
        """Sorted keys of the clips that will be scored, as long as all of them can be read."""
        dropped = self.clips.data.drop_nouns
        return sorted(
            clip.key
            for clip in self.clips.clips
            if _is_labelled(clip.labels, self.model.heads) and clip.labels.get("noun") not in dropped
        )


def plan_evaluation(
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
) -> Plan:
    """Load the model, open the shards, and check everything that can be checked before an evaluation.

    Args:
        run: Run folder, its best/ folder, or a weights file with a model.yaml in the same folder.
        conditions: Function that returns the conditions, given the model's modalities.
        shards: Shards folder; None: the run's own. A run on a mixture is evaluated on one of its datasets, by the heads
            that this has.
        split: Split; None: the run's test split if it has one, else its validation split.
        batch_size: Clips per batch; None: the recipe's. The results do not depend on it.
        num_workers: Decoding processes; None: the recipe's.
        annotations: Folder with the lists of rare classes and unseen participants; None: the recipe's, if it has one.
        views: Views of each clip, which are averaged; None: the recipe's.
        exports: Predictions and submissions to write, made with intact sensors. A split without labels yields only
            these, and no rows.
        out: Folder for results and report; None: eval/ in the folder of the weights.

    Raises:
        UserError: weights or shards are missing (or, of a mixture, not named), the shards have other classes than the
            model, a split or modality does not exist, the split has no labels although nothing is exported or a sensor
            is to be broken, an export is impossible, or the folder cannot be written.
    """
    model, card = load_model(run)
    weights_folder, home = run_places(run)
    recipe = read_run_recipe(home) if (home / "recipe.yaml").is_file() else None
    if recipe is None and shards is None:
        raise UserError(f"{weights_folder}: no recipe.yaml with the weights: name the shards with --shards DIR")
    base = recipe.data if recipe else data_of(str(shards), card.modalities)
    shard_folder: Shards | None = None
    if base.mixture:
        chosen_dataset = choose_dataset(model, card, base, shards)
        model, card, base = chosen_dataset.model, chosen_dataset.card, chosen_dataset.data
        shard_folder = chosen_dataset.folder
    changes = {"shards": shards, "validation_split": split or default_split(base), "num_workers": num_workers}
    known = {name: value for name, value in changes.items() if value is not None}
    # A student may use fewer modalities than the clips it was trained on.
    data = base.model_copy(update={**known, "modalities": list(card.modalities)})
    if data.drop_nouns and "noun" not in model.heads:
        raise UserError(
            f"{home}/recipe.yaml: data.drop_nouns is set, but the model has no head 'noun' "
            f"(it has {', '.join(model.heads)}): leave it out"
        )
    chosen_views = views or (recipe.evaluation.views if recipe else ViewsRecipe())
    chosen_exports = exports or Exports()
    chosen = conditions(model.modalities)
    intact = [condition for condition in chosen if condition.corrupt is None]
    chosen_exports.check(card.heads, intact)
    shard_folder = shard_folder or open_shards(data)
    check_classes(card, shard_folder)
    clips = EvaluationClips(shard_folder, data, card.inputs, data.validation_split, chosen_views)
    folder = weights_folder / "eval" if out is None else out
    is_scored = _check_labels(clips, card.heads, chosen_exports, has_corruptions=len(intact) < len(chosen))
    if is_scored:
        check_folder(folder, "give another with --out" if out is None else "name another folder")
    chosen_exports.check_clips(shard_folder.clips(data.validation_split), intact[0].modalities)
    lists = annotations or (recipe.evaluation.annotations if recipe else None)
    groups = read_groups(Path(lists), model.heads, participants(shard_folder, clips.clips)) if lists else None
    size = batch_size or (recipe.evaluation.batch_size if recipe else 16)
    return Plan(run_name(run), folder, is_scored, model, clips, chosen, size, groups, chosen_exports)


def default_split(data: DataRecipe) -> str:
    """Return the split that a run is evaluated on by default: its test split if it has one, else validation."""
    return data.test_split or data.validation_split


def run_name(run: Path) -> str:
    """Return the name of a run in a report: its recipe's name, plus /best for the best weights, or the file's stem.

    Raises:
        UserError: the recipe cannot be read.
    """
    folder, home = run_places(run)
    if not (home / "recipe.yaml").is_file():
        return run.stem
    name = read_run_recipe(home).name
    return name if home == folder else f"{name}/{BEST}"


def _check_labels(clips: EvaluationClips, heads: Mapping[str, int], exports: Exports, has_corruptions: bool) -> bool:
    """Return True if some clip can be scored; checked in the index, before hours of prediction."""
    labelled = any(_is_labelled(clip.labels, heads) for clip in clips.clips)
    if not labelled and not exports.are_wanted:
        raise UserError(
            f"{clips.folder.where}: split '{clips.split}' has no labels, so nothing can be scored: request "
            "predictions (--predictions FILE.npz or --submission FORMAT FILE), or name another split with --split"
        )
    if not labelled and has_corruptions:
        raise UserError(
            f"{clips.folder.where}: split '{clips.split}' has no labels, and predictions are written with intact "
            "sensors only: leave out --corrupt"
        )
    return labelled


def _is_labelled(labels: Mapping[str, int | None], heads: Mapping[str, int]) -> bool:
    return all(labels.get(head) is not None for head in heads)


def check_folder(folder: Path, advice: str) -> None:
    """Check, before hours of work, that files can be written to a folder; the folder may not exist, and is not made.

    Raises:
        UserError: the folder cannot be written; the message ends with `advice`.
    """
    try:
        existing = next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing):  # a trial, since permissions alone do not tell
            pass
    except OSError as error:
        raise UserError(f"{folder}: the report cannot be written ({error.strerror}): {advice}") from None
