"""Predictions of a trained model for single clips: media files, or keys in the shards it was trained on.

    predictions = predict(Path("runs/epic_kitchens/distill"), ["kitchen.mp4", "P01_11_3"])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import ALONE
from karmma_dist.errors import UserError
from karmma_dist.evaluation.datasets import choose_dataset
from karmma_dist.evaluation.predict.clips import ClipPredictor
from karmma_dist.evaluation.predict.prediction import Prediction
from karmma_dist.modalities import parse_modalities
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import ModelCard, load_model
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, data_of, read_run_recipe
from karmma_dist.runs.folder import run_places
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import collate, prepare
from karmma_dist.streaming.loader import open_shards
from karmma_dist.streaming.reader import Sample


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
    data, folder = run_data(run, shards, card), None
    if data is not None and data.mixture:
        dataset = choose_dataset(model, card, data, shards)
        model, card, data, folder = dataset.model, dataset.card, dataset.data, dataset.folder
    return _RunPredictor(model, card, data, chosen, device, folder).predict(clips, start_s, stop_s, report)


class _RunPredictor(ClipPredictor):
    """A run's model and the source of its clips."""

    def __init__(
        self, model: KarmmaModel, card: ModelCard, data: DataRecipe | None, chosen: list[str], device: torch.device,
        folder: ShardFolder | None = None,
    ) -> None:  # fmt: skip
        super().__init__(card.modalities, card, card.inputs, chosen)
        self._model, self._card, self._data, self._device, self._folder = model, card, data, device, folder

    def _open_shards(self) -> ShardFolder:
        if self._data is None:
            raise UserError("no recipe.yaml with the weights: name the shards of the clips with --shards DIR")
        if self._folder is not None:
            return self._folder
        (folder,) = open_shards(self._data).folders
        return folder

    def _settings(self) -> dict[str, Any]:
        """Return the packing settings of the clips that the model was trained on."""
        try:
            self._opened_shards  # noqa: B018 - opens them
        except UserError as error:
            raise UserError(
                f"{error}: the shards hold the settings with which a file is packed for the model: name the shards "
                "with --shards DIR (its manifest.json is enough)"
            ) from None
        return self._shards.manifest.header.settings

    @torch.no_grad()
    def _log_probs(
        self, sample: Sample, found: Sequence[str], shown: Sequence[Sequence[str]]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Run each encoder once, and the fusion block once per subset."""
        inputs = prepare(collate([sample], found, ()), self._card.inputs, self._device).inputs
        tokens = self._model.encode(inputs, self._flags(found))
        for modalities in shown:
            logits = self._model.fuse(tokens, self._flags(found), self._flags(modalities))
            yield {
                head: torch.log_softmax(logits_BC[0].double(), dim=0).cpu().numpy()
                for head, logits_BC in logits.items()
            }

    def _flags(self, modalities: Sequence[str]) -> Tensor:
        return torch.tensor([[name in modalities for name in self._model.modalities]], device=self._device)


def run_data(run: Path, shards: str | None, card: ModelCard) -> DataRecipe | None:
    """Return the data of the run's clips, or None if neither a recipe nor `shards` names them."""
    _, home = run_places(run)
    if (home / "recipe.yaml").is_file():
        data = read_run_recipe(home).data
        named = {} if data.mixture else {"shards": shards or data.shards}
        return data.model_copy(update={**named, "modalities": list(card.modalities)})
    return None if shards is None else data_of(shards, card.modalities)
