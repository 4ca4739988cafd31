"""Runs exported to files, once per session and kind."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karmma_dist.deploy import export
from karmma_dist.deploy.export import Exported
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.recipe import InputRecipe, ModelRecipe

SENSORS = {
    "video": {"name": "swin3d_small", "options": {"width": 24, "depths": [2, 2], "heads": [1, 2]}},
    "detections": {"name": "stlt", "options": {"width": 16, "heads": 2, "spatial_layers": 1, "temporal_layers": 1}},
    "signal": {"name": "signal_cnn", "options": {"width": 8}},
}
"""An encoder of each kind of array that `kits.evaluation` has no run of, and one with tables of windows."""
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 8, "short_side": 64, "crop": 64},
        "detections": {"num_frames": 4, "max_boxes": 3},
        "signal": {"num_samples": 64, "num_channels": 3},
    }
)


def save_sensors(folder: Path, **model: object) -> Path:
    """Write an untrained model of three sensors as a run folder."""
    sizes = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16, "tau": 20}
    recipe = ModelRecipe.model_validate({"encoders": SENSORS, **sizes, **model})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        save_model(KarmmaModel(recipe, INPUTS, list(SENSORS), {"action": 6}), folder)
    return folder


@cache
def exported(run: Path, precision: str = "fp32") -> Exported:
    """Return the exported run; the file lies beside the weights."""
    return export_again(run, run / f"{precision}.onnx", precision=precision)


def export_again(run: Path, out: Path, **options: Any) -> Exported:
    """Export a run; what was traced of it before is not traced again, which takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        trace = export._trace

        def remembered(module: nn.Module, arguments: tuple[Any, ...], shown: str) -> Any:
            if (run, shown) not in _graphs:
                _graphs[run, shown] = trace(module, arguments, shown)
            return _graphs[run, shown]

        patch.setattr(export, "_trace", remembered)
        return export.export_run(run, out, **options)


_graphs: dict[tuple[Path, str], Any] = {}


def loaded(run: Path) -> KarmmaModel:
    """Return a run's model as it answers."""
    model, _ = load_model(run)
    return model.eval()
