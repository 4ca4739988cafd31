"""Models with the real encoders, at sizes that run in milliseconds, and clips for them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "crop": 32, "short_side": 32},
        "audio": {"num_windows": 4, "window_s": 0.18, "num_mels": 36},
        "detections": {"num_frames": 4, "max_boxes": 3},
    }
)
MODALITIES = ("video", "flow", "audio", "detections")
HEADS = {"verb": 5, "noun": 3}
SUBSETS = [bits for bits in itertools.product([False, True], repeat=4) if any(bits)]
MISSING = ("leave_out", "stand_in")
SWIN = {"width": 12, "depths": [1, 2], "heads": [2, 4], "drop_path": 0.0}
ENCODERS = {
    "video": EncoderRecipe(name="swin3d_small", options=SWIN),
    "flow": EncoderRecipe(name="swin3d_small", options=SWIN),
    "audio": EncoderRecipe(name="ast_t"),
    "detections": EncoderRecipe(
        name="stlt", options={"width": 24, "heads": 2, "spatial_layers": 1, "temporal_layers": 2, "dropout": 0.0}
    ),
}


def build(missing: str, seed: int = 0) -> KarmmaModel:
    torch.manual_seed(seed)
    sizes = {"width": 32, "num_heads": 4, "feedforward": 32, "fc_width": 48, "tau": 10, "num_layers": 2}
    return KarmmaModel(ModelRecipe(encoders=ENCODERS, missing=missing, **sizes), INPUTS, MODALITIES, HEADS)  # type: ignore[arg-type]


def clips(num: int, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    whole = {m: torch.randn(num, *input_shape(m, INPUTS)) for m in MODALITIES}
    boxes = torch.rand(num, *input_shape("detections", INPUTS))
    boxes[..., 4] = torch.randint(0, 3, boxes.shape[:-1])
    return whole | {"detections": boxes}


def only(whole: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
    return {m: whole[m][present_BM[:, i]] for i, m in enumerate(MODALITIES) if bool(present_BM[:, i].any())}


def joined(logits: dict[str, Tensor]) -> Tensor:
    return torch.cat([logits[head].double() for head in HEADS], dim=1)

