"""Signals, dead ranks and ranks that differ, on real processes: two gloo ranks started without a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from karmma_dist.distributed.world import free_port
from kits.patience import HANGS_S
from kits.recipes import tiny_recipe

RECIPE = tiny_recipe(
    ["video", "audio"],
    name="student",
    seed=5,
    data={"modality_dropout": {"probability": 0.5}, "num_workers": 1},
    inputs={"video": {"num_frames": 2, "short_side": 16, "crop": 16}},
    optimizer={"name": "adamw", "lr": 0.01, "clip": 1.0},
    training={"epochs": 2, "batch_size": 4, "log_every_steps": 1, "validate_every_epochs": 1, "zero_stage": 2},
)

PRELUDE = """
import os, signal, sys, threading
from karmma_dist.cli import main
from karmma_dist.training import trainer
from karmma_dist.training.objectives import CrossEntropy
rank = int(os.environ["RANK"])
"""


def run(folder: Path, shards: Path, changes: str = "", *overrides: str) -> list[tuple[int, str]]:
    """Train on two ranks whose program `changes` first; returns exit status and stderr of each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    arguments = ["train", "recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]
    script = f"{PRELUDE}{changes}\nsys.exit(main({arguments!r}))"
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-c", script]
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=HANGS_S)[1] for process in ranks]
        return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]
    finally:
        for process in ranks:
            process.kill()


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, without what a clock decides."""
    timed = ("_s", "_share", "queue_depth", "_gb")
    read = [json.loads(line) for line in (folder / "runs/student/metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line.items() if not name.endswith(timed) and not name.startswith("decode_ms")}
        for line in read
    ]


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/student/state.json").read_text())
    return found


RANK_1_IS_NOT_FINITE_AT_STEP_2 = """
mark, losses, at = trainer.mark, CrossEntropy.loss, []
trainer.mark = lambda doing, *limit: (at.append(doing), mark(doing, *limit))
def poisoned(self, logits, batch):
    loss, parts = losses(self, logits, batch)
    loss = loss * float("nan") if rank == 1 and at[-1].endswith("step 2") else loss
    return loss, {**parts, "loss": loss.detach()}
CrossEntropy.loss = poisoned
"""

SIGNAL_AT_STEP_3 = """
forward_backward, save = trainer.Trainer._forward_backward, trainer.Trainer.save_now
def signalled(self, raw, forward, step):
    if rank == 1 and step == 2:
        os.kill(os.getpid(), signal.SIGUSR2)
    return forward_backward(self, raw, forward, step)
def save_disturbed(self, *arguments, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return save(self, *arguments, **named)
trainer.Trainer._forward_backward, trainer.Trainer.save_now = signalled, save_disturbed
"""

SIGNAL_IN_VALIDATION = """
between = trainer.Trainer._between_batches
def signalled(self):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    between(self)
trainer.Trainer._between_batches = signalled
"""


def test_a_run_stopped_in_an_epoch_and_in_validation_ends_as_the_undisturbed_one_bit_for_bit(
    shards: Path, tmp_path: Path
) -> None:
    """One rank is told each time; all save at the same step and exit with 85. A step that was skipped stays skipped."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for status, said in run(whole, shards, RANK_1_IS_NOT_FINITE_AT_STEP_2):
        assert status == 0, said
    for status, said in run(cut, shards, RANK_1_IS_NOT_FINITE_AT_STEP_2 + SIGNAL_AT_STEP_3):
        assert (status, said.count("Traceback")) == (85, 0), said
        assert "preempted by SIGUSR2 on rank 1 after step 3 of" in said
    assert (state(cut)["state"], state(cut)["step"]) == ("preempted", 3)
    for status, said in run(cut, shards, SIGNAL_IN_VALIDATION):
        assert status == 85, said
        assert "preempted by SIGTERM on rank 0 after step 7 of 14" in said
    for status, said in run(cut, shards):
        assert status == 0, said
    assert lines(cut) == lines(whole)
    (skipped,) = [line for line in lines(cut) if line["kind"] == "skipped"]
    assert (skipped["step"], skipped["cause"], [one["rank"] for one in skipped["suspects"]]) == (2, "loss", [1])
    assert len(skipped["suspects"][0]["clips"]) == 2
    assert sum(line["kind"] == "validation" for line in lines(cut)) == 2
    weights = [load_file(folder / "runs/student/weights.safetensors") for folder in (cut, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


LEAVE_A_HEAD_OUT = """
honest = CrossEntropy.loss
def partly(self, logits, batch):
    loss, parts = honest(self, logits, batch)
    return (loss if rank == 0 else logits["verb"].float().sum()), parts
CrossEntropy.loss = partly
"""


def test_a_rank_that_skips_a_branch_is_stopped_with_the_names_of_its_parameters(shards: Path, tmp_path: Path) -> None:
    for status, said in run(tmp_path, shards, LEAVE_A_HEAD_OUT):
        assert (status, said.count("Traceback")) == (2, 0), said
        assert "error: rank 1 leaves out classifiers.noun.bias, classifiers.noun.weight" in said


END_RANK_1 = """
forward_backward = trainer.Trainer._forward_backward
def ends(self, raw, forward, step):
    if rank == 1 and step == 2:
        {how}
    return forward_backward(self, raw, forward, step)
trainer.Trainer._forward_backward = ends
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "threading.Event().wait()"])
def test_a_dead_or_hanging_rank_ends_the_others_with_its_name_in_one_line(
    shards: Path, tmp_path: Path, how: str
) -> None:
    (status, said), (other, _) = run(tmp_path, shards, END_RANK_1.format(how=how), "training.collective_timeout_s=6")
    assert status == 1, said
    assert other == (1 if "wait" in how else -9)
    told = [line for line in said.splitlines() if "died or hangs" in line]
    assert len(told) == 1, said
    assert "rank 1 (" in told[0]
    assert "no sign of life" in told[0] or "while it is in the forward pass of step 3" in told[0]
    assert "Traceback" not in said
    assert state(tmp_path)["state"] == "failed"
