"""What tests of several ranks share: a recipe that trains in seconds, and how to run it and read what came out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from patience import HANGS_S
from recipe_kit import tiny_recipe
from safetensors.torch import load_file

RECIPE = tiny_recipe(
    ["video", "flow", "audio"],
    name="student",
    seed=5,
    data={"modality_dropout": {"probability": 0.5}},
    optimizer={"name": "sgd", "lr": 0.1, "clip": 1.0},
    training={"epochs": 3, "batch_size": 6, "log_every_steps": 1},
)


def command(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """`karmma-dist`'s arguments for a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    return ["recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]


def karmma_dist(folder: Path, *arguments: str) -> None:
    """Run it in a process of its own; fail with its output."""
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", *arguments], cwd=folder, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Final weights and the loss of every step."""
    run = folder / "runs" / "student"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / "weights.safetensors"), [line["loss"] for line in lines if line["kind"] == "train"]
