"""`doctor --distributed` on ranks that are processes: a store over TCP, gloo."""

from __future__ import annotations

import json
from pathlib import Path

from kits.ranks import command, run_ranks

HANGING = """
import threading
from karmma_dist.distributed.preflight import preflight
preflight.time_all_reduce = lambda world, limit_s: threading.Event().wait()
"""
"""The program of a rank that arrives, is well, and then never joins the all-reduce."""


def test_two_ranks_agree_and_their_all_reduce_is_timed(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    doctor = ["doctor", "--distributed", *command(folder, shards), "--json"]
    first, second = run_ranks(folder, doctor, doctor)
    assert first[0] == 0, first
    assert second == (0, "", "")
    outcome = json.loads(first[1])
    assert outcome["failures"] == []
    assert outcome["bus_gb_per_s"] > 0
    assert [facts["rank"] for facts in outcome["ranks"]] == [0, 1]
    assert all(facts["run folder"] for facts in outcome["ranks"])
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_a_rank_hanging_in_the_all_reduce_ends_all(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    doctor = ["doctor", "--distributed", "--timeout", "10"]
    first, second = run_ranks(folder, doctor, doctor, scripts=["", HANGING])
    assert (first[0], second[0]) == (1, 1), (first, second)
    (line,) = first[2].splitlines()
    assert "rank 1 (" in line
    assert "all-reduce" in line
    assert second[2] == ""
