"""Experts, teachers and students of the distillation, made instantly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.runs.folder import write_state
from karmma_dist.training import teacher as teacher_module
from karmma_dist.training.teacher import Teacher, build_teacher

MODALITIES = ["video", "flow", "audio"]
HEADS = {"verb": 3, "noun": 4}
WORLD = World(0, 0, 1, "127.0.0.1", 1)
INPUTS = {
    "video": {"num_frames": 2, "short_side": 16, "crop": 16},
    "audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16},
}
LOSSES = {"verb": 1.5, "noun": 2.5}


class Device:
    """The part of the student's engine that `build_teacher` needs."""

    device, dtype = torch.device("cpu"), torch.float32


def make_recipe(folder: Path, modalities: Sequence[str] = MODALITIES, **sections: Any) -> Recipe:
    names = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
    tree: dict[str, Any] = {
        "name": "student",
        "runs_dir": str(folder),
        "stage": "distill" if "distill" in sections else "supervised",
        "data": {"shards": "shards", "modalities": list(modalities)},
        "inputs": INPUTS,
        "model": {
            "encoders": {m: {"name": names[m], "options": {"width": 4}} for m in modalities},
            "width": 8, "num_heads": 2, "feedforward": 8, "fc_width": 8, "missing": "leave_out",
        },
    }  # fmt: skip
    if "model" in sections:
        sections["model"] = {**tree["model"], **sections["model"]}
    return Recipe.model_validate({**tree, **sections})


def make_model(modalities: Sequence[str], seed: int = 0, heads: dict[str, int] = HEADS) -> KarmmaModel:
    recipe = make_recipe(Path(), modalities)
    torch.manual_seed(seed)
    return KarmmaModel(recipe.model, recipe.inputs, list(modalities), heads).requires_grad_(False).eval()


def save_run(folder: Path, name: str, modalities: Sequence[str], seed: int = 0, **differs: Any) -> Recipe:
    """A finished run: weights, card, recipe and the validation that its state tells."""
    recipe = make_recipe(folder, modalities, name=name, **{k: v for k, v in differs.items() if k != "heads"})
    torch.manual_seed(seed)
    model = KarmmaModel(recipe.model, recipe.inputs, list(modalities), differs.get("heads", HEADS))
    save_model(model, folder / name, recipe=recipe)
    save_recipe(recipe, folder / name / "recipe.yaml")
    metrics = {f"{head}_loss": loss + seed for head, loss in LOSSES.items()}
    write_state(folder / name, "finished", metrics=metrics)
    return recipe


def clips(present_BM: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Return random inputs of the present clips."""
    torch.manual_seed(seed)
    inputs = make_recipe(Path()).inputs
    counts = dict(zip(MODALITIES, present_BM.sum(dim=0).tolist(), strict=True))
    return {m: torch.randn(num, *input_shape(m, inputs)) for m, num in counts.items() if num}


def unmeasured(_model: KarmmaModel, _recipe: Recipe) -> dict[str, float]:
    raise AssertionError("nothing is to be measured")


def build(recipe: Recipe, measure: teacher_module.Measure = unmeasured) -> Teacher:
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    built = build_teacher(recipe, HEADS, Device(), WORLD, measure)  # type: ignore[arg-type]
    assert isinstance(built, Teacher)
    return built

EXPERTS = [make_model(["video"], 1), make_model(["flow"], 2), make_model(["audio"], 3)]
masks = st.lists(st.lists(st.booleans(), min_size=3, max_size=3).filter(any), min_size=1, max_size=4)
losses = st.lists(st.floats(0.1, 5), min_size=3, max_size=3)


def held_out(modalities: Sequence[str], fraction: float = 0.1) -> dict[str, Any]:
    return {"data": {"shards": "shards", "modalities": list(modalities), "hold_out": fraction}}

UNDROPPED = "this teacher was trained without modality dropout"
