"""A run's weights on disk. (Where an encoder's starting weights come from: `starting_weights`.)

    runs/NAME/
      weights.safetensors    every parameter once, frozen encoders included
      model.yaml             the `ModelCard`: what to build before loading them
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import model_validator
from safetensors.torch import save_file

from karmma_dist.errors import UserError, masked
from karmma_dist.io.files import write_whole
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.weights import WEIGHTS, load_exactly, own_weights, read_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe, Recipe
from karmma_dist.settings import Settings, dump, read_tree, validate

CARD = "model.yaml"
"""File name of the weights' description."""


class ModelCard(Settings):
    """What a weights file is of."""

    run: str = ""
    """Name of the run that wrote it."""
    modalities: list[str]
    """Modalities, in the order of `present_BM`."""
    heads: dict[str, int]
    """Number of classes per head."""
    classes: dict[str, list[str]] = {}
    """Class names per head, in the order of their ids; may be left out."""
    model: ModelRecipe
    """Architecture."""
    inputs: InputRecipe
    """Sizes of the inputs."""

    @model_validator(mode="after")
    def _classes_fit_heads(self) -> ModelCard:
        for head, names in self.classes.items():
            if len(names) != self.heads.get(head):
                raise ValueError(f"classes of head '{head}': {len(names)} names for {self.heads.get(head)} classes")
        return self


def save_model(
    model: KarmmaModel,
    run_dir: Path,
    *,
    recipe: Recipe | None = None,
    classes: dict[str, list[str]] | None = None,
) -> None:
    """Write the weights and the card into `run_dir`; each file is whole or not there, the card comes last.

    Args:
        model: Its parameters must be whole on this rank; only one rank may call this.
        run_dir: Made if need be.
        recipe: The run, for its name.
        classes: Class names per head.
    """
    encoders = {modality: _without_secrets(model.recipe.encoders[modality]) for modality in model.modalities}
    card = ModelCard(
        run=recipe.name if recipe else "",
        modalities=list(model.modalities),
        heads=model.heads,
        classes=classes or {},
        model=model.recipe.model_copy(update={"encoders": encoders}),
        inputs=model.inputs,
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_whole(run_dir / CARD, dump(card).encode())


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[KarmmaModel, ModelCard]:
    """Build the model that a run saved, float32, in train mode but for frozen encoders. Global random state is kept.

    Args:
        path: Run folder, or a weights file with its model.yaml beside it.
        device: Where to.

    Raises:
        UserError: no weights, no card, or weights that are not of the model the card describes.
    """
    weights = own_weights(Path(path))
    card_path = weights.parent / CARD
    if not card_path.is_file():
        raise UserError(f"{weights}: no {CARD} beside it, so the model to build is unknown")
    card = validate(read_tree(card_path), ModelCard, str(card_path))
    with torch.random.fork_rng(devices=[]):
        model = KarmmaModel(card.model, card.inputs, card.modalities, card.heads)
    load_exactly(model, read_weights(weights), str(weights))
    return model.to(device), card


def _without_secrets(encoder: EncoderRecipe) -> EncoderRecipe:
    """Weights are handed on with their card: a password in the URL of the starting weights must not be."""
    return encoder.model_copy(update={"weights": encoder.weights and masked(encoder.weights)})
