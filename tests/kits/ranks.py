"""Helpers for tests of several ranks: a recipe that trains in seconds, its run, and its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from karmma_dist.distributed.world import free_port
from kits.patience import HANGS_S
from kits.recipes import tiny_recipe

RECIPE = tiny_recipe(
    ["video", "flow", "audio"],
    name="student",
    seed=5,
    data={"modality_dropout": {"probability": 0.5}},
    optimizer={"name": "sgd", "lr": 0.1, "clip": 1.0},
    training={"epochs": 3, "batch_size": 6, "log_every_steps": 1},
)


def command(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """Return `karmma-dist`'s arguments for a run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    return ["recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]


def karmma_dist(folder: Path, *arguments: str) -> None:
    """Run it in a separate process; fail with its output."""
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", *arguments], cwd=folder, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the final weights and the loss of every step."""
    run = folder / "runs" / "student"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / "weights.safetensors"), [line["loss"] for line in lines if line["kind"] == "train"]


ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.003", "optimizer.weight_decay=0.01")


def start(folder: Path, shards: Path, num_ranks: int, *overrides: str, script: str = "") -> list[subprocess.Popen[str]]:
    """Start the ranks of a run, each a process that this test can kill; `script` runs in them first."""
    arguments = command(folder, shards, *overrides)
    program = f"import sys\n{script}\nfrom karmma_dist.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    port = str(free_port())
    ranks = []
    for rank in range(num_ranks):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-c", program, "train", *arguments],
                cwd=folder, env={**os.environ, **{k: str(v) for k, v in world.items()}, "MASTER_PORT": port},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    return ranks

