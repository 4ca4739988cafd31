"""A run that is killed and resumed, on other ranks and at other ZeRO stages too, ends as the undisturbed run does."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.ranks import ADAMW, RECIPE, Rank, command, karmma_dist, outcome, start

OFTEN = ("training.checkpoint_every_steps=1", "training.log_every_steps=2")


def initial_weights(shards: Path) -> dict[str, torch.Tensor]:
    """Return the weights that every run starts from."""
    recipe = Recipe.model_validate({**RECIPE, "data": {**RECIPE["data"], "shards": str(shards)}})  # type: ignore[dict-item]
    return dict(build_model(recipe, ShardFolder(shards).classes).state_dict())


def end(ranks: list[Rank], status: int) -> str:
    """Wait for the main rank, which must end with `status`, and kill the others where it was killed.

    Returns:
        The standard error of all ranks.
    """
    try:
        assert ranks[0].wait() == status, ranks[0].stderr
        if status == 0:
            assert [rank.wait() for rank in ranks] == [0] * len(ranks)
    finally:
        for rank in ranks:
            rank.kill()
    return "".join(rank.stderr for rank in ranks)


def run_until(folder: Path, shards: Path, step: int, num_ranks: int, *overrides: str) -> str:
    """Train on `num_ranks` ranks and kill them as soon as the checkpoint of `step` has its final name."""
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
    """The run on one rank with AdamW: a checkpoint after every step, a line of metrics after every second one."""
    folder = tmp_path_factory.mktemp("undisturbed")
    karmma_dist(folder, "train", *command(folder, shards, *ADAMW, *OFTEN))
    return folder


def test_a_run_resumes_on_other_ranks_and_zero_stages(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """Train on 1 rank at stage 1, on 2 at stage 2, on 3 at stage 3, on 1 at stage 0, also from between two log lines.

    With at most 2 clips at once a step takes 3 passes on one rank, 3 of one clip on each of 2, and 1 on each of 3.
    """
    settings = (*ADAMW, *OFTEN, "training.max_micro_batch_size=2")
    run_until(tmp_path, shards, 3, 1, *settings, "training.zero_stage=1")
    run_until(tmp_path, shards, 7, 2, *settings, "training.zero_stage=2")
    run_until(tmp_path, shards, 11, 3, *settings, "training.zero_stage=3")
    log = end(start(tmp_path, shards, 1, *settings, "training.zero_stage=0"), 0)
    assert re.search("3 ranks.*stage 3.* 1 rank .*stage 0", log)
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(undisturbed)
    assert losses == pytest.approx(expected_losses, abs=1e-4)
    assert _distance(weights, expected_weights) < 1e-6 * _distance(initial_weights(shards), expected_weights)


def _distance(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Return the sum of squared differences: AdamW moves single weights without a gradient as rounding has it."""
    return sum(float((weights[name] - other).double().square().sum()) for name, other in others.items())


def test_kills_while_saving_and_while_training_change_no_bit(
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
    steps_left = later - in_save
    while_training = (
        f"left = iter([backward] * {steps_left} + [die])\n"
        "engine.Engine.backward = lambda self, loss: next(left)(self, loss)\n"
    )
    end(start(tmp_path, shards, 1, *settings, script=dying + while_training), -signal.SIGKILL)
    end(start(tmp_path, shards, 1, *settings), 0)
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(undisturbed)
    assert losses == expected_losses, (in_save, later)
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())
    assert not list(checkpoints.glob(".*"))


SLOWLY = (
    "import time\nfrom karmma_dist.training.engine import Engine\nbackward = Engine.backward\n"
    "def slowly(self, loss):\n    time.sleep(0.5)\n    backward(self, loss)\n"
    "Engine.backward = slowly\n"
)


def test_a_run_that_is_started_twice_is_trained_once(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """Start it again while it trains, on one and on two ranks; kill it, and start it a third time."""
    settings = (*ADAMW, *OFTEN)
    (first,) = start(tmp_path, shards, 1, *settings, script=SLOWLY)
    try:
        latest = tmp_path / "runs/student/checkpoints/latest"
        wait_until(latest.exists, first)
        for num_ranks in (1, 2):
            for second in start(tmp_path, shards, num_ranks, *settings):
                assert second.wait() == 2, second.stderr
                assert f"is being trained by process {first.pid} on " in second.stderr
                assert "Traceback" not in second.stderr
        assert first.is_running
    finally:
        first.kill()
    assert list((tmp_path / "runs/student").glob(".owner-*"))
    end(start(tmp_path, shards, 1, *settings), 0)
    assert not list((tmp_path / "runs/student").glob(".owner-*"))
    weights, losses = outcome(tmp_path)
    expected_weights, expected_losses = outcome(undisturbed)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], expected) for name, expected in expected_weights.items())


def test_a_run_whose_owner_file_is_removed_stops(shards: Path, tmp_path: Path) -> None:
    """Remove it while the run trains, as a process that takes it for dead would."""
    (rank,) = start(tmp_path, shards, 1, *OFTEN, script=SLOWLY)
    try:
        run_dir = tmp_path / "runs/student"
        wait_until((run_dir / "checkpoints/latest").exists, rank)
        for path in run_dir.glob(".owner-*"):
            path.unlink()
        assert rank.wait() == 2
    finally:
        rank.kill()
    assert re.search(r"\.owner-\w+\.json: was removed, so another process may own this folder", rank.stderr)
    assert '"state":"running"' in (run_dir / "state.json").read_text()


def wait_until(is_so: Callable[[], bool], rank: Rank) -> None:
    """Wait until something is so, as long as the rank runs."""
    limit = time.monotonic() + HANGS_S
    while not is_so():
        assert rank.is_running, rank.stderr
        assert time.monotonic() < limit
        time.sleep(0.05)
