"""Clips for a model that predicts one at a time: media files, packed like the shards, or keys in the shards.

A file is packed like the shards and read like any clip, so the model receives exactly the pixels and samples of an
evaluation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.errors import UserError, nearest
from karmma_dist.evaluation.predict.media import KEY, check_file, packed_media
from karmma_dist.evaluation.predict.prediction import Guess, Prediction, likeliest
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import HasClasses, ShardFolder, check_classes
from karmma_dist.shards.format import Clip, DamageError
from karmma_dist.streaming.reader import Sample, read_sample
from karmma_dist.streaming.views import evaluation_view, num_stored_frames


class ClipPredictor(ABC):
    """A model and the source of its clips.

    Args:
        modalities: The model's.
        classes: Its classes; without names, actions show class numbers.
        inputs: Sizes of the model's inputs.
        chosen: Modalities to use.
    """

    def __init__(
        self, modalities: Sequence[str], classes: HasClasses, inputs: InputRecipe, chosen: Sequence[str]
    ) -> None:
        self._modalities, self._classes, self._inputs, self._chosen = modalities, classes, inputs, chosen

    @abstractmethod
    def _open_shards(self) -> ShardFolder:
        """Open the shards of which clips are named by their keys."""

    @abstractmethod
    def _settings(self) -> Mapping[str, Any]:
        """Return the settings with which a media file is packed for the model."""

    @abstractmethod
    def _log_probs(
        self, sample: Sample, found: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield log-probabilities (C,) by head for each subset of modalities.

        Args:
            sample: The clip, with the arrays of `found`.
            found: Modalities of the clip.
            shown: Subsets of these.
        """

    def predict(
        self, clips: Sequence[str], start_s: float | None, stop_s: float | None, report: Report = silent
    ) -> list[Prediction]:
        """Predict the action in each clip. All clips are checked before minutes are spent on the first.

        Raises:
            UserError: a clip does not exist, a file cannot be read or has none of the model's modalities, or the shards
                have other classes than the model.
        """
        for clip in clips:
            self._check(clip)
        predictions: list[Prediction] = []
        for clip in clips:
            report("predict", len(predictions), len(clips))
            predictions.append(self._predict(clip, start_s, stop_s))
        report("predict", len(clips), len(clips))
        return predictions

    def _check(self, clip: str) -> None:
        if not clip:
            raise UserError("a clip has an empty name: name a media file, or a clip's key in the shards")
        if _is_file(clip):
            check_file(Path(clip))
        else:
            _stored(self._shards, clip)

    def _predict(self, clip: str, start_s: float | None, stop_s: float | None) -> Prediction:
        is_file = _is_file(clip)
        if not is_file and (start_s is not None or stop_s is not None):
            raise UserError(f"clip {clip}: --start and --stop apply to files only: clips in the shards are cut already")
        with self._opened(clip, is_file, start_s or 0.0, stop_s) as folder:
            stored, sample = self._read(folder, KEY if is_file else clip, clip)
            seconds = folder.metadata(stored).length_s
            labels = {} if is_file else folder.label_names(stored)
        found = [modality for modality in self._chosen if modality in sample.arrays]
        has = set(found) if is_file else {modality for modality in self._modalities if stored.has(modality)}
        return Prediction(
            clip=clip,
            seconds=round(seconds, 3),
            found=found,
            absent=[m for m in self._chosen if m not in has],
            switched_off=[m for m in self._modalities if m not in self._chosen],
            labels=labels,
            guesses=self._guesses(sample, found),
        )

    @cached_property
    def _opened_shards(self) -> ShardFolder:
        return self._open_shards()

    @cached_property
    def _shards(self) -> ShardFolder:
        """The shards, whose classes are the model's."""
        check_classes(self._classes, self._opened_shards)
        return self._opened_shards

    def _opened(
        self, clip: str, is_file: bool, start_s: float, stop_s: float | None
    ) -> AbstractContextManager[ShardFolder]:
        if is_file:
            return packed_media(Path(clip), self._settings(), self._chosen, start_s, stop_s)
        return nullcontext(self._shards)

    def _read(self, folder: ShardFolder, key: str, named: str) -> tuple[Clip, Sample]:
        """Return the clip, and its chosen modalities."""
        clip = _stored(folder, key)
        present = [modality for modality in self._chosen if clip.has(modality)]
        if not present:
            has = " and ".join(modality for modality in folder.modalities if clip.has(modality))
            raise UserError(f"{named}: the clip has {has}, but the model needs one of {', '.join(self._chosen)}")
        try:
            metadata = folder.metadata(clip)
            view = evaluation_view(self._inputs.video, num_stored_frames(metadata))
            return clip, read_sample(folder, clip, metadata, present, self._inputs, view)
        except DamageError as error:
            raise UserError(f"{folder.where}: {error}: pack it again") from None

    def _guesses(self, sample: Sample, found: list[str]) -> list[Guess]:
        shown = [[modality] for modality in found] + ([found] if len(found) > 1 else [])
        answers = self._log_probs(sample, found, shown)
        return [
            Guess(modalities, likeliest(log_probs, self._classes.classes))
            for modalities, log_probs in zip(shown, answers, strict=True)
        ]


def _stored(folder: ShardFolder, key: str) -> Clip:
    """Return the clip of a key."""
    clips = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    if key not in clips:
        raise UserError(f"{folder.where}: no clip '{key}', and no file of this name{nearest(key, list(clips))}")
    return clips[key]


def _is_file(clip: str) -> bool:
    """Return True if `clip` names a file: keys have neither dots nor slashes, so such a name means a file."""
    return Path(clip).exists() or "/" in clip or "." in clip
