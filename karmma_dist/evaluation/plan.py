"""What an evaluation is going to be of, and whether it can be: all that is known before the first clip is read."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.exports.exports import Exports
from karmma_dist.evaluation.groups import Groups, participants, read_groups
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard, load_model
from karmma_dist.recipe import DataRecipe, ViewsRecipe, read_run_recipe
from karmma_dist.runs.folder import BEST, run_places
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.loader import EvaluationClips, open_shards

Choose = Callable[[Sequence[str]], list[Condition]]
"""Given a model's modalities, what is there at inference."""


@dataclass(frozen=True)
class Plan:
    """An evaluation that nothing speaks against but clips that cannot be read."""

    name: str
    """The run's name, or the weights file's."""
    folder: Path
    """Where its results and report go."""
    model: KarmmaModel
    """On the CPU."""
    clips: EvaluationClips
    """Those of the split that the model can be shown, and their views."""
    conditions: list[Condition]
    batch_size: int
    groups: Groups | None
    exports: Exports

    @property
    def scored_keys(self) -> list[str]:
        """Keys of the clips that the figures are of, in their order, unless some cannot be read."""
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
        run: Run folder, its best/, or weights file with its model.yaml beside it.
        conditions: Given the model's modalities, what is there at inference.
        shards: Shards folder; None: the run's own.
        split: Split; None: the run's test split if it has one, else its validation split.
        batch_size: Clips per batch; None: the recipe's. The answers do not depend on it.
        num_workers: Decoding processes; None: the recipe's.
        annotations: Folder with the lists of rare classes and unseen participants; None: the recipe's, if it has one.
        views: Views of each clip, averaged; None: the recipe's.
        exports: Predictions and submissions to make, with whole sensors. A split without labels yields these alone:
            no rows.
        out: Folder that results and report are for; None: eval/ beside the weights.

    Raises:
        UserError: no weights, no shards, shards of other classes than the model's, a split or modality that does not
            exist, a split without labels and nothing to export or a sensor to break, something that cannot be
            exported, or a folder that cannot be written.
    """
    model, card = load_model(run)
    places, home = run_places(run)
    recipe = read_run_recipe(home) if (home / "recipe.yaml").is_file() else None
    if recipe is None and shards is None:
        raise UserError(f"{places}: no recipe.yaml beside the weights, so name the shards with --shards DIR")
    base = recipe.data if recipe else DataRecipe(shards=str(shards), modalities=list(card.modalities))
    changes = {"shards": shards, "validation_split": split or default_split(base), "num_workers": num_workers}
    known = {name: value for name, value in changes.items() if value is not None}
    # A student may take fewer modalities than the clips that it was trained with brought.
    data = base.model_copy(update={**known, "modalities": list(card.modalities)})
    if data.drop_nouns and "noun" not in model.heads:
        raise UserError(
            f"{home}/recipe.yaml: data.drop_nouns is set, but the model has no head 'noun' "
            f"(it has {', '.join(model.heads)}): leave it out"
        )
    looks = views or (recipe.evaluation.views if recipe else ViewsRecipe())
    wanted = exports or Exports()
    chosen = conditions(model.modalities)
    whole = [condition for condition in chosen if condition.corrupt is None]
    wanted.check(card.heads, whole)
    shard_folder = open_shards(data)
    check_classes(card, shard_folder)
    clips = EvaluationClips(shard_folder, data, card.inputs, data.validation_split, looks)
    folder = places / "eval" if out is None else out
    if _check_labels(clips, card.heads, wanted, breaks=len(whole) < len(chosen)):
        check_folder(folder, "give another with --out" if out is None else "name another folder")
    wanted.check_clips(shard_folder.clips(data.validation_split), whole[0].modalities)
    lists = annotations or (recipe.evaluation.annotations if recipe else None)
    groups = read_groups(Path(lists), model.heads, participants(shard_folder, clips.clips)) if lists else None
    size = batch_size or (recipe.evaluation.batch_size if recipe else 16)
    return Plan(run_name(run), folder, model, clips, chosen, size, groups, wanted)


def default_split(data: DataRecipe) -> str:
    """Return the split that a run is evaluated on unless another is named: its test split if it has one."""
    return data.test_split or data.validation_split


def run_name(run: Path) -> str:
    """What a run is called in a report: as in its recipe, with /best for its best weights, or as its weights file.

    Raises:
        UserError: its recipe cannot be read.
    """
    folder, home = run_places(run)
    if not (home / "recipe.yaml").is_file():
        return run.stem
    name = read_run_recipe(home).name
    return name if home == folder else f"{name}/{BEST}"


def check_classes(card: ModelCard, folder: ShardFolder) -> None:
    """A class is a number to the model: it must mean the same in the shards.

    Raises:
        UserError: it does not.
    """
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
        raise UserError(f"{folder.where}: {what}: name shards of the model's own dataset")


def _check_labels(clips: EvaluationClips, heads: Mapping[str, int], exports: Exports, breaks: bool) -> bool:
    """Whether there is something to score; found in the index, before hours of prediction."""
    labelled = any(_is_labelled(clip.labels, heads) for clip in clips.clips)
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
    return labelled


def _is_labelled(labels: Mapping[str, int | None], heads: Mapping[str, int]) -> bool:
    return all(labels.get(head) is not None for head in heads)


def check_folder(folder: Path, advice: str) -> None:
    """Check, before hours of work, that files can be put into a folder that may not be there yet; it is not made.

    Raises:
        UserError: they cannot; ends with `advice`.
    """
    try:
        place = next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=place):  # tried, since permissions alone do not tell
            pass
    except OSError as error:
        raise UserError(f"{folder}: no report can be written there ({error.strerror}): {advice}") from None
