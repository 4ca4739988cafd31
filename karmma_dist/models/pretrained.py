"""Weights on disk: a run's own, and starting weights for one encoder from a run or a published checkpoint.

    runs/NAME/
      weights.safetensors    every parameter once, frozen encoders included
      model.yaml             the `ModelCard`: what to build before loading them
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models.encoder import Encoder
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import InputRecipe, ModelRecipe, Recipe
from karmma_dist.settings import Settings, dump, read_tree, validate

WEIGHTS = "weights.safetensors"
"""File name of a run's weights."""
CARD = "model.yaml"
"""File name of their description."""

_SHOWN = 3


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
    encoders = {modality: model.recipe.encoders[modality] for modality in model.modalities}
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
    _write_whole(run_dir / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _write_whole(run_dir / CARD, lambda path: path.write_text(dump(card)))


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[KarmmaModel, ModelCard]:
    """Build the model that a run saved, float32, in train mode but for frozen encoders. Global random state is kept.

    Args:
        path: Run folder, or a weights file with its model.yaml beside it.
        device: Where to.

    Raises:
        UserError: no weights, no card, or weights that are not of the model the card describes.
    """
    weights = _own_weights(Path(path))
    card_path = weights.parent / CARD
    if not card_path.is_file():
        raise UserError(f"{weights}: no {CARD} beside it, so the model to build is unknown")
    card = validate(read_tree(card_path), ModelCard, str(card_path))
    with torch.random.fork_rng(devices=[]):
        model = KarmmaModel(card.model, card.inputs, card.modalities, card.heads)
    _load_exactly(model, _read_weights(weights), str(weights))
    return model.to(device), card


def load_encoder_weights(encoder: Encoder, modality: str, source: str) -> None:
    """Load starting weights into one encoder, in place and completely.

    Args:
        encoder: What `build_encoder` made.
        modality: Which encoder of a run to take. A run of one other modality gives its only encoder.
        source: Run folder, its weights.safetensors, or a published checkpoint of the encoder's architecture
            (.safetensors, .pth or .pt; see the encoder's `from_published`).

    Raises:
        UserError: nothing there, nothing that fits, or keys and shapes that are not the encoder's.
    """
    path = Path(source)
    state = _read_weights(_own_weights(path) if path.is_dir() or not path.exists() else path)
    if any(key.startswith("encoders.") for key in state):
        state = _encoder_of_run(state, modality, source)
    elif set(state) != set(encoder.state_dict()):
        try:
            state = encoder.from_published(state)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    _load_exactly(encoder, state, f"{source} (for the {modality} encoder)")


def _encoder_of_run(state: dict[str, Tensor], modality: str, source: str) -> dict[str, Tensor]:
    found = sorted({key.split(".")[1] for key in state if key.startswith("encoders.")})
    chosen = found[0] if len(found) == 1 else modality
    if chosen not in found:
        raise UserError(f"{source}: holds encoders for {', '.join(found)}, none for {modality}")
    prefix = f"encoders.{chosen}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _own_weights(path: Path) -> Path:
    """The weights file of a run folder, or `path` itself."""
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise UserError(f"{path}: holds no {WEIGHTS}: train that run to its end first")
        return path / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such run folder or weights file")
    return path


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A flat dictionary of tensors from .safetensors, or from what torch.save wrote."""
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: cannot be read as weights: {reason}") from None
    for nested in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(nested), dict):
            content = content[nested]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: cannot be read as weights: not a dictionary of tensors")
    return content


def _load_exactly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """`load_state_dict` that reports on one line and changes nothing unless every key and shape fits."""
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        parts = [f"{len(keys)} {what} ({_some(keys)})" for what, keys in
                 (("keys are missing", missing), ("keys are unknown", unexpected)) if keys]
        raise UserError(f"{where}: not weights of this architecture: {' and '.join(parts)}")
    other = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if state[key].shape != tensor.shape
    ]
    if other:
        raise UserError(f"{where}: weights of other sizes: {_some(other)}")
    module.load_state_dict(state)


def _some(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
