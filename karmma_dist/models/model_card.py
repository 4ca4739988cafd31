"""A run's weights on disk, and the card that describes them. The starting weights of encoders are in `weights.py`.

    runs/NAME/
      weights.safetensors    every parameter once, frozen encoders included
      model.yaml             the `ModelCard`: the model to build before loading them
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import model_validator
from safetensors.torch import save_file
from torch import Tensor

from karmma_dist.errors import UserError, masked
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_whole
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.weights import WEIGHTS, load_exactly, own_weights, read_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe, Recipe
from karmma_dist.settings import Positive, Settings, dump, read_tree, validate

CARD = "model.yaml"
"""File name of the weights' description."""
_MOST_BYTES = 32 << 20
"""Bytes of a description: it may name a hundred thousand classes."""


class ModelCard(Settings):
    """The description of the model whose weights are in a file."""

    run: str = ""
    """Name of the run that wrote the weights."""
    modalities: list[str]
    """Modalities, in the order of `present_BM`."""
    heads: dict[str, Positive]
    """Number of classes by head."""
    classes: dict[str, list[str]] = {}
    """Class names by head, in the order of their ids; may be left out."""
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


def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    return next((name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())), None)


def save_model(
    model: KarmmaModel,
    run_dir: Path,
    *,
    recipe: Recipe | None = None,
    classes: dict[str, list[str]] | None = None,
) -> None:
    """Write the weights and then the card into `run_dir`; each file is complete or absent. Only one rank may call this.

    Args:
        model: Model whose parameters are complete on this rank.
        run_dir: Run folder, created if needed.
        recipe: Recipe of the run, for its name.
        classes: Class names by head.

    Raises:
        UserError: a parameter is not finite; the earlier files stay as they are.
    """
    if (name := find_nonfinite(model.named_parameters())) is not None:
        raise UserError(
            f"{run_dir / WEIGHTS}: not saved, since the model has diverged: '{name}' holds NaN or infinity (an earlier "
            "file stays as it is): lower optimizer.lr, and start over with --resume never"
        )
    encoders = {modality: _published(model.recipe.encoders[modality]) for modality in model.modalities}
    card = ModelCard(
        run=recipe.name if recipe else "",
        modalities=list(model.modalities),
        heads=model.heads,
        classes=classes or {},
        model=model.recipe.model_copy(update={"encoders": encoders}),
        inputs=model.inputs,
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    make_folder(run_dir)
    write_whole(run_dir / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    write_whole(run_dir / CARD, dump(card).encode())


def read_card(path: Path) -> ModelCard:
    """Read the description of a model.

    Raises:
        UserError: the file cannot be read, or is no such description.
    """
    return validate(read_tree(path, limit=_MOST_BYTES), ModelCard, str(path))


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[KarmmaModel, ModelCard]:
    """Build the model that a run saved, float32, in train mode except frozen encoders. Global random state is kept.

    Args:
        path: Run folder, or a weights file with its model.yaml in the same folder.
        device: Device of the model.

    Raises:
        UserError: the weights or the card are missing, or the weights do not fit the card's model.
    """
    weights = own_weights(Path(path))
    card_path = weights.parent / CARD
    if not card_path.is_file():
        raise UserError(f"{weights}: no {CARD} in its folder, so the model to build is unknown")
    card = read_card(card_path)
    with torch.random.fork_rng(devices=[]):
        model = KarmmaModel(card.model, card.inputs, card.modalities, card.heads)
    load_exactly(model, read_weights(weights), str(weights))
    return model.to(device), card


def _published(encoder: EncoderRecipe) -> EncoderRecipe:
    """Return an encoder's recipe without a memory, which is of its run, and without the passwords of a URL."""
    return encoder.model_copy(update={"weights": encoder.weights and masked(encoder.weights), "memory": None})
