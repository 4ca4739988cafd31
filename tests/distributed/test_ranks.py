"""Errors of a run on several ranks: one line, whichever rank meets them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.distributed.world import free_port
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


FAILS_TO_CONNECT = """
import os
from karmma_dist.cli import main
from karmma_dist.distributed.world import free_port
from karmma_dist.distributed import process_group as module
from karmma_dist.distributed.world import find_world
from karmma_dist.errors import UserError
if os.environ["RANK"] == "1":
    def refuse(world):
        raise UserError("local rank 1 needs 2 visible GPUs and sees 1")
    module.torch.cuda.is_available = lambda: True
    module.device_of = refuse
import sys
sys.argv = ["karmma-dist"]
from karmma_dist import cli
def join(**_):
    with module.process_group(find_world(os.environ)):
        pass
cli.cli = join
sys.exit(cli.main([]))
"""


def test_a_rank_that_fails_before_it_is_connected_ends_the_others_at_once() -> None:
    """Torch would wait for it for a quarter of an hour."""
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS_TO_CONNECT], env={**os.environ, **world, "RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        first, second = (rank.communicate(timeout=HANGS_S / 2)[1].splitlines() for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
    assert second == ["rank 1: error: local rank 1 needs 2 visible GPUs and sees 1"]
    assert len(first) == 1
    assert "rank 1 (" in first[0]
    assert first[0].endswith("stopped: local rank 1 needs 2 visible GPUs and sees 1")
    assert [rank.returncode for rank in ranks] == [1, 2]


def test_half_a_launcher_environment_is_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    assert main(["train", *command(tmp_path, shards)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT" in line
