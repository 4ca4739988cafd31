"""The tiny recipe that tests train: seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tiny_recipe(modalities: Sequence[str], **sections: Any) -> dict[str, Any]:
    """Return the tree of a recipe without shards, with `sections` merged into it field by field."""
    kinds = {modality: "small_audio" if modality == "audio" else "small_video" for modality in modalities}
    recipe: dict[str, Any] = {
        "stage": "supervised",
        "data": {"modalities": list(modalities), "num_workers": 0},
        "inputs": {
            "video": {"num_frames": 4, "short_side": 32, "crop": 32},
            "audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 16},
        },
        "model": {
            "encoders": {modality: {"name": kind, "options": {"width": 4}} for modality, kind in kinds.items()},
            "width": 16,
            "num_heads": 2,
            "feedforward": 16,
            "fc_width": 16,
        },
        "optimizer": {"warmup_epochs": 0},
        "training": {"validate_every_epochs": 0, "threads": 1},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
    return recipe
