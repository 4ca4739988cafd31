"""Killed, stopped, moved to other ranks and other ZeRO stages: a run goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.ranks import ADAMW, RECIPE, command, karmma_dist, outcome, start

OFTEN = ("training.checkpoint_every_steps=1", "training.log_every_steps=2")


def initial_weights(shards: Path) -> dict[str, torch.Tensor]:
    """The weights every run starts from."""
    recipe = Recipe.model_validate({**RECIPE, "data": {**RECIPE["data"], "shards": str(shards)}})  # type: ignore[dict-item]
    return dict(build_model(recipe, ShardFolder(shards).classes).state_dict())


def end(ranks: list[subprocess.Popen[str]], status: int) -> str:
    """Wait for the main rank, which must end with `status`; kill the others where it was killed; all that they said."""
    try:
        said = ranks[0].communicate(timeout=HANGS_S)[0]
        if status == -signal.SIGKILL:
            for rank in ranks[1:]:
                rank.kill()
        said += "".join(rank.communicate(timeout=HANGS_S)[0] for rank in ranks[1:])
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[0].returncode == status, said
    return said


def run_until(folder: Path, shards: Path, step: int, num_ranks: int, *overrides: str) -> str:
    """Train on `num_ranks` ranks and kill them as soon as the checkpoint of `step` has its name."""
    script = (
        "import os, signal\n"
        "from karmma_dist.training.checkpoint import async_saver as saver\n"
        "complete = saver.complete\n"
        "def complete_and_die(partial, final, *arguments):\n"
        "    complete(partial, final, *arguments)\n"
        f"    if final.name == 'step-{step:08d}':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "saver.complete = complete_and_die\n"
    )
    return end(start(folder, shards, num_ranks, *overrides, script=script), -signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one rank: AdamW, a checkpoint after every step, a line of metrics for every second."""
    folder = tmp_path_factory.mktemp("undisturbed")
    karmma_dist(folder, "train", *command(folder, shards, *ADAMW, *OFTEN))
    return folder


def test_any_number_of_ranks_at_any_zero_stage_goes_on_from_any_other(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    """1 rank at stage 1, then 2 at stage 2, 3 at stage 3, 1 at stage 0: between two lines of the log, too.

    At most 2 clips at once: 3 passes a step on one rank, 3 of one clip on each of 2, 1 on each of 3.
    """
    settings = (*ADAMW, *OFTEN, "training.max_micro_batch_size=2")
    run_until(tmp_path, shards, 3, 1, *settings, "training.zero_stage=1")
    run_until(tmp_path, shards, 7, 2, *settings, "training.zero_stage=2")
    run_until(tmp_path, shards, 11, 3, *settings, "training.zero_stage=3")
    said = end(start(tmp_path, shards, 1, *settings, "training.zero_stage=0"), 0)
    assert "saved by 3 ranks at ZeRO stage 3, resumed by 1 rank at ZeRO stage 0" in said
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(undisturbed)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert _distance(weights, expected_weights) < 1e-6 * _distance(initial_weights(shards), expected_weights)


def _distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Sum of squares; single weights without a gradient follow rounding, by AdamW's nature."""
    return sum(float((weights[name] - other).double().square().sum()) for name, other in others.items())


def test_a_run_killed_twice_once_in_a_save_ends_bit_for_bit_as_if_undisturbed(
    undisturbed: Path, shards: Path, tmp_path: Path
) -> None:
    settings = (*ADAMW, *OFTEN)
    in_save, later = sorted(random.Random().sample(range(2, 14), 2))
    dying = (
        "import os, signal\n"
        "from karmma_dist.training import engine\nfrom karmma_dist.training.checkpoint import async_saver as saver\n"
        "checksum, backward = saver.checksum, engine.Engine.backward\n"
        "def die(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    while_saving = f"saver.checksum = lambda path: die() if '.step-{in_save:08d}.' in str(path) else checksum(path)\n"
    end(start(tmp_path, shards, 1, *settings, script=dying + while_saving), -signal.SIGKILL)
    checkpoints = tmp_path / "runs/student/checkpoints"
    assert list(checkpoints.glob(".step-*.partial"))
    steps_on = later - in_save
    while_training = (
        f"left = iter([backward] * {steps_on} + [die])\n"
        "engine.Engine.backward = lambda self, loss: next(left)(self, loss)\n"
    )
    end(start(tmp_path, shards, 1, *settings, script=dying + while_training), -signal.SIGKILL)
    end(start(tmp_path, shards, 1, *settings), 0)
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(undisturbed)
    assert losses == expected_losses, (in_save, later)
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    assert not list(checkpoints.glob(".*"))
