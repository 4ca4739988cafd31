"""Ranks and interruptions do not change what is learnt: real processes, gloo, DeepSpeed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from karmma_dist.shards import ShardFolder

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


@pytest.fixture(scope="module")
def alone(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    karmma_dist(folder, "train", *command(folder, shards))
    return folder


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_with_different_modalities_learn_what_one_rank_learns(
    alone: Path, shards: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Every rank's three clips miss other modalities, so branches are skipped on one rank and run on the other."""
    arguments = command(tmp_path, shards, f"training.zero_stage={zero_stage}")
    karmma_dist(tmp_path, "launch", arguments[0], "--local", "2", *arguments[1:])
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(alone)
    assert losses == pytest.approx(expected_losses, abs=1e-6)
    start = {name: tensor.double() for name, tensor in initial_weights(shards).items()}
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-5)
        moved, should = weights[name].double() - start[name], expected.double() - start[name]
        if float(should.norm()) > 1e-6:
            cosine = torch.nn.functional.cosine_similarity(moved.flatten(), should.flatten(), dim=0)
            assert float(cosine) > 0.9999, name


def initial_weights(shards: Path) -> dict[str, torch.Tensor]:
    """The weights every run starts from."""
    from karmma_dist.recipe import Recipe
    from karmma_dist.training.loop import build_model

    recipe = Recipe.model_validate({**RECIPE, "data": {**RECIPE["data"], "shards": str(shards)}})
    return dict(build_model(recipe, ShardFolder(shards).classes).state_dict())


def test_a_killed_run_goes_on_exactly_where_its_last_checkpoint_was(
    alone: Path, shards: Path, tmp_path: Path
) -> None:
    """SIGKILL once the first checkpoint is there: same losses and weights, bit for bit, as the undisturbed run."""
    arguments = command(tmp_path, shards)
    checkpoints = tmp_path / "runs" / "student" / "checkpoints"
    script = (
        "import os, signal, sys\n"
        "from karmma_dist.training import checkpoint, loop\n"
        "saving = checkpoint.save_checkpoint\n"
        "def save_then_die(*arguments):\n"
        "    saving(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.save_checkpoint = save_then_die\n"
        "from karmma_dist.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, "train", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=150
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000005"]
    (checkpoints / ".step-00000009.partial").mkdir()  # what a kill in the middle of saving leaves behind
    karmma_dist(tmp_path, "train", *arguments)
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(alone)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    assert not list(checkpoints.glob(".*"))


def test_the_damage_budget_counts_the_clips_of_all_ranks(shards: Path, tmp_path: Path) -> None:
    """4 of 30 clips are damaged and 3 allowed; no rank meets more than half of an epoch, all of them stop."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    damaged = ShardFolder(copy).clips("train")[::8]
    for clip in damaged:
        member = clip.members["json"]
        assert member is not None
        with open(copy / clip.shard, "r+b") as tar:
            tar.seek(member.offset)
            tar.write(b"[")
    arguments = command(tmp_path, copy, "data.max_damaged_fraction=0.1", "training.epochs=50", "optimizer.lr=0.001")
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", "launch", arguments[0], "--local", "2", *arguments[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("4 of 30 clips are damaged, data.max_damaged_fraction allows 3") == 1
    assert "Traceback" not in done.stderr
    events = [json.loads(line) for line in (tmp_path / "runs/student/damage.jsonl").read_text().splitlines()]
    assert sorted(event["key"] for event in events) == sorted(clip.key for clip in damaged)
    assert {event["rank"] for event in events} == {0, 1}
    state = json.loads((tmp_path / "runs/student/state.json").read_text())
    assert state["state"] == "failed"


def test_half_a_launcher_environment_is_one_line(shards: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "karmma_dist", "train", *command(tmp_path, shards)],
        cwd=tmp_path, capture_output=True, text=True, timeout=150, env={**os.environ, "RANK": "0"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not" in done.stderr
    assert "Traceback" not in done.stderr
