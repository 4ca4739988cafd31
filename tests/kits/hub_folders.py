"""Pixels, and folders of the Hugging Face hub to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from karmma_dist.models.encoders.pretrained.video import IMAGENET
from karmma_dist.recipe import InputRecipe

SIDE = 32
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}
WEIGHTS = "model.safetensors"


def inputs_of(num_frames: int = 4, crop: int = SIDE) -> InputRecipe:
    return InputRecipe.model_validate({"video": {"num_frames": num_frames, "crop": crop, "short_side": crop}})


def pixels_of(num_clips: int, num_frames: int = 4, side: int = SIDE) -> Tensor:
    """Return pixels (N, F, 3, S, S) in [0, 1]."""
    torch.manual_seed(1)
    return torch.rand(num_clips, num_frames, 3, side, side)


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def imagenet(pixels: Tensor) -> Tensor:
    return normalised(pixels, IMAGENET.mean, IMAGENET.std)


def tensor_of(pixels: Tensor) -> Tensor:
    """Return pixels (N, F, 3, S, S) as an encoder gets them: (N, 3, F, S, S), ImageNet-normalised."""
    return imagenet(pixels).transpose(1, 2)


def change(folder: Path, change_state: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's weights."""
    state = load_file(folder / WEIGHTS)
    change_state(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
