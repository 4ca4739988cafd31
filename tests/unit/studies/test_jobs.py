"""Runs of a study are trained in order, several in parallel, each by one study at a time (here by a fake trainer)."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from karmma_dist.errors import Stopped
from karmma_dist.studies import jobs
from karmma_dist.studies.jobs import LOCK, train_runs
from karmma_dist.studies.plan import StudyRun, plan_study
from karmma_dist.studies.study import load_study
from kits.patience import HANGS_S
from kits.studies import STUDY, write_study

AGAIN = "then run the same command again to resume"

TRAINER = """
import itertools, json, os, pathlib, signal, sys, time
recipe = pathlib.Path(sys.argv[1])
name = next(line.split(": ")[1] for line in recipe.read_text().splitlines() if line.startswith("name: "))
run = pathlib.Path("runs") / name
with open("order", "a") as order:
    order.write(f"begin {name}\\n")
behaviour = json.loads(pathlib.Path("behaviour").read_text())
if behaviour.get("fails", "nobody") in name:
    says = behaviour.get("says", "error: shards: no such folder\\n")
    open(os.environ["KARMMA_DIST_ERROR_FILE"], "w").write(says)
    sys.exit(2)
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
pathlib.Path("ready").touch()
time.sleep(behaviour.get("takes_s", 0.05))
until = time.monotonic() + behaviour.get("waits_s", 0)
while time.monotonic() < until:  # until two have run at once
    steps = [1 if line.startswith("begin") else -1 for line in pathlib.Path("order").read_text().splitlines()]
    if max(itertools.accumulate(steps)) > 1:
        break
    time.sleep(0.05)
run.mkdir(parents=True, exist_ok=True)
(run / "recipe.yaml").write_text(recipe.read_text())
(run / "state.json").write_text(json.dumps({"state": "finished"}))
with open("order", "a") as order:
    order.write(f"end {name}\\n")
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StudyRun]:
    """Plan teacher and student for two seeds in a fresh working directory, with the fake trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "rank_command", lambda words: [sys.executable, "-c", TRAINER, words[1]])
    monkeypatch.setattr(jobs, "_LOOK_EVERY_S", 0.05)
    behave()
    write_study(tmp_path, {"rows": STUDY["rows"]})
    return list(plan_study(load_study("tiny/tab0")).runs.values())


def behave(**behaviour: object) -> None:
    Path("behaviour").write_text(json.dumps(behaviour))


def order() -> list[str]:
    return Path("order").read_text().splitlines() if Path("order").is_file() else []


def test_every_run_begins_after_those_it_needs(runs: list[StudyRun]) -> None:
    messages: list[str] = []
    assert train_runs(runs, Path("out"), 2, messages.append) == {}
    happened = order()
    for run in runs:
        for need in run.needs:
            assert happened.index(f"end {need}") < happened.index(f"begin {run.name}")
    assert len([line for line in messages if "finished after" in line]) == 4


def test_at_most_two_runs_train_in_parallel(runs: list[StudyRun]) -> None:
    behave(takes_s=0.3, waits_s=HANGS_S)  # a slow start must not keep them apart
    train_runs(runs, Path("out"), 2, print)
    at_once = most = 0
    for line in order():
        at_once += 1 if line.startswith("begin") else -1
        most = max(most, at_once)
    assert most == 2


def test_finished_runs_are_not_trained_again(runs: list[StudyRun]) -> None:
    train_runs(runs, Path("out"), 2, print)
    before = order()
    assert train_runs(runs, Path("out"), 2, print) == {}
    assert order() == before


def test_a_failed_run_does_not_stop_independent_runs(runs: list[StudyRun]) -> None:
    behave(fails="teacher@seed0")
    missing = train_runs(runs, Path("out"), 1, print)
    student = next(run.name for run in runs if "student" in run.name and run.name.endswith("@seed0"))
    assert missing == {"tiny/teacher@seed0": "shards: no such folder", student: "needs tiny/teacher@seed0"}
    assert len([line for line in order() if line.startswith("end")]) == 2


def test_last_words_do_not_depend_on_the_studys_disk(runs: list[StudyRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "free_bytes", lambda _: 0)
    places: list[Path] = []
    environment = jobs._Workshop._environment

    def note(self: jobs._Workshop, slot: int, words: Path) -> dict[str, str]:
        places.append(words)
        return environment(self, slot, words)

    monkeypatch.setattr(jobs._Workshop, "_environment", note)
    log = "out/logs/tiny/teacher@seed0.log"
    for says, expected in (
        ("error: shards: no such folder\n", "shards: no such folder"),
        ("error: output: No space left on device\n", f"{log}: No space left on device"),
        ("", f"{log}: No space left on device: free some space in out/logs/tiny, {AGAIN}"),
    ):
        behave(fails="teacher@seed0", says=says)
        assert train_runs(runs, Path("out"), 1, print)["tiny/teacher@seed0"] == expected
    assert places
    assert not any(place.is_relative_to(Path("out").absolute()) or place.exists() for place in places)


def test_a_run_that_another_study_trains_is_waited_for(runs: list[StudyRun]) -> None:
    teacher = runs[0]
    teacher.recipe.run_dir.mkdir(parents=True)
    other = open(teacher.recipe.run_dir / LOCK, "ab")  # noqa: SIM115 - held by the other study
    fcntl.flock(other, fcntl.LOCK_EX)
    released = threading.Event()

    def finish() -> None:
        while not Path("ready").is_file():  # the other teacher has started, so this study could not lock the first
            time.sleep(0.02)
        released.set()
        other.close()

    thread = threading.Thread(target=finish)
    thread.start()
    assert train_runs(runs, Path("out"), 2, print) == {}
    thread.join()
    assert released.is_set()
    assert order().count(f"begin {teacher.name}") == 1


def test_ctrl_c_ends_the_children_in_order(runs: list[StudyRun]) -> None:
    behave(takes_s=60)

    def interrupt() -> None:
        while not Path("ready").is_file():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by threads: only the study gets it
    try:
        thread.start()
        with pytest.raises(Stopped, match=r"tiny/teacher@seed0 trained: run the same command again") as stopped:
            train_runs(runs, Path("out"), 1, print)
    finally:
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert stopped.value.exit_code == 130
    assert not [line for line in order() if line.startswith("end")]
