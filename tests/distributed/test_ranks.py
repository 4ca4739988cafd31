"""Errors of a run on several ranks: one line, whichever rank meets them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.ranks import command


def test_the_damage_budget_counts_the_clips_of_all_ranks(shards: Path, tmp_path: Path) -> None:
    """Of 30 clips 4 are damaged and 3 allowed: no rank meets more than half of an epoch, but all of them stop."""
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
        cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_S,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(re.findall(r"4 of 30 .*data\.max_damaged_fraction.* 3\b", done.stderr)) == 1
    assert "Traceback" not in done.stderr
    events = [json.loads(line) for line in (tmp_path / "runs/student/damage.jsonl").read_text().splitlines()]
    assert sorted(event["key"] for event in events) == sorted(clip.key for clip in damaged)
    assert {event["rank"] for event in events} == {0, 1}
    state = json.loads((tmp_path / "runs/student/state.json").read_text())
    assert state["state"] == "failed"


def test_half_a_launcher_environment_is_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *command(tmp_path, shards)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in line
