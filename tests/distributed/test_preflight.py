"""`doctor --distributed` on real ranks: processes, a store over TCP, gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from karmma_dist.distributed.world import free_port
from kits.patience import HANGS_S
from kits.ranks import command

HANGING = """
import sys, threading
from karmma_dist.cli import main
from karmma_dist.distributed.preflight import preflight
preflight.time_all_reduce = lambda world, limit_s: threading.Event().wait()
sys.exit(main(sys.argv[1:]))
"""
"""A rank that comes, is well, and then never joins the all-reduce."""


def doctors(*programs: list[str], cwd: Path, arguments: list[str]) -> list[tuple[int, str, str]]:
    """Start `doctor --distributed ARGUMENTS` once per program; exit code, stdout and stderr of each rank."""
    port = str(free_port())
    ranks = []
    for rank, program in enumerate(programs):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(programs)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, *program, "doctor", "--distributed", *arguments], cwd=cwd, text=True,
                env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    ended = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=HANGS_S)
            ended.append((rank.returncode, out, err))
    finally:
        for rank in ranks:
            rank.kill()
    return ended


def test_two_ranks_agree_and_their_all_reduce_is_timed(shards: Path, tmp_path: Path) -> None:
    program = ["-m", "karmma_dist"]
    first, second = doctors(program, program, cwd=tmp_path, arguments=[*command(tmp_path, shards), "--json"])
    assert first[0] == 0, first
    assert second == (0, "", "")
    outcome = json.loads(first[1])
    assert outcome["failures"] == []
    assert outcome["bus_gb_per_s"] > 0
    assert [facts["rank"] for facts in outcome["ranks"]] == [0, 1]
    assert all(facts["run folder"] for facts in outcome["ranks"])
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_rank_that_hangs_in_the_all_reduce_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    first, second = doctors(
        ["-m", "karmma_dist"], ["-c", HANGING], cwd=tmp_path, arguments=["--timeout", "30"]
    )  # fmt: skip
    assert (first[0], second[0]) == (1, 1), (first, second)
    assert "rank 1 (" in first[2]
    assert "all-reduce: did not end within 6 s" in first[2]
    assert len(first[2].splitlines()) == 1, first[2]
    assert second[2] == ""
