"""Tiny models of every kind, the clips they take, and what tests compare of them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.running_sums import running_sums
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 7, "crop": 16, "short_side": 16},
        "audio": {"num_windows": 2, "window_s": 0.2, "num_mels": 16},
        "detections": {"num_frames": 3, "max_boxes": 2},
    }
)
MODALITIES = ("video", "flow", "audio", "detections")
HEADS = {"verb": 5, "noun": 3}
SUBSETS = [tuple(bits) for bits in itertools.product([False, True], repeat=4) if any(bits)]
STLT = {"spatial_layers": 1, "temporal_layers": 1, "width": 8, "heads": 2, "dropout": 0.0}
MISSING = ("leave_out", "stand_in")
"""KARMMA's own kinds of models, by their treatment of missing modalities."""
RIVALS: dict[str, dict[str, Any]] = {
    "zeros": {"missing": "zeros"},
    "mean": {"missing": "mean"},
    "token": {"missing": "token"},
    "prompts": {"missing": "prompts", "prompt_length": 3},
    "late": {"fusion": "late", "missing": "leave_out"},
    "bottleneck": {"fusion": "bottleneck", "missing": "leave_out", "bottleneck_tokens": 2},
    "bottleneck with token": {"fusion": "bottleneck", "missing": "token"},
}
"""Fields of the other kinds of models."""
KINDS = (*MISSING, *RIVALS)


def build(kind: str = "leave_out", modalities: tuple[str, ...] = MODALITIES, **changes: Any) -> KarmmaModel:
    """Return a model with random weights, and with random means if it fills with means."""
    changes = {**RIVALS.get(kind, {"missing": kind}), **changes}
    frozen = changes.pop("frozen", ())
    names = {"video": "small_video", "flow": "small_video", "audio": "small_audio", "detections": "stlt"}
    options = {m: STLT if m == "detections" else {"width": 4} for m in names}
    encoders = {m: EncoderRecipe(name=names[m], options=options[m], frozen=m in frozen) for m in modalities}
    sizes = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 24, "tau": 5, "num_layers": 2}
    recipe = ModelRecipe(encoders=encoders, **{**sizes, **changes})
    torch.manual_seed(0)
    model = KarmmaModel(recipe, INPUTS, modalities, HEADS)
    for part in running_sums(model):
        part.sums.normal_()[-1] = 2.0
    return model


def clips(num: int, modalities: tuple[str, ...] = MODALITIES) -> dict[str, Tensor]:
    """Return random inputs of clips that have all modalities."""
    torch.manual_seed(1)
    whole = {m: torch.randn(num, *input_shape(m, INPUTS)) for m in modalities}
    if "detections" in whole:
        whole["detections"][..., 4] = torch.randint(0, 3, whole["detections"].shape[:-1])
    return whole


def only(whole: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the present modalities."""
    return {m: whole[m][present_BM[:, i]] for i, m in enumerate(whole) if bool(present_BM[:, i].any())}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Fail unless all logits are equal to rounding."""
    assert a.keys() == b.keys()
    for head in a:
        torch.testing.assert_close(a[head], b[head], atol=1e-5, rtol=1e-5)


def gradients(model: KarmmaModel, logits: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the gradient of every trained parameter, by name."""
    model.zero_grad()
    sum(value.square().sum() for value in logits.values()).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
