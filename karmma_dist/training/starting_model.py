"""The model a run starts from, by its seed and the weights its recipe names; and one in training, made whole."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from karmma_dist.download import is_url
from karmma_dist.models.encoder import Encoder
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.starting_weights import check_published, load_encoder_weights
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import Recipe
from karmma_dist.training.engine import Engine

_logger = logging.getLogger(__name__)


def build_model(
    recipe: Recipe, classes: dict[str, list[str]], report: Report = silent, is_main: bool = True
) -> KarmmaModel:
    """The recipe's model with its starting weights: a function of the recipe and the seed.

    `report` shows downloads; only the main rank says which weights did not carry over.
    """
    torch.manual_seed(recipe.seed)
    heads = {head: len(names) for head, names in classes.items()}
    model = KarmmaModel(recipe.model, recipe.inputs, recipe.modalities, heads)
    for modality in recipe.modalities:
        start = recipe.model.encoders[modality]
        encoder = model.encoders[modality]
        assert isinstance(encoder, Encoder)
        if start.weights is None and (start.weights_ignore or start.weights_sha256) and is_main:
            _logger.warning(
                "model.encoders.%s: weights_ignore and weights_sha256 have no effect without weights", modality
            )
        if start.weights is not None:
            source = start.weights
            if not is_url(source):
                found = recipe.find_run(source)
                if not found.exists():
                    check_published(Path(source), f"model.encoders.{modality}.weights")
                source = str(found)
            load_encoder_weights(
                encoder, modality, source, ignore=start.weights_ignore, sha256=start.weights_sha256,
                cache_dir=recipe.data.cache_dir, report=report, say=_logger.warning if is_main else _logger.debug,
            )  # fmt: skip
    return model


def whole_model(engine: Engine, recipe: Recipe, classes: dict[str, list[str]]) -> KarmmaModel:
    """The model in training, or under ZeRO-3 a whole copy of it. Every rank must call this.

    Its forward hooks would gather parameters layer by layer, which needs every rank to make the same calls; in
    validation a rank whose last batch is all padding makes none.
    """
    model = engine.model
    if recipe.training.zero_stage == 3:
        heads = {head: len(names) for head, names in classes.items()}
        model = KarmmaModel(recipe.model, recipe.inputs, recipe.modalities, heads)
        model.to(device=engine.device, dtype=engine.dtype).load_state_dict(engine.whole_state())
    assert isinstance(model, KarmmaModel)
    return model
