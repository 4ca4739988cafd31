"""Batches divide over ranks and passes within the limit of a device; otherwise the error names alternatives."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.launching.doctor import doctor, machine
from karmma_dist.recipe import Recipe, load_recipe
from karmma_dist.recipe.micro_batches import check_batches, divide_batch, indivisible, nearest_divisible
from karmma_dist.runs.folder import write_state
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.training.chain import train_chain
from karmma_dist.training.checkpoint.resume import differing_fields

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(
    f"{path.parent.name}/{path.stem}"
    for folder in ("epic_kitchens", "epic_kitchens_star", "epic_sounds", "something_something")
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
    if path.stem not in ("base", "expert")
)
GPU = {"name": "H200", "memory_bytes": 139 * 2**30, "capability": "9.0", "error": None}


def recipe(name: str = "student", lanes: int = 0, slurm: dict[str, Any] | None = None, **training: Any) -> Recipe:
    order = {"lanes": lanes, "window": 1} if lanes else {}
    return Recipe.model_validate(
        {
            "name": name, "stage": "supervised",
            "data": {"shards": "somewhere", "modalities": ["audio"], "order": order},
            "model": {"encoders": {"audio": {"name": "small_audio"}}},
            "optimizer": {"warmup_epochs": 0}, "training": training, "slurm": slurm or {},
        }
    )  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_runs_unchanged_on_these_ranks(name: str, num_ranks: int) -> None:
    shipped = load_recipe(name)
    batch_size, limit = shipped.training.batch_size, shipped.training.max_micro_batch_size
    division = divide_batch(shipped, num_ranks)
    assert limit is not None
    assert division.micro_batch_size == min(limit, batch_size // num_ranks)  # passes are as large as possible
    assert division.warning == ""
    schedule = Schedule(2 * batch_size, batch_size, num_ranks, division.accumulation)
    places = [
        place for rank in range(num_ranks) for part in schedule.slices(rank, Position(0, 1), 1)
        for place in range(part.start, part.stop)
    ]  # fmt: skip
    assert places == list(range(batch_size, 2 * batch_size))


@given(st.integers(1, 8), st.integers(1, 60), st.integers(1, 70))
def test_passes_are_equal_within_the_limit_and_minimal_in_number(num_ranks: int, rank_clips: int, limit: int) -> None:
    batch_size = num_ranks * rank_clips
    division = divide_batch(recipe(batch_size=batch_size, max_micro_batch_size=limit), num_ranks)
    assert num_ranks * division.accumulation * division.micro_batch_size == batch_size
    assert division.micro_batch_size <= limit
    fewer = [n for n in range(1, division.accumulation) if rank_clips % n == 0]
    assert all(rank_clips // n > limit for n in fewer)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 1, 4, 100]))
def test_given_accumulation_overrides_the_limit(
    num_ranks: int, accumulation: int, size: int, limit: int | None
) -> None:
    batch_size = num_ranks * accumulation * size
    given_one = recipe(batch_size=batch_size, accumulation=accumulation, max_micro_batch_size=limit)
    division = divide_batch(given_one, num_ranks)
    assert (division.accumulation, division.micro_batch_size) == (accumulation, size)
    assert bool(division.warning) == (limit is not None and size > limit)


@given(st.integers(1, 6), st.integers(1, 60))
def test_without_either_setting_a_rank_uses_one_pass(num_ranks: int, rank_clips: int) -> None:
    assert divide_batch(recipe(batch_size=num_ranks * rank_clips), num_ranks).accumulation == 1


def test_passes_much_smaller_than_the_limit_cause_a_warning() -> None:
    division = divide_batch(recipe(batch_size=104, max_micro_batch_size=12), 8)
    assert str(division) == "104 = 8 ranks x 13 passes x 1 clip"
    assert "13 clips need 13 passes of 1, although 12 clips fit" in division.warning


@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 5), st.sampled_from([0, 1, 2, 3, 8]))
def test_nearest_alternatives_divide_and_no_nearer_one_does(
    batch_size: int, num_ranks: int, accumulation: int, lanes: int
) -> None:
    def is_good(size: int, ranks: int) -> bool:
        return size > 0 and size % (ranks * accumulation) == 0 and (not lanes or size % lanes == 0)

    nearest = nearest_divisible(batch_size, num_ranks, accumulation, lanes)
    good_sizes = [size for size in range(1, 10_000) if size != batch_size and is_good(size, num_ranks)]
    below, above = [s for s in good_sizes if s < batch_size], [s for s in good_sizes if s > batch_size]
    assert nearest.batch_sizes == [*below[-1:], *above[:1]]
    good_ranks = [r for r in range(1, 300) if r != num_ranks and batch_size % (r * accumulation) == 0]
    fewer, more = [r for r in good_ranks if r < num_ranks], [r for r in good_ranks if r > num_ranks]
    assert nearest.num_ranks == [*fewer[-1:], *more[:1]]


@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 5), st.sampled_from([0, 2, 3]))
def test_suggested_option_of_the_error_works(batch_size: int, num_ranks: int, accumulation: int, lanes: int) -> None:
    given_one = recipe(lanes=lanes, batch_size=batch_size, accumulation=accumulation)
    if batch_size % (num_ranks * accumulation) == 0:
        divide_batch(given_one, num_ranks)
        return
    with pytest.raises(UserError) as raised:
        divide_batch(given_one, num_ranks)
    line = str(raised.value)
    assert "\n" not in line
    total, times, parts, rest = map(int, re.findall(r"\((\d+) = (\d+) x (\d+) \+ (\d+)\)", line)[0])
    assert (total, parts) == (batch_size, num_ranks * accumulation)
    assert total == times * parts + rest
    (typed,) = re.findall(r"--set training\.batch_size=(\d+)", line)
    better = recipe(lanes=lanes, batch_size=int(typed), accumulation=accumulation)
    divide_batch(better, num_ranks)
    ranks = line.rpartition("numbers of ranks: ")[2]
    for num in [] if ranks.startswith("none") else ranks.split(" or "):
        divide_batch(given_one, int(num))


def test_error_shows_arithmetic_alternatives_and_an_option() -> None:
    assert indivisible(96, 7) == (
        "training.batch_size 96 does not divide over 7 ranks (96 = 13 x 7 + 5); the nearest batch sizes that do: "
        "91 or 98 (--set training.batch_size=98), the nearest numbers of ranks: 6 or 8"
    )


def test_chain_error_names_the_recipe_and_skips_finished_ones() -> None:
    chain = [recipe("teacher", batch_size=32), recipe("student", batch_size=96)]
    assert [str(division) for division in check_batches(chain, 8)] == [
        "32 = 8 ranks x 1 pass x 4 clips", "96 = 8 ranks x 1 pass x 12 clips"
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"^teacher: .* \(train it first, with --set training\.batch_size=36\)"):
        check_batches(chain, 12)
    assert len(check_batches(chain, 12, done={"teacher"})) == 1
    with pytest.raises(UserError, match=r"^student: .* \(--set training\.batch_size=98\)"):
        check_batches(chain, 7, done={"teacher"})


def test_micro_batch_settings_may_change_on_resume() -> None:
    first = recipe(batch_size=96)
    second = recipe(batch_size=96, accumulation=16, max_micro_batch_size=12)
    assert differing_fields(first, second) == {}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder of runs, with the repository as the working directory."""
    monkeypatch.chdir(ROOT)
    return tmp_path / "runs"


def finish_teacher(runs: Path) -> None:
    folder = runs / "epic_kitchens/teacher"
    folder.mkdir(parents=True)
    write_state(folder, "finished")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "where", [["--local", "7"], ["--slurm", "--nodes", "1", "--gpus-per-node", "7"]], ids=["local", "slurm"]
)
@pytest.mark.parametrize("how", [["--dry-run"], []], ids=["shown", "started"])
def test_launch_refuses_indivisible_batches_before_starting(
    runs: Path, capsys: pytest.CaptureFixture[str], where: list[str], how: list[str]
) -> None:
    finish_teacher(runs)
    assert main(["launch", "epic_kitchens/distill", *where, "--set", f"runs_dir={runs}", *how]) == 2
    assert error_line(capsys) == f"error: epic_kitchens/distill: {indivisible(96, 7)}"
    better = ["--set", "training.batch_size=98", "--dry-run"]
    assert main(["launch", "epic_kitchens/distill", *where, "--set", f"runs_dir={runs}", *better]) == 0


def test_launch_checks_only_unfinished_recipes_of_each_job(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = ["launch", "--set", f"runs_dir={runs}", "--dry-run", "--gpus-per-node", "8"]
    assert main([*launch, "--slurm", "epic_kitchens/distill", "--nodes", "3"]) == 2
    expected = "error: epic_kitchens/teacher: training.batch_size 32 does not divide over 24 ranks"
    assert error_line(capsys).startswith(expected)
    assert main([*launch, "epic_kitchens/teacher", "--then", "epic_kitchens/distill", "--nodes", "3"]) == 2
    assert error_line(capsys).startswith("error: epic_kitchens/teacher: ")
    finish_teacher(runs)
    assert main([*launch, "--slurm", "epic_kitchens/distill", "--nodes", "3"]) == 0
    elsewhere = ["--set", "slurm.extra=[--ntasks-per-node=5]"]  # the job itself checks once it knows its ranks
    assert main([*launch, "--slurm", "epic_kitchens/distill", "--nodes", "7", *elsewhere]) == 0


@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_of_a_job_check_their_batches_before_joining(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    finish_teacher(runs)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 7, "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": 9}
    for name, value in world.items():
        monkeypatch.setenv(name, str(value))
    assert main(["doctor", "--distributed", "epic_kitchens/distill", "--set", f"runs_dir={runs}"]) == 2
    expected = f"error: epic_kitchens/distill: {indivisible(96, 7)}\n"
    assert capsys.readouterr().err == ("" if rank else expected)
    with pytest.raises(UserError, match=r"91 or 98 .* 6 or 8"):
        train_chain([recipe(batch_size=96)], validate)
    assert os.environ["WORLD_SIZE"] == "7"
    assert not list(runs.glob("epic_kitchens/distill*"))


def test_doctor_checks_batches_for_this_machines_gpus(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus: list[dict[str, Any]] = []
    monkeypatch.setattr(
        doctor, "run_probe", lambda *_: ([{"cuda": "13.2", "gpus": gpus, "nccl": "2.30.7", "available": True}], None)
    )
    chain = [recipe(batch_size=96, max_micro_batch_size=12).model_copy(update={"runs_dir": str(runs)})]
    gpus += [GPU] * 8
    batch = doctor.check_devices(1, chain)[-1]
    assert batch == machine.Check("batch", "ok", "96 = 8 ranks x 1 pass x 12 clips")
    gpus.pop()
    batch = doctor.check_devices(1, chain)[-1]
    assert (batch.state, batch.advice) == ("fix", f"student: {indivisible(96, 7)}")
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [batch])
    assert main(["doctor", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["checks"][0]["advice"] == batch.advice
    monkeypatch.setattr(doctor, "diagnose", lambda *_: [batch, machine.Check("disk", "fix", "full", "free some")])
    assert main(["doctor", "--json"]) == 1


def test_doctor_also_checks_the_ranks_of_a_slurm_job(runs: Path) -> None:
    odd = recipe(batch_size=100, slurm={"nodes": 2, "gpus_per_node": 8}).model_copy(update={"runs_dir": str(runs)})
    here, there = machine.check_batch([odd], 0)
    assert (here.state, here.found) == ("ok", "100 = 1 rank x 1 pass x 100 clips")
    assert (there.state, there.advice) == ("note", f"student: {indivisible(100, 16)}")
    (runs / "student").mkdir(parents=True)
    write_state(runs / "student", "finished")
    assert machine.check_batch([odd], 0) == []


def test_shared_memory_counts_the_clips_of_one_pass() -> None:
    total = recipe(batch_size=96, slurm={"nodes": 1, "gpus_per_node": 1})
    parts = recipe(batch_size=96, max_micro_batch_size=12, slurm={"nodes": 1, "gpus_per_node": 1})
    assert machine.shared_memory_bytes(total) == 8 * machine.shared_memory_bytes(parts)
