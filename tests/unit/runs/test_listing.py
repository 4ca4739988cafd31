"""`karmma-dist runs` shows the state of every run, including runs that were killed before they could write it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.runs.folder import STATE, write_state
from karmma_dist.runs.listing import Run, find_runs, print_runs
from karmma_dist.runs.process import is_alive, process_info
from kits.patience import HANGS_S

HOUR = 3600.0


def make_run(runs: Path, name: str, state: str | None = None, epochs: int = 4, **values: Any) -> Path:
    """Make a run folder as the trainer does; `state` None: without state.json."""
    folder = runs / name
    folder.mkdir(parents=True)
    recipe = {"name": name, "runs_dir": str(runs), "training": {"epochs": epochs, "batch_size": 6}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if state is not None:
        write_state(folder, state, **values)
    return folder


def log(folder: Path, *lines: dict[str, Any]) -> None:
    """Append to metrics.jsonl."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def train_line(step: int, epoch: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": epoch, "loss": loss, "clips_per_s": 4.0}


def elsewhere() -> dict[str, Any]:
    """Return the info of a process on a machine that this one cannot check."""
    return {"host": "n17", "pid": 12, "machine": "another", "started": 5}


def ended_process() -> dict[str, Any]:
    """Return the info of a process of this machine that has ended."""
    script = "import json; from karmma_dist.runs.process import process_info; print(json.dumps(process_info()))"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS_S, check=True)
    return dict(json.loads(child.stdout))


def only(runs: Path, jobs: dict[str, str] | None = None, **more: Any) -> Run:
    (run,) = find_runs(runs, lambda _: jobs, **more)
    return run


def test_a_run_shows_step_total_loss_and_best_accuracy(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "preempted", why="SIGUSR2 on rank 0")
    log(folder, train_line(10, 0, 2.0), train_line(20, 0, 1.5))
    log(folder, {"kind": "validation", "step": 20, "epoch": 0, "action_top1": 30.0, "verb_top1": 90.0})
    log(folder, train_line(40, 1, 1.25), {"kind": "validation", "step": 40, "epoch": 1, "action_top1": 20.0})
    run = only(tmp_path)
    assert (run.state, run.why) == ("preempted", "SIGUSR2 on rank 0")
    assert (run.step, run.total_steps, run.loss) == (40, 80, 1.25)
    assert run.best == {"metric": "action_top1", "value": 30.0}


def test_the_recorded_best_overrides_the_log(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "finished", step=20)
    log(folder, {"kind": "validation", "step": 20, "epoch": 0, "action_top1": 30.0})
    (folder / "best").mkdir()
    write_state(folder / "best", "best", metric="verb_loss", value=0.5)
    run = only(tmp_path)
    assert run.best == {"metric": "verb_loss", "value": 0.5}
    assert run.name == "student"  # best/ is not listed as a run


def test_steps_per_epoch_are_known_once_an_epoch_is_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "failed", error="UserError: no")
    log(folder, train_line(10, 0, 2.0))
    assert only(tmp_path).total_steps is None
    log(folder, train_line(15, 0, 2.0), train_line(20, 1, 2.0))
    assert only(tmp_path).total_steps == 60


def test_a_metrics_line_cut_by_a_crash_is_skipped(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "failed")
    log(folder, train_line(10, 0, 2.0))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 20, "ep')
    assert (only(tmp_path).step, only(tmp_path).loss) == (10, 2.0)


def test_this_process_is_alive_and_one_that_ended_is_not() -> None:
    assert is_alive(process_info()) is True
    assert is_alive(ended_process()) is False
    assert is_alive({**process_info(), "started": 1}) is False  # an earlier process with the same pid
    assert is_alive(elsewhere()) is None


def test_a_running_run_is_running_while_its_process_lives(tmp_path: Path) -> None:
    make_run(tmp_path, "student", "running")
    run = only(tmp_path, now=10 * HOUR + (tmp_path / "student" / STATE).stat().st_mtime)
    assert (run.state, run.resume) == ("running", None)


def test_a_killed_run_on_this_machine_is_listed_as_died(tmp_path: Path) -> None:
    make_run(tmp_path, "student", "running", **ended_process())
    run = only(tmp_path)
    assert run.state == "died"
    assert run.why is not None
    assert "has ended" in run.why
    assert run.resume == f"karmma-dist train {tmp_path}/student/recipe.yaml"


@pytest.mark.parametrize(
    ("job", "state"),
    [("RUNNING", "running"), ("COMPLETING", "running"), ("PENDING", "preempted"), ("TIMEOUT", "died"), (None, "died")],
)
def test_a_run_on_another_host_follows_its_job_state(tmp_path: Path, job: str | None, state: str) -> None:
    make_run(tmp_path, "student", "running", job_id="41", nodes=2, **elsewhere())
    run = only(tmp_path, {} if job is None else {"41": job})
    assert run.state == state
    command = f"karmma-dist launch {tmp_path}/student/recipe.yaml --slurm --nodes 2"
    assert run.resume == (command if state == "died" else None)


def test_slurm_is_asked_only_about_jobs_that_may_be_alive(tmp_path: Path) -> None:
    make_run(tmp_path, "a", "finished", step=1, job_id="1")
    make_run(tmp_path, "b", "running", **elsewhere(), job_id="2")
    asked: list[list[str]] = []
    find_runs(tmp_path, lambda ids: asked.append(ids))
    assert asked == [["2"]]


def test_a_preempted_run_in_the_queue_has_no_resume_command(tmp_path: Path) -> None:
    make_run(tmp_path, "student", "preempted", why="time limit", job_id="41")
    waiting, gone = only(tmp_path, {"41": "PENDING"}), only(tmp_path, {})
    assert waiting.why == "time limit; job 41 waits in the queue and resumes by itself"
    assert (waiting.resume, waiting.state) == (None, "preempted")
    assert gone.resume is not None


def test_long_silence_of_an_uncheckable_process_may_be_death(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "running", **elsewhere())
    written = (folder / STATE).stat().st_mtime
    assert only(tmp_path, now=written + 60).state == "running"
    late = only(tmp_path, now=written + HOUR)
    assert late.state == "died?"
    assert late.why is not None
    assert "n17" in late.why


def test_a_log_line_is_a_sign_of_life(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "running", **elsewhere())
    written = (folder / STATE).stat().st_mtime
    log(folder, train_line(10, 0, 2.0))
    os.utime(folder / "metrics.jsonl", (written + HOUR, written + HOUR))
    run = only(tmp_path, now=written + HOUR + 60)
    assert run.state == "running"
    assert run.age_s == pytest.approx(60, abs=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "cannot be read"), ('{"state": "fini', "cannot be read"), ("[]", "not an object")],
)
def test_an_unreadable_state_is_damage(tmp_path: Path, content: str, message: str) -> None:
    folder = make_run(tmp_path, "student")
    (folder / STATE).write_text(content)
    run = only(tmp_path)
    assert run.state == "damaged"
    assert message in (run.why or "")
    assert run.resume is None


def test_a_run_without_a_recipe_is_damaged(tmp_path: Path) -> None:
    (make_run(tmp_path, "student", "finished", step=3) / "recipe.yaml").unlink()
    assert only(tmp_path).state == "damaged"


def test_a_run_on_local_ranks_resumes_on_local_ranks(tmp_path: Path) -> None:
    make_run(tmp_path, "student", "interrupted", ranks=2)
    resume = only(tmp_path).resume
    assert resume == f"karmma-dist launch {tmp_path}/student/recipe.yaml --local 2"


def test_a_stopped_run_resumes_after_its_stop_file_is_removed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "student", "stopped")
    (folder / "STOP").touch()
    assert (only(tmp_path).resume or "").startswith(f"rm {folder}/STOP && karmma-dist train ")


def test_a_moved_run_resumes_in_its_new_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "old", "kitchen/student", "failed")
    (tmp_path / "old").rename(tmp_path / "new home")
    words = shlex.split(only(tmp_path).resume or "")
    assert words[-2:] == ["--set", f"runs_dir={tmp_path / 'new home'}"]


def test_runs_are_found_at_any_depth_latest_first(tmp_path: Path) -> None:
    for index, name in enumerate(["a", "kitchen/b", "kitchen/c"]):
        write_state(make_run(tmp_path, name), "finished", step=1, time=1000.0 + index)
    runs = find_runs(tmp_path, now=2000.0)
    assert [run.name for run in runs] == ["kitchen/c", "kitchen/b", "a"]
    assert find_runs(tmp_path / "kitchen" / "b", now=2000.0)[0].name == "b"


def test_the_table_keeps_each_command_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / ("long" * 40)
    make_run(runs, "student", "failed", error="UserError: [video] is\nbroken")
    print_runs(find_runs(runs))
    lines = capsys.readouterr().out.splitlines()
    assert "student: failed: UserError: [video] is broken" in lines
    assert f"student: resume with: karmma-dist train {runs}/student/recipe.yaml" in lines


def test_the_command_prints_json_and_names_a_missing_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "student", "finished", step=3)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["state"], run["step"], run["total_steps"]) for run in shown] == [
        ("student", "finished", 3, 3)
    ]
    assert main(["runs", str(tmp_path / "none")]) == 2
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "none")
