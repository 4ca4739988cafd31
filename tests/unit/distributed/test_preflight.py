"""Preflight names the rank and node of each problem that would end a run; ranks are threads that share one store."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.distributed.preflight import preflight as module
from karmma_dist.distributed.preflight.facts import attempt, device_facts, differences, shard_facts
from karmma_dist.distributed.preflight.preflight import Outcome, preflight, report
from karmma_dist.distributed.preflight.probes import SharedFolderProbe, planned_hosts, tasks_per_node
from karmma_dist.distributed.world import World, free_port
from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.runs.process import node_name
from karmma_dist.shards.folder import ShardFolder
from kits.mixtures import mixture_recipe
from kits.patience import HANGS_S

TIMEOUT_S = 20.0


@pytest.fixture(autouse=True)
def _no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the all-reduce: two ranks in one process cannot both have a process group."""
    monkeypatch.setattr(module, "time_all_reduce", lambda world, _: 1.0 + world.rank)


def recipe(shards: Path, runs: Path) -> Recipe:
    encoder = {"name": "small_video"}
    return Recipe.model_validate(
        {
            "name": "kitchen/student", "runs_dir": str(runs), "stage": "supervised",
            "data": {"shards": str(shards), "modalities": ["video"]}, "model": {"encoders": {"video": encoder}},
        }
    )  # fmt: skip


def run_ranks(*chains: list[Recipe] | None, timeout_s: float = TIMEOUT_S) -> list[Outcome]:
    """Run preflight with one rank per chain; a rank whose chain is None never starts."""
    port = free_port()
    with ThreadPoolExecutor(len(chains)) as pool:
        futures = [
            pool.submit(preflight, chain, World(rank, rank, len(chains), "127.0.0.1", port), timeout_s)
            for rank, chain in enumerate(chains)
            if chain is not None
        ]
        return [future.result(timeout=HANGS_S) for future in futures]


def test_ranks_without_a_problem_pass(shards: Path, tmp_path: Path) -> None:
    chain = [recipe(shards, tmp_path / "runs")]
    first, *others = run_ranks(chain, chain, chain)
    assert not first.failures
    assert not any(other.failures for other in others)
    assert [facts["rank"] for facts in first.ranks] == [0, 1, 2]
    assert first.bus_gb_per_s == 1.0  # the slowest rank's
    assert {facts["shards"][str(shards)] for facts in first.ranks} == {first.ranks[0]["shards"][str(shards)]}


def test_preflight_leaves_no_files_behind(shards: Path, tmp_path: Path) -> None:
    chain = [recipe(shards, tmp_path / "a" / "runs")]
    run_ranks(chain, chain)
    assert list(tmp_path.iterdir()) == []


def test_existing_files_in_the_run_folder_stay(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "kitchen" / "student"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    chain = [recipe(shards, tmp_path / "runs")]
    assert not run_ranks(chain, chain)[0].failures
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_rank_that_never_arrives_is_named() -> None:
    first, other = run_ranks([], [], None, timeout_s=6.0)
    assert first.failures[0].startswith("rank 2 (node unknown): did not arrive within 3 s (2 of 3 did)")
    assert len(first.failures) == 1
    assert other.failures
    assert other.reported


def run_worlds(*worlds: World, timeout_s: float = 6.0) -> list[Outcome]:
    with ThreadPoolExecutor(len(worlds)) as pool:
        futures = [pool.submit(preflight, [], world, timeout_s) for world in worlds]
        return [future.result(timeout=HANGS_S) for future in futures]


def test_two_processes_with_one_rank_are_named_and_the_missing_rank_too() -> None:
    port = free_port()
    outcomes = run_worlds(*(World(rank, rank, 3, "127.0.0.1", port) for rank in (0, 1, 1)))
    lines = outcomes[0].failures
    assert any(line.startswith("two processes are rank 1 (") for line in lines), lines
    assert any(line.startswith("rank 2 (node unknown): did not arrive") for line in lines), lines
    assert all(outcome.failures for outcome in outcomes)


@pytest.mark.parametrize("late", [None, 0, 1])
def test_ranks_of_different_world_sizes_are_named(monkeypatch: pytest.MonkeyPatch, late: int | None) -> None:
    port, arrive = free_port(), module._Rank.arrive

    def arrive_late(rank: module._Rank) -> None:
        time.sleep(0.5 if rank.world.rank == late else 0.0)
        arrive(rank)

    monkeypatch.setattr(module._Rank, "arrive", arrive_late)
    outcomes = run_worlds(World(0, 0, 2, "127.0.0.1", port), World(1, 1, 4, "127.0.0.1", port))
    assert all(any("WORLD_SIZE=" in line for line in outcome.failures) for outcome in outcomes), outcomes


def test_one_rank_needs_no_free_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (outcome,) = run_worlds(World(0, 0, 1, "127.0.0.1", taken.getsockname()[1]))
    assert outcome.failures == []


def test_without_rank_0_each_rank_names_the_address_it_tried() -> None:
    (outcome,) = run_ranks(None, [], timeout_s=4.0)
    assert "rank 1 (" in outcome.failures[0]
    assert "cannot reach rank 0 at 127.0.0.1:" in outcome.failures[0]
    assert not outcome.reported


def test_a_rank_with_other_shards_is_named(shards: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    shutil.copytree(shards, others)
    (others / "manifest.json").write_text((shards / "manifest.json").read_text() + "\n")
    good, bad = recipe(shards, tmp_path / "runs"), recipe(others, tmp_path / "runs")
    first, *_ = run_ranks([good], [good], [bad])
    assert any("rank 2" in line and "manifest" in line for line in first.failures)


def test_every_dataset_of_a_mixture_is_compared_and_complete(shards: Path, actions: Path, tmp_path: Path) -> None:
    both = {"a": {"shards": str(actions), "weight": 1}, "b": {"shards": str(tmp_path / "copy"), "weight": 1}}
    shutil.copytree(shards, tmp_path / "copy")
    assert shard_facts([mixture_recipe(tmp_path, both)], 0) == {
        str(actions): ShardFolder(actions).sha256, str(tmp_path / "copy"): ShardFolder(shards).sha256,
    }  # fmt: skip
    (tmp_path / "copy/train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"copy/train-000001\.tar: is missing, the manifest names"):
        shard_facts([mixture_recipe(tmp_path, both)], 0)


def test_a_rank_with_another_run_folder_is_named(shards: Path, tmp_path: Path) -> None:
    first_recipe, other_recipe = recipe(shards, tmp_path / "node1"), recipe(shards, tmp_path / "node2")
    first, _ = run_ranks([first_recipe], [other_recipe])
    (line,) = first.failures
    assert line.startswith("rank 1 (")
    assert "not the same folder on all nodes" in line


def test_a_run_folder_that_cannot_be_created_is_named(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    chain = [recipe(shards, tmp_path / "file")]
    first, _ = run_ranks(chain, chain)
    assert first.failures
    assert "cannot be written" in first.failures[0]
    assert "rank 0" in first.failures[0]


def test_missing_shards_are_one_line_for_all_ranks(tmp_path: Path) -> None:
    chain = [recipe(tmp_path / "none", tmp_path / "runs")]
    first, _ = run_ranks(chain, chain)
    (line,) = first.failures
    assert line.count("rank ") == 2
    assert "no such shards folder" in line


def test_a_shard_shorter_than_in_the_manifest_is_named(shards: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(shards, cut)
    tar = sorted(cut.glob("*.tar"))[0]
    os.chmod(tar, stat.S_IRUSR | stat.S_IWUSR)
    os.truncate(tar, 1000)
    (outcome,) = run_ranks([recipe(cut, tmp_path / "runs")])
    assert f"{tar}: has 1000 bytes" in outcome.failures[0]


def test_a_rank_that_hangs_names_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(module, "version_facts", lambda: release.wait(100))
    try:
        first, second = run_ranks([], [], timeout_s=10.0)
    finally:
        release.set()
    assert first.must_exit
    assert second.must_exit
    assert "versions: did not end within" in first.failures[0]


def test_a_failed_all_reduce_names_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def reduce(world: World, limit_s: float) -> float:  # noqa: ARG001
        if world.rank == 1:
            raise RuntimeError("Connection closed by peer\nException raised from ...")
        return 1.0

    monkeypatch.setattr(module, "time_all_reduce", reduce)
    first, _ = run_ranks([], [])
    (line,) = first.failures
    assert line.startswith("rank 1 (")
    assert line.endswith("all-reduce: RuntimeError: Connection closed by peer")


def test_clock_skew_is_noted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome()
    facts = rank_facts(1) | {"shards": {}}
    outcome.ranks = [facts]
    main = module._MainRank.__new__(module._MainRank)
    main.outcome = outcome
    monkeypatch.setattr(main, "_collect", lambda *_: {1: 1090.0})
    main._note_skew(1000.0)
    report(outcome, World(0, 0, 2, "127.0.0.1", 1))
    assert "note: rank 1 (n1): its clock is 90.0 s ahead of rank 0's" in capsys.readouterr().out


def rank_facts(rank: int, host: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the facts of a rank on a node with four ranks."""
    return {
        "rank": rank, "local_rank": rank % 4, "host": host or f"n{rank // 4 + 1}", "failures": [],
        "device": {"kind": "cuda", "name": "H200", "id": f"GPU-{rank}"}, "versions": {"torch": "2.15.0"},
        "shards": {"/data": "a" * 64}, **more,
    }  # fmt: skip


def test_equal_ranks_have_no_differences() -> None:
    assert differences([rank_facts(rank) for rank in range(8)]) == []


def test_a_node_with_another_version_is_one_line() -> None:
    ranks = [rank_facts(rank, versions={"torch": "2.6.0" if rank in (5, 6) else "2.15.0"}) for rank in range(8)]
    assert differences(ranks) == [
        "rank 5 (n2), rank 6 (n2): torch is 2.6.0, but 2.15.0 on rank 0 (n1): install the same version on every node"
    ]


def test_a_manifest_that_differs_is_named_with_its_node() -> None:
    ranks = [rank_facts(rank, shards={"/data": ("b" if rank == 7 else "a") * 64}) for rank in range(8)]
    (line,) = differences(ranks)
    assert line.startswith("rank 7 (n2): manifest of /data is bbbb")


def test_two_ranks_on_one_gpu_are_named() -> None:
    ranks = [rank_facts(rank, device={"kind": "cuda", "name": "H200", "id": "GPU-0"}) for rank in (0, 1)]
    (line,) = differences(ranks)
    assert line == "rank 0 (n1), rank 1 (n1): share one GPU (GPU-0): give each rank its own"


def test_equal_gpu_names_on_two_nodes_are_two_gpus() -> None:
    ranks = [rank_facts(rank, device={"kind": "cuda", "name": "H200", "id": "GPU-0"}) for rank in (0, 4)]
    assert differences(ranks) == []


def test_a_rank_without_gpu_among_others_is_named() -> None:
    ranks = [rank_facts(rank) for rank in range(3)] + [rank_facts(3, device={"kind": "cpu", "name": "CPU"})]
    assert differences(ranks) == ["rank 3 (n1): device is cpu, but cuda on rank 0 (n1): request GPUs"]


def test_many_ranks_with_one_failure_are_one_short_line() -> None:
    ranks = [rank_facts(rank, failures=["no such shards folder"]) for rank in range(64)]
    assert differences(ranks) == ["64 ranks from rank 0 (n1) to rank 63 (n16): no such shards folder"]


def test_any_exception_of_a_check_is_one_failure_line() -> None:
    facts: dict[str, Any] = {"failures": []}

    def fail() -> None:
        raise OSError("stale file handle\nsecond line")

    assert attempt(facts, "shards", fail, 10.0)
    assert facts == {"failures": ["shards: OSError: stale file handle"]}


def test_gpus_that_torch_cannot_see_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    world = World(0, 0, 1, "127.0.0.1", 1)
    assert device_facts(world, {})["kind"] == "cpu"
    with pytest.raises(UserError, match="torch sees none"):
        device_facts(world, {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_fewer_gpus_than_local_ranks_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="needs 2 visible GPUs and sees 1"):
        device_facts(World(1, 1, 2, "127.0.0.1", 1), {})


@pytest.mark.parametrize(
    ("text", "tasks"), [("", []), ("1", [1]), ("2(x2)", [2, 2]), ("4(x2),1", [4, 4, 1]), ("1,3(x2)", [1, 3, 3])]
)
def test_tasks_per_node_are_parsed_in_slurms_format(text: str, tasks: list[int]) -> None:
    assert tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    ("distribution", "hosts"),
    [("block", ["n1", "n1", "n2"]), ("cyclic", ["n1", "n2", "n1"]), (None, ["n1", "n1", "n2"])],
)
def test_slurm_tells_the_node_of_a_rank_that_never_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str | None, hosts: list[str]
) -> None:
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    if distribution:
        environment["SLURM_DISTRIBUTION"] = distribution
    assert planned_hosts(environment, 3, {}) == dict(enumerate(hosts))


def test_other_ranks_tell_the_node_under_torchrun() -> None:
    planned = planned_hosts({"LOCAL_WORLD_SIZE": "2"}, 6, {0: "n1", 1: "n1", 2: "n2"})
    assert planned == {0: "n1", 1: "n1", 2: "n2", 3: "n2", 4: "node number 2", 5: "node number 2"}


def test_a_file_with_the_token_of_another_preflight_fails(tmp_path: Path) -> None:
    first, second = SharedFolderProbe(tmp_path, "a"), SharedFolderProbe(tmp_path, "a")
    first.create()
    assert second.sees(0)
    (tmp_path / ".preflight-a" / "0").write_text("b 0")
    assert not second.sees(0)
    with pytest.raises(UserError, match="not the same folder"):
        second.join(1)
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_node_has_the_name_that_slurm_gave_it() -> None:
    """Check that Slurm's node name wins: several nodes may share one host name, as containers do."""
    assert node_name({"SLURMD_NODENAME": "n2"}) == "n2"
    assert node_name({}) == socket.gethostname()
