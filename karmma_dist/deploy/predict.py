"""Predictions of an exported model for single clips: media files, or keys in shards; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.deploy.runtime import Runtime
from karmma_dist.errors import UserError
from karmma_dist.evaluation.predict.clips import ClipPredictor
from karmma_dist.evaluation.predict.prediction import Prediction
from karmma_dist.modalities import MODALITIES, parse_modalities
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import InputRecipe, data_of
from karmma_dist.settings import validate
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.remote import open_folder
from karmma_dist.streaming.reader import Sample


def predict_exported(
    path: Path,
    clips: Sequence[str],
    *,
    shards: str | None = None,
    start_s: float | None = None,
    stop_s: float | None = None,
    modalities: str | None = None,
    report: Report = silent,
) -> list[Prediction]:
    """Predict the action in each clip with a file that `karmma-dist export` wrote, as `predict` does with its run.

    Args:
        path: The file.
        clips: Media files, or keys of clips in the shards.
        shards: Shards folder, for the keys; media files are packed with its settings instead of those in the file.
        start_s: Start of the clip in its file, in seconds; media files only.
        stop_s: End of the clip in its file, in seconds; media files only.
        modalities: Modalities to use, e.g. "V,A"; None: all of the model's.
        report: Called with the progress.

    Raises:
        UserError: the file cannot be used, a clip does not exist, cannot be read or has none of the model's modalities,
            or the shards have other classes than the model.
    """
    runtime = Runtime.open(path)
    names = [each.modality for each in runtime.header.modalities]
    if unknown := [name for name in names if name not in MODALITIES]:
        raise UserError(f"{path}: its modality '{unknown[0]}' is that of a package that is not installed here")
    chosen = names if modalities is None else list(parse_modalities(modalities, names))
    return _ExportedPredictor(path, runtime, names, chosen, shards).predict(clips, start_s, stop_s, report)


class _ExportedPredictor(ClipPredictor):
    """An exported model and the source of its clips."""

    def __init__(
        self, path: Path, runtime: Runtime, modalities: Sequence[str], chosen: Sequence[str], shards: str | None
    ) -> None:
        inputs = validate(runtime.header.inputs, InputRecipe, f"{path}: inputs")
        super().__init__(modalities, runtime.header, inputs, chosen)
        self._path, self._runtime, self._named = path, runtime, shards

    def _open_shards(self) -> ShardFolder:
        if self._named is None:
            raise UserError(f"{self._path}: it knows no shards: name those of the clips with --shards DIR")
        return open_folder(data_of(self._named, self._modalities))

    def _settings(self) -> Mapping[str, Any]:
        if self._named is not None:
            return self._shards.manifest.header.settings
        if self._runtime.header.packing is None:
            raise UserError(
                f"{self._path}: it was exported without the settings with which a media file is packed for the model: "
                "name shards that have them with --shards DIR (its manifest.json is enough)"
            )
        return self._runtime.header.packing

    def _log_probs(
        self, sample: Sample, found: Sequence[str], shown: Sequence[Sequence[str]]  # noqa: ARG002 - as in `sample`
    ) -> Iterator[dict[str, np.ndarray]]:
        for modalities in shown:
            logits = self._runtime.logits({name: sample.arrays[name] for name in modalities})
            yield {head: _log_softmax(logits_C.astype(np.float64)) for head, logits_C in logits.items()}


def _log_softmax(logits_C: np.ndarray) -> np.ndarray:
    shifted = logits_C - logits_C.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
