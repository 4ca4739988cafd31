"""What tests of several ranks share: a recipe that trains in seconds, and how to run it and read what came out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

RECIPE = {
    "name": "student",
    "stage": "supervised",
    "seed": 5,
    "data": {
        "modalities": ["video", "flow", "audio"],
        "modality_dropout": {"probability": 0.5},
        "num_workers": 0,
    },
    "inputs": {
        "video": {"num_frames": 4, "short_side": 32, "crop": 32},
        "audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 16},
    },
    "model": {
        "encoders": {
            "video": {"name": "small_video", "options": {"width": 4}},
            "flow": {"name": "small_video", "options": {"width": 4}},
            "audio": {"name": "small_audio", "options": {"width": 4}},
        },
        "width": 16,
        "num_heads": 2,
        "feedforward": 16,
        "fc_width": 16,
    },
    "optimizer": {"name": "sgd", "warmup_epochs": 0, "lr": 0.1, "clip": 1.0},
    "training": {"epochs": 3, "batch_size": 6, "log_every_steps": 1, "validate_every_epochs": 0, "threads": 1},
}


def command(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """`karmma-dist`'s arguments for a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    return ["recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]


def karmma_dist(folder: Path, *arguments: str) -> None:
    """Run it in a process of its own; fail with its output."""
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", *arguments], cwd=folder, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Final weights and the loss of every step."""
    run = folder / "runs" / "student"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / "weights.safetensors"), [line["loss"] for line in lines if line["kind"] == "train"]
