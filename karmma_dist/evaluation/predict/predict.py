"""Asks a trained model about clips: media files, or keys in the shards it was trained on.

    predictions = predict(Path("runs/epic_kitchens/distill"), ["kitchen.mp4", "P01_11_3"])

A file is packed as the shards were and streamed like any clip, so that the model is shown the very pixels and samples
that it would be shown in an evaluation. Legend: B = 1 clip, M modalities, C classes.
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
from karmma_dist.evaluation.plan import check_classes
from karmma_dist.evaluation.predict.media import KEY, check_file, packed_media
from karmma_dist.evaluation.scores import ranked
from karmma_dist.modalities import MODALITIES, letters, parse_modalities
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard, load_model
from karmma_dist.packing.inspect.inspect import label_names
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, read_run_recipe
from karmma_dist.runs.folder import run_places
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import EvaluationClips, open_shards
from karmma_dist.streaming.order import Slice
from karmma_dist.terminal import print_line, print_table


def print_predictions(predictions: list[Prediction]) -> None:
    """Print what was found in each clip, and the likeliest actions by each modality and by all."""
    for prediction in predictions:
        print_line(f"{prediction.clip} ({prediction.seconds:g} s): {_found(prediction)}")
        if prediction.labels and None not in prediction.labels.values():
            print_line(f"labelled: {' '.join(str(name) for name in prediction.labels.values())}")
        headings = [heading for guess in prediction.guesses for heading in ("%", f"{letters(guess.modalities)} says")]
        columns = [list(map(_cells, guess.actions)) for guess in prediction.guesses]
        lines = zip_longest(*columns, fillvalue=["", ""])
        print_table(headings, [list(chain.from_iterable(line)) for line in lines], right=["%"], footer=[""])


def _found(prediction: Prediction) -> str:
    """`found video (V), audio (A); no flow; switched off: detections`."""
    found = ", ".join(f"{name} ({MODALITIES[name].letter})" for name in prediction.found)
    parts = [f"found {found}", *(f"no {name}" for name in prediction.absent)]
    if prediction.switched_off:
        parts.append(f"switched off: {', '.join(prediction.switched_off)}")
    return "; ".join(parts)


def _cells(action: Action) -> list[str]:
    return [f"{100 * action.probability:.1f}", " ".join(action.names.values())]


NUM_ACTIONS = 5
"""Actions shown."""


@dataclass(frozen=True)
class Action:
    """One of the likeliest actions."""

    names: dict[str, str]
    """Class name per head, e.g. {"verb": "take", "noun": "cup"}."""
    classes: dict[str, int]
    """Class per head."""
    probability: float
    """Of the whole action: of several heads the product of their probabilities."""


@dataclass(frozen=True)
class Guess:
    """What the model says when it is given some modalities."""

    modalities: list[str]
    actions: list[Action]
    """Likeliest first."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one clip."""

    clip: str
    """The file or key as it was named."""
    seconds: float
    """The clip's length."""
    found: list[str]
    """Modalities of the model that the clip has and that are not switched off."""
    absent: list[str]
    """Modalities of the model that the clip lacks."""
    switched_off: list[str]
    """Modalities of the model that were not asked for."""
    labels: dict[str, str | None]
    """Class name per head that the shards say it is; empty for a file."""
    guesses: list[Guess]
    """One per modality found and, where there are several, all of them together, which comes last."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
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
    """Ask a trained model what is done in each clip.

    Args:
        run: Run folder, its best/, or weights file with its model.yaml beside it.
        clips: Media files, or keys of clips in the shards.
        shards: Shards folder, of the keys and of the settings that files are packed with; None: the run's own.
        start_s: Where the clip starts in its file; files only.
        stop_s: Where it ends.
        modalities: Only these, e.g. "V,A"; None: all of the model's.
        report: Progress.

    Raises:
        UserError: no such clip, a file that cannot be read or has nothing the model takes, or shards of other classes
            than the model's.
    """
    device = device_of(ALONE)
    model, card = load_model(run, device)
    model.eval()
    chosen = card.modalities if modalities is None else list(parse_modalities(modalities, card.modalities))
    data = _data(run, shards, card)
    predictor = _Predictor(model, card, data, chosen, device)
    predictor.check(clips)
    predictions: list[Prediction] = []
    for clip in clips:
        report("predict", len(predictions), len(clips))
        predictions.append(predictor.predict(clip, start_s, stop_s))
    report("predict", len(clips), len(clips))
    return predictions


class _Predictor:
    """A loaded model and where its clips come from."""

    def __init__(
        self, model: KarmmaModel, card: ModelCard, data: DataRecipe | None, chosen: list[str], device: torch.device
    ) -> None:
        self._model, self._card, self._data, self._chosen, self._device = model, card, data, chosen, device
        self._folder: ShardFolder | None = None

    def check(self, clips: Sequence[str]) -> None:
        """See that every clip is there, before minutes are spent on the first.

        Raises:
            UserError: one is not.
        """
        for clip in clips:
            if not clip:
                raise UserError("a clip without a name: name a media file, or a clip's key in the shards")
            if _is_file(clip):
                check_file(Path(clip))
            else:
                self._stored(self._shards(), clip)

    def predict(self, clip: str, start_s: float | None, stop_s: float | None) -> Prediction:
        """One clip."""
        is_file = _is_file(clip)
        if not is_file and (start_s is not None or stop_s is not None):
            raise UserError(f"clip {clip}: --start and --stop cut files; a clip of the shards is cut already")
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
            raise UserError("no recipe.yaml beside the weights, so name the shards of the clips with --shards DIR")
        if self._folder is None:
            self._folder = open_shards(self._data)
        check_classes(self._card, self._folder)
        return self._folder

    def _settings(self) -> dict[str, Any]:
        """How the clips were packed that the model was trained on."""
        try:
            settings = self._shards().manifest.header.settings
        except UserError as error:
            if self._folder is not None:
                raise
            raise UserError(
                f"{error}: they say how a file is to be cut and stored so that the model knows it: name them with "
                "--shards DIR (its manifest.json is enough)"
            ) from None
        return settings

    def _stored(self, folder: ShardFolder, key: str) -> tuple[str, Clip]:
        """The clip of this key and its split."""
        every = {clip.key: (split, clip) for split in folder.splits for clip in folder.clips(split)}
        if key not in every:
            raise UserError(f"{folder.where}: no clip '{key}', nor a file of this name{nearest(key, list(every))}")
        return every[key]

    def _read(self, folder: ShardFolder, key: str, named: str) -> tuple[Clip, Batch]:
        """The clip and its batch of one, with the chosen modalities that it has."""
        split, clip = self._stored(folder, key)
        there = [modality for modality in self._chosen if clip.has(modality)]
        if not there:
            has = " and ".join(modality for modality in folder.modalities if clip.has(modality))
            raise UserError(f"{named}: it has {has}, but the model is to be given {', '.join(self._chosen)}")
        data = DataRecipe(shards=str(folder.root), modalities=there)
        clips = EvaluationClips(folder, data, self._card.inputs, split)
        place = next(place for place, of in enumerate(clips.clips) if of.key == key)
        batch = clips.batch(Slice(0, 0, place, place + 1))
        if batch.damage:
            raise UserError(f"{folder.where}: {batch.damage[0]}: pack it again")
        return clip, batch

    @torch.no_grad()
    def _guesses(self, batch: Batch, found: list[str]) -> list[Guess]:
        """Each encoder runs once, the fusion block once per guess."""
        inputs = prepare(batch, self._card.inputs, self._device).inputs
        tokens = self._model.encode(inputs, self._flags(found))
        shown = [[modality] for modality in found] + ([found] if len(found) > 1 else [])
        guesses = []
        for modalities in shown:
            logits = self._model.fuse(tokens, self._flags(found), self._flags(modalities))
            log_probs = {head: torch.log_softmax(of[0].double(), dim=0).cpu() for head, of in logits.items()}
            guesses.append(Guess(modalities, likeliest(log_probs, self._card.classes)))
        return guesses

    def _flags(self, modalities: list[str]) -> Tensor:
        return torch.tensor([[name in modalities for name in self._model.modalities]], device=self._device)


def likeliest(
    log_probs: dict[str, Tensor], classes: dict[str, list[str]], num: int = NUM_ACTIONS
) -> list[Action]:
    """The `num` likeliest actions, given log-probabilities (C,) per head and class names, which may be missing.

    Raises:
        UserError: a prediction is not a number.
    """
    heads = ranked(list(log_probs))["action"]
    sizes = [len(log_probs[head]) for head in heads]
    joint = torch.zeros(())
    for head in heads:
        joint = joint[..., None] + log_probs[head]
    if bool(joint.isnan().any()):
        raise UserError("the model predicts nan: the weights diverged; use an earlier checkpoint")
    # Stable: of equals the lower class comes first, as in the evaluation's ranks.
    values, places = joint.flatten().sort(descending=True, stable=True)
    actions = []
    for value, place in zip(values[:num].tolist(), places[:num].tolist(), strict=True):
        numbers = [int(n) for n in torch.unravel_index(torch.tensor(place), sizes)]
        chosen = dict(zip(heads, numbers, strict=True))
        names = {head: classes[head][n] if classes.get(head) else str(n) for head, n in chosen.items()}
        actions.append(Action(names, chosen, float(torch.tensor(value).exp())))
    return actions


def _data(run: Path, shards: str | None, card: ModelCard) -> DataRecipe | None:
    """Where the run's clips are, or None where nothing says so."""
    _, home = run_places(run)
    if (home / "recipe.yaml").is_file():
        data = read_run_recipe(home).data
        return data.model_copy(update={"shards": shards or data.shards, "modalities": list(card.modalities)})
    return None if shards is None else DataRecipe(shards=shards, modalities=card.modalities)


def _is_file(clip: str) -> bool:
    """Keys have neither dots nor slashes, so that what has one is meant as a file even where there is none."""
    return Path(clip).exists() or "/" in clip or "." in clip
