"""Signals, dead ranks and ranks that differ: two gloo ranks, each a process."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kits.ranks import run_ranks
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
import os, signal, threading
from karmma_dist.training import trainer
from karmma_dist.training.objectives import CrossEntropy
rank = int(os.environ["RANK"])
"""


def run(folder: Path, shards: Path, changes: str = "", *overrides: str) -> list[tuple[int, str]]:
    """Train on two ranks whose program `changes` first; return exit code and standard error of each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    train = ["train", "recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]
    ended = run_ranks(folder, train, train, scripts=[PRELUDE + changes] * 2)
    return [(code, errors) for code, _, errors in ended]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the fields that a clock decides."""
    timed = ("_s", "_share", "queue_depth", "_gb")
    read = [json.loads(line) for line in (folder / "runs/student/metrics.jsonl").read_text().splitlines()]
    return [
        {name: v for name, v in line.items() if not name.endswith(timed) and not name.startswith("decode_ms")}
        for line in read
    ]


def state(folder: Path) -> dict[str, Any]:
    """Return the content of state.json."""
    content: dict[str, Any] = json.loads((folder / "runs/student/state.json").read_text())
    return content


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


def test_a_run_stopped_by_signals_ends_as_undisturbed(shards: Path, tmp_path: Path) -> None:
    """One rank gets a signal, in an epoch and in validation: all save at the same step, and exit with 85.

    A step that was skipped stays skipped.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for code, errors in run(whole, shards, RANK_1_IS_NOT_FINITE_AT_STEP_2):
        assert code == 0, errors
    for code, errors in run(cut, shards, RANK_1_IS_NOT_FINITE_AT_STEP_2 + SIGNAL_AT_STEP_3):
        assert (code, errors.count("Traceback")) == (85, 0), errors
        assert re.search(r"SIGUSR2 .*rank 1 .*step 3\b", errors)
    assert (state(cut)["state"], state(cut)["step"]) == ("preempted", 3)
    for code, errors in run(cut, shards, SIGNAL_IN_VALIDATION):
        assert code == 85, errors
        assert re.search(r"SIGTERM .*rank 0 .*step 7\b", errors)
    for code, errors in run(cut, shards):
        assert code == 0, errors
    assert lines(cut) == lines(whole)
    (skipped,) = [line for line in lines(cut) if line["kind"] == "skipped"]
    assert (skipped["step"], skipped["cause"], [suspect["rank"] for suspect in skipped["suspects"]]) == (2, "loss", [1])
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


def test_a_rank_that_skips_a_branch_is_named_with_parameters(shards: Path, tmp_path: Path) -> None:
    for code, errors in run(tmp_path, shards, LEAVE_A_HEAD_OUT):
        assert (code, errors.count("Traceback")) == (2, 0), errors
        assert re.search(r"rank 1 .*classifiers\.noun\.bias, classifiers\.noun\.weight", errors)


END_RANK_1 = """
forward_backward = trainer.Trainer._forward_backward
def ends(self, raw, forward, step):
    if rank == 1 and step == 2:
        {how}
    return forward_backward(self, raw, forward, step)
trainer.Trainer._forward_backward = ends
"""


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("how", [KILLED, "threading.Event().wait()"], ids=["dead", "hanging"])
def test_a_dead_or_hanging_rank_is_named_in_one_line(shards: Path, tmp_path: Path, how: str) -> None:
    (code, errors), (other, _) = run(tmp_path, shards, END_RANK_1.format(how=how), "training.collective_timeout_s=6")
    assert code == 1, errors
    assert other == (-9 if how == KILLED else 1)
    lines_of_rank_1 = [line for line in errors.splitlines() if "rank 1 (" in line]
    assert len(lines_of_rank_1) == 1, errors
    (line,) = lines_of_rank_1
    assert "no sign of life" in line or "forward pass of step 3" in line
    assert "Traceback" not in errors
    assert state(tmp_path)["state"] == "failed"
