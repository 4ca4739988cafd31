"""Predictions of a trained model for single clips: media files, or keys in the shards it was trained on.

    predictions = predict(Path("runs/epic_kitchens/distill"), ["kitchen.mp4", "P01_11_3"])

A file is packed like the shards and streamed like any clip, so the model receives exactly the pixels and samples of an
evaluation. Legend: B = 1 clip, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import ALONE
from karmma_dist.errors import UserError, nearest
from karmma_dist.evaluation.datasets import choose_dataset
from karmma_dist.evaluation.plan import check_classes
from karmma_dist.evaluation.predict.media import KEY, check_file, packed_media
from karmma_dist.evaluation.scores import ranked
from karmma_dist.modalities import MODALITIES, letters, parse_modalities
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard, load_model
from karmma_dist.packing.inspect.inspect import label_names
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, data_of, read_run_recipe
from karmma_dist.runs.folder import run_places
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import EvaluationClips, open_shards
from karmma_dist.streaming.order import Slice
from karmma_dist.terminal import print_line, print_table


def print_predictions(predictions: list[Prediction]) -> None:
    """Print the modalities of each clip, and the most probable actions by each modality and by all together."""
    for prediction in predictions:
        print_line(f"{prediction.clip} ({prediction.seconds:g} s): {_found(prediction)}")
        if prediction.labels and None not in prediction.labels.values():
            print_line(f"labelled: {' '.join(str(name) for name in prediction.labels.values())}")
        headings = [heading for guess in prediction.guesses for heading in ("%", f"{letters(guess.modalities)} says")]
        columns = [list(map(_cells, guess.actions)) for guess in prediction.guesses]
        lines = zip_longest(*columns, fillvalue=["", ""])
        print_table(headings, [list(chain.from_iterable(line)) for line in lines], right=["%"], footer=[""])


def _found(prediction: Prediction) -> str:
    """Return the modalities in words: `found video (V), audio (A); no flow; switched off: detections`."""
    found = ", ".join(f"{name} ({MODALITIES[name].letter})" for name in prediction.found)
    parts = [f"found {found}", *(f"no {name}" for name in prediction.absent)]
    if prediction.switched_off:
        parts.append(f"switched off: {', '.join(prediction.switched_off)}")
    return "; ".join(parts)


def _cells(action: Action) -> list[str]:
    return [f"{100 * action.probability:.1f}", " ".join(action.names.values())]


NUM_ACTIONS = 5
"""Number of actions shown."""


@dataclass(frozen=True)
class Action:
    """One of the most probable actions."""

    names: dict[str, str]
    """Class name per head, e.g. {"verb": "take", "noun": "cup"}."""
    classes: dict[str, int]
    """Class per head."""
    probability: float
    """Probability of the action; for several heads the product of their probabilities."""


@dataclass(frozen=True)
class Guess:
    """The model's prediction from some of the modalities."""

    modalities: list[str]
    actions: list[Action]
    """Most probable actions, in descending order."""


@dataclass(frozen=True)
class Prediction:
    """All predictions for one clip."""

    clip: str
    """File or key, as the caller named it."""
    seconds: float
    """Length of the clip."""
    found: list[str]
    """Modalities of the model that the clip has and that are not switched off."""
    absent: list[str]
    """Modalities of the model that the clip lacks."""
    switched_off: list[str]
    """Modalities of the model that were not requested."""
    labels: dict[str, str | None]
    """True class name per head, from the shards; empty for a file."""
    guesses: list[Guess]
    """One guess per modality found and, for several modalities, a last one from all of them together."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return asdict(self)


def predict(
    run: Path,
    clips: Sequence[str],
    *,
    shards: str | None = None,
    start_s: float | None = None,
    stop_s: float | None = None,
    modalities: str | None = None,
    report: Report = silent,
) -> list[Prediction]:
    """Predict the action in each clip with a trained model.

    Args:
        run: Run folder, its best/ folder, or a weights file with a model.yaml in the same folder.
        clips: Media files, or keys of clips in the shards.
        shards: Shards folder, for the keys and for the settings with which files are packed; None: the run's own.
        start_s: Start of the clip in its file, in seconds; files only.
        stop_s: End of the clip in its file, in seconds; files only.
        modalities: Modalities to use, e.g. "V,A"; None: all of the model's.
        report: Called with the progress.

    Raises:
        UserError: a clip does not exist, a file cannot be read or has none of the model's modalities, or the shards
            have other classes than the model.
    """
    device = device_of(ALONE)
    model, card = load_model(run, device)
    model.eval()
    chosen = card.modalities if modalities is None else list(parse_modalities(modalities, card.modalities))
    data, folder = _data(run, shards, card), None
    if data is not None and data.mixture:
        dataset = choose_dataset(model, card, data, shards)
        model, card, data, folder = dataset.model, dataset.card, dataset.data, dataset.folder
    predictor = _Predictor(model, card, data, chosen, device, folder)
    predictor.check(clips)
    predictions: list[Prediction] = []
    for clip in clips:
        report("predict", len(predictions), len(clips))
        predictions.append(predictor.predict(clip, start_s, stop_s))
    report("predict", len(clips), len(clips))
    return predictions


class _Predictor:
    """A loaded model and the source of its clips."""

    def __init__(
        self, model: KarmmaModel, card: ModelCard, data: DataRecipe | None, chosen: list[str], device: torch.device,
        folder: ShardFolder | None = None,
    ) -> None:  # fmt: skip
        self._model, self._card, self._data, self._chosen, self._device = model, card, data, chosen, device
        self._folder = folder

    def check(self, clips: Sequence[str]) -> None:
        """Check that every clip exists, before minutes are spent on the first.

        Raises:
            UserError: a clip does not exist.
        """
        for clip in clips:
            if not clip:
                raise UserError("a clip has an empty name: name a media file, or a clip's key in the shards")
            if _is_file(clip):
                check_file(Path(clip))
            else:
                self._stored(self._shards(), clip)

    def predict(self, clip: str, start_s: float | None, stop_s: float | None) -> Prediction:
        """Predict the action in one clip."""
        is_file = _is_file(clip)
        if not is_file and (start_s is not None or stop_s is not None):
            raise UserError(f"clip {clip}: --start and --stop apply to files only: clips in the shards are cut already")
        with self._opened(clip, is_file, start_s or 0.0, stop_s) as folder:
            stored, batch = self._read(folder, KEY if is_file else clip, clip)
            seconds = folder.metadata(stored).length_s
            labels = {} if is_file else label_names(folder, stored)
        found = [modality for modality in self._chosen if modality in batch.inputs]
        has = set(found) if is_file else {modality for modality in self._card.modalities if stored.has(modality)}
        return Prediction(
            clip=clip,
            seconds=round(seconds, 3),
            found=found,
            absent=[m for m in self._chosen if m not in has],
            switched_off=[m for m in self._card.modalities if m not in self._chosen],
            labels=labels,
            guesses=self._guesses(batch, found),
        )

    def _opened(
        self, clip: str, is_file: bool, start_s: float, stop_s: float | None
    ) -> AbstractContextManager[ShardFolder]:
        if is_file:
            return packed_media(Path(clip), self._settings(), self._chosen, start_s, stop_s)
        return nullcontext(self._shards())

    def _shards(self) -> ShardFolder:
        if self._data is None:
            raise UserError("no recipe.yaml with the weights: name the shards of the clips with --shards DIR")
        if self._folder is None:
            (self._folder,) = open_shards(self._data).folders
        check_classes(self._card, self._folder)
        return self._folder

    def _settings(self) -> dict[str, Any]:
        """Return the packing settings of the clips that the model was trained on."""
        try:
            settings = self._shards().manifest.header.settings
        except UserError as error:
            if self._folder is not None:
                raise
            raise UserError(
                f"{error}: the shards hold the settings with which a file is packed for the model: name the shards "
                "with --shards DIR (its manifest.json is enough)"
            ) from None
        return settings

    def _stored(self, folder: ShardFolder, key: str) -> tuple[str, Clip]:
        """Return the split and the clip of a key."""
        clips = {clip.key: (split, clip) for split in folder.splits for clip in folder.clips(split)}
        if key not in clips:
            raise UserError(f"{folder.where}: no clip '{key}', and no file of this name{nearest(key, list(clips))}")
        return clips[key]

    def _read(self, folder: ShardFolder, key: str, named: str) -> tuple[Clip, Batch]:
        """Return the clip, and a batch of one with its chosen modalities."""
        split, clip = self._stored(folder, key)
        present = [modality for modality in self._chosen if clip.has(modality)]
        if not present:
            has = " and ".join(modality for modality in folder.modalities if clip.has(modality))
            raise UserError(f"{named}: the clip has {has}, but the model needs one of {', '.join(self._chosen)}")
        data = data_of(str(folder.root), present)
        clips = EvaluationClips(folder, data, self._card.inputs, split)
        place = next(place for place, other in enumerate(clips.clips) if other.key == key)
        batch = clips.batch(Slice(0, 0, place, place + 1))
        if batch.damage:
            raise UserError(f"{folder.where}: {batch.damage[0]}: pack it again")
        return clip, batch

    @torch.no_grad()
    def _guesses(self, batch: Batch, found: list[str]) -> list[Guess]:
        """Run each encoder once, and the fusion block once per guess."""
        inputs = prepare(batch, self._card.inputs, self._device).inputs
        tokens = self._model.encode(inputs, self._flags(found))
        shown = [[modality] for modality in found] + ([found] if len(found) > 1 else [])
        guesses = []
        for modalities in shown:
            logits = self._model.fuse(tokens, self._flags(found), self._flags(modalities))
            log_probs = {
                head: torch.log_softmax(logits_BC[0].double(), dim=0).cpu() for head, logits_BC in logits.items()
            }
            guesses.append(Guess(modalities, likeliest(log_probs, self._card.classes)))
        return guesses

    def _flags(self, modalities: list[str]) -> Tensor:
        return torch.tensor([[name in modalities for name in self._model.modalities]], device=self._device)


def likeliest(
    log_probs: dict[str, Tensor], classes: dict[str, list[str]], num: int = NUM_ACTIONS
) -> list[Action]:
    """Return the `num` most probable actions.

    Args:
        log_probs: Log-probabilities (C,) per head.
        classes: Class names per head; without names, actions show class numbers.
        num: Number of actions.

    Raises:
        UserError: a prediction is NaN.
    """
    heads = ranked(list(log_probs))["action"]
    sizes = [len(log_probs[head]) for head in heads]
    joint = torch.zeros(())
    for head in heads:
        joint = joint[..., None] + log_probs[head]
    if bool(joint.isnan().any()):
        raise UserError("the model predicts nan: the weights diverged; use an earlier checkpoint")
    # A stable sort puts the lower class first among equals, as the evaluation's ranks do.
    values, places = joint.flatten().sort(descending=True, stable=True)
    actions = []
    for value, place in zip(values[:num].tolist(), places[:num].tolist(), strict=True):
        numbers = [int(n) for n in torch.unravel_index(torch.tensor(place), sizes)]
        chosen = dict(zip(heads, numbers, strict=True))
        names = {head: classes[head][n] if classes.get(head) else str(n) for head, n in chosen.items()}
        actions.append(Action(names, chosen, float(torch.tensor(value).exp())))
    return actions


def _data(run: Path, shards: str | None, card: ModelCard) -> DataRecipe | None:
    """Return the data of the run's clips, or None if neither a recipe nor `shards` names them."""
    _, home = run_places(run)
    if (home / "recipe.yaml").is_file():
        data = read_run_recipe(home).data
        named = {} if data.mixture else {"shards": shards or data.shards}
        return data.model_copy(update={**named, "modalities": list(card.modalities)})
    return None if shards is None else data_of(shards, card.modalities)


def _is_file(clip: str) -> bool:
    """Return True if `clip` names a file: keys have neither dots nor slashes, so such a name means a file."""
    return Path(clip).exists() or "/" in clip or "." in clip
