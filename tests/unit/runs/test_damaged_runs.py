"""A run folder whose files are damaged is listed with the cause, and the runs beside it as if it were not there."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import newest_finished_run
from karmma_dist.runs.folder import (
    METRICS,
    STATE,
    epoch_under_way,
    read_state,
    step_of,
    validation_at,
    write_state,
)
from karmma_dist.runs.listing import Run, find_runs
from kits.fuzzing import cases

Damage = Callable[[Path], object]
"""A function that damages a run folder."""


def make_run(folder: Path, state: str = "finished", **values: Any) -> Path:
    """Make a run folder as the trainer does."""
    (folder / "best").mkdir(parents=True)
    recipe = {"name": folder.name, "runs_dir": str(folder.parent), "training": {"epochs": 2, "batch_size": 6}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 10, "epoch": 0, "loss": 2.0, "clips_per_s": 4.0},
        {"kind": "validation", "step": 10, "epoch": 0, "action_top1": 30.0},
        {"kind": "train", "step": 20, "epoch": 1, "loss": 1.5, "clips_per_s": 4.0},
    ]
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_state(folder, state, **{"step": 20, "metrics": {"action_top1": 30.0}, **values})
    write_state(folder / "best", "best", metric="action_top1", value=30.0)
    return folder


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def sparse(path: Path) -> None:
    os.truncate(path, 2 << 30)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def in_state(**values: Any) -> Damage:
    return lambda folder: write_state(folder, "finished", **values)


def in_recipe(**values: Any) -> Damage:
    return lambda folder: (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "bad", **values}))


def in_metrics(content: bytes) -> Damage:
    return lambda folder: (folder / METRICS).write_bytes(content)


LINE = b'{"kind": "train", "step": 30, "epoch": 2, "loss": 1.0}\n'
DAMAGES: dict[str, Damage] = {
    "state_folder": lambda folder: as_folder(folder / STATE),
    "state_fifo": lambda folder: fifo(folder / STATE),
    "state_empty": lambda folder: (folder / STATE).write_text(""),
    "state_huge": lambda folder: sparse(folder / STATE),
    "state_loop": lambda folder: loop(folder / STATE),
    "state_gone": lambda folder: (folder / STATE).unlink(),
    "state_list": lambda folder: (folder / STATE).write_text("[1]"),
    "state_cut": lambda folder: os.truncate(folder / STATE, 20),
    "state_deep": lambda folder: (folder / STATE).write_text("[" * 100_000),
    "state_utf16": lambda folder: (folder / STATE).write_bytes('{"state": "finished"}'.encode("utf-16")),
    "state_twice": lambda folder: (folder / STATE).write_text('{"state": "finished", "state": "failed"}'),
    "state_unnamed": lambda folder: (folder / STATE).write_text("{}"),
    "state_number": lambda folder: (folder / STATE).write_text('{"state": 1}'),
    "time": in_state(time="x"),
    "pid": in_state(pid="a"),
    "step": in_state(step=[]),
    "negative": in_state(step=-1),
    "job": in_state(job_id={}),
    "host": in_state(host=["n1"]),
    "ranks": in_state(ranks="2"),
    "started": in_state(started=1.5),
    "why": in_state(why={"a": 1}),
    "scores": in_state(metrics={"action_top1": "x"}),
    "no_scores": in_state(metrics=[]),
    "best": in_state(best={"metric": 5, "value": "x"}),
    "best_file": lambda folder: (folder / "best" / STATE).write_text("{"),
    "best_value": lambda folder: write_state(folder / "best", "best", metric="a", value="x"),
    "recipe_gone": lambda folder: (folder / "recipe.yaml").unlink(),
    "training": in_recipe(training=5),
    "epochs": in_recipe(training={"epochs": "x"}),
    "batch": in_recipe(training={"epochs": 1, "batch_size": []}),
    "name": in_recipe(name=[7]),
    "runs_dir": in_recipe(runs_dir={}),
    "zero": in_recipe(name="a\0b"),
    "surrogate": lambda folder: (folder / "recipe.yaml").write_text('name: "a\\ud83c"'),
    "metrics_binary": in_metrics(bytes(range(256)) * 4 + b"\n"),
    "metrics_step": in_metrics(b'{"kind": "train", "step": "x", "epoch": 0}\n'),
    "metrics_loss": in_metrics(b'{"kind": "train", "step": 1, "epoch": 0, "loss": "low"}\n'),
    "metrics_scores": in_metrics(b'{"kind": "validation", "step": 1, "epoch": 0, "action_top1": []}\n' + LINE),
    "metrics_long": in_metrics(b"x" * 10_000_000 + b"\n"),
    "metrics_list": in_metrics(b"[1]\n"),
    "metrics_fifo": lambda folder: fifo(folder / METRICS),
    "metrics_folder": lambda folder: as_folder(folder / METRICS),
    "metrics_huge": lambda folder: sparse(folder / METRICS),
}


def listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """Return what `karmma-dist runs --json` says, by name, and check that the table has the same runs."""
    assert main(["runs", str(runs), "--json"]) == 0
    by_name = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert main(["runs", str(runs)]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in by_name)
    return by_name


def expect_good(run: dict[str, Any]) -> None:
    assert (run["state"], run["why"], run["step"], run["total_steps"]) == ("finished", None, 20, 20)
    assert (run["loss"], run["best"]) == (1.5, {"metric": "action_top1", "value": 30.0})


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_listed_with_its_cause_and_hides_no_other(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ("a", "z"):
        make_run(tmp_path / other)
    DAMAGES[name](make_run(tmp_path / "bad"))
    runs = listed(tmp_path, capsys)
    assert set(runs) == {"a", "bad", "z"}
    assert runs["bad"]["state"] == "damaged"
    assert str(tmp_path / "bad") in runs["bad"]["why"]
    assert len(runs["bad"]["why"].splitlines()) == 1
    assert len(runs["bad"]["why"]) < 500
    expect_good(runs["a"])
    expect_good(runs["z"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_without_permission_is_listed(tmp_path: Path) -> None:
    make_run(tmp_path / "bad").chmod(0)
    make_run(tmp_path / "good")
    runs = {run.name: run.state for run in find_runs(tmp_path)}
    (tmp_path / "bad").chmod(0o700)
    assert runs == {"bad": "damaged", "good": "finished"}


def test_a_folder_that_cannot_be_listed_is_listed_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "bad")
    make_run(tmp_path / "good")
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("bad"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    runs = {run.name: run for run in find_runs(tmp_path)}
    assert runs["bad"].state == "damaged"
    assert runs["bad"].why == f"{tmp_path / 'bad'} cannot be read: Permission denied"
    assert runs["good"].state == "finished"


def test_old_runs_with_nan_are_listed_without_these_values(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "old")
    state = {"state": "finished", "time": 5.0, "step": 20, "metrics": {"action_top1": float("nan")}, "best": {}}
    (folder / STATE).write_text(json.dumps({**state, "checkpoint_s": float("inf")}))
    line = {"kind": "train", "step": 20, "epoch": 1, "loss": float("nan"), "clips_per_s": float("inf")}
    (folder / METRICS).write_text(json.dumps(line) + "\n")
    (folder / "best" / STATE).write_text('{"state": "best", "metric": "action_top1", "value": -Infinity}')
    (run,) = find_runs(tmp_path)
    assert (run.state, run.why, run.step, run.loss, run.best) == ("finished", None, 20, None, None)
    assert read_state(folder)["metrics"]["action_top1"] != read_state(folder)["metrics"]["action_top1"]


def test_what_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    write_state(tmp_path, "finished", metrics={"loss": float("nan"), "top1": [float("inf"), 1.0]})
    assert '"metrics":{"loss":null,"top1":[null,1.0]}' in (tmp_path / STATE).read_text()


def test_a_job_with_another_name_does_not_spoil_the_question_to_slurm(tmp_path: Path) -> None:
    elsewhere = {"machine": "another", "started": 5}
    make_run(tmp_path / "a", "running", job_id="41", **elsewhere)
    make_run(tmp_path / "b", "running", job_id="x,--help", **elsewhere)
    asked: list[list[str]] = []

    def states(ids: list[str]) -> dict[str, str]:
        asked.append(ids)
        return {"41": "TIMEOUT"}

    runs: dict[str, Run] = {run.name: run for run in find_runs(tmp_path, states)}
    assert asked == [["41"]]
    assert runs["a"].state == "died"


def test_a_damaged_state_is_neither_new_nor_unfinished(tmp_path: Path) -> None:
    assert read_state(tmp_path) == {}
    folder = make_run(tmp_path / "bad")
    (folder / STATE).write_text('{"state": "finished", "step": "20"}')
    message = r"state\.json cannot be read: step is '20': restore it, or remove it"
    with pytest.raises(UserError, match=message) as caught:
        read_state(folder)
    assert "\n" not in str(caught.value)


def test_the_newest_finished_run_is_chosen_among_those_that_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "old", time=1.0)
    make_run(tmp_path / "new", time=2.0)
    for name, damage in DAMAGES.items():
        damage(make_run(tmp_path / name, "running"))
        if is_readable(tmp_path / name):
            write_state(tmp_path / name, "failed", time=3.0)
    assert newest_finished_run(tmp_path) == tmp_path / "new"
    assert f"{tmp_path / 'state_cut' / STATE} cannot be read" in caplog.text


def is_readable(folder: Path) -> bool:
    try:
        return bool(read_state(folder))
    except UserError:
        return False


@pytest.mark.parametrize("name", [name for name in DAMAGES if name.startswith("metrics_")])
def test_the_epoch_and_the_validation_of_damaged_metrics(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "bad")
    DAMAGES[name](folder)
    assert epoch_under_way(folder) in (0, 2)
    if name in ("metrics_fifo", "metrics_folder", "metrics_huge"):
        with pytest.raises(OSError):
            validation_at(folder, 10)
    elif name != "metrics_scores":
        assert validation_at(folder, 10) is None


def test_steps_of_lines() -> None:
    assert step_of(LINE) == 30
    for line in (b"", b"[1]", b'{"kind": "train", "step": true, "epoch": 0}', b"\xff", b"{" * 100_000):
        assert step_of(line) == 2**62


def mutated(chance: random.Random, content: bytes) -> bytes:
    """Return a file's content with a few bytes changed, removed or repeated, or a value of another type."""
    tokens = [b'"x"', b"[]", b"{}", b"null", b"-1", b"1e999", b"NaN", b"true", b"\xff", b"\x00", b"9" * 400, b"\n", b""]
    for _ in range(chance.randrange(1, 4)):
        start = chance.randrange(len(content) + 1)
        stop = min(len(content), start + chance.choice([0, 1, 1, 3, 20]))
        content = content[:start] + chance.choice(tokens) + content[stop:]
    return content


def test_no_damage_is_a_traceback_or_changes_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    good = [f"good{number}" for number in range(3)]
    for name in good:
        make_run(tmp_path / name)
    for number in cases(100):
        folder = make_run(tmp_path / f"bad{number}", chance.choice(["finished", "failed", "preempted", "running"]))
        path = folder / chance.choice([STATE, METRICS, f"best/{STATE}"])
        path.write_bytes(mutated(chance, path.read_bytes()))
    runs = listed(tmp_path, capsys)
    assert len(runs) == 3 + len(cases(100))
    for name in good:
        expect_good(runs[name])
    assert sum(run["state"] == "damaged" for run in runs.values()) > 30
