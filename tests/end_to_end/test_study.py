"""A study that is killed and started again trains every run once and ends with a report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kits.patience import HANGS_S
from kits.studies import LATER, STUDY, write_study

COMMAND = [sys.executable, "-m", "karmma_dist", "study", "tiny/tab0", "--local", "2"]
BEST = {"label": "best", "recipe": "tiny/teacher", "weights": "best"}


def test_a_killed_study_resumes_and_reports(shards: Path, tmp_path: Path) -> None:
    write_study(tmp_path, {"rows": [*STUDY["rows"], BEST, LATER]}, shards)
    runs = tmp_path / "runs" / "tiny"
    with open(tmp_path / "first.log", "w") as log:
        first = subprocess.Popen(COMMAND, cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + HANGS_S
        while not is_finished(runs / "teacher@seed0") and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert is_finished(runs / "teacher@seed0"), (tmp_path / "first.log").read_text()
    assert not any(is_finished(run) for run in runs.glob("student*"))
    before = (runs / "teacher@seed0" / "weights.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "runs" / "memories", ignore_errors=True)  # what a student stored before it was killed

    done = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS_S, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (runs / "teacher@seed0" / "weights.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name.partition("@")[2] for path in runs.iterdir()) == ["seed0"] * 3 + ["seed1"] * 3
    assert [remembered(path) for path in runs.glob("student*")] == [{0.0}, {0.0}]
    assert [remembered(path) for path in runs.glob("later*")] == [{1.0}, {1.0}]
    out = tmp_path / "runs" / "studies" / "tiny" / "tab0"
    assert f"report: {out.relative_to(tmp_path) / 'report.md'}" in done.stdout
    results = json.loads((out / "results.json").read_text())
    teacher, student, best, _ = results["rows"]
    assert [row["evaluated"] for row in results["rows"]] == [[0, 1]] * 4
    assert best["runs"] == teacher["runs"]
    assert best["cells"]["all"] == {**teacher["cells"]["all"], "published": None}  # one epoch
    assert teacher["cells"]["all"]["published"] == 12.5
    assert student["cells"]["all"]["published"] is None
    assert len(teacher["curve"]) == 10
    assert [test["column"] for test in results["tests"]] == ["average"] * 6
    assert "12.50" in (out / "report.md").read_text()
    assert "<svg" in (out / "report.html").read_text()
    assert (out / "drop_curve.png").stat().st_size > 1000


def remembered(run: Path) -> set[float]:
    """Return the shares of remembered clips in the steps of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["remembered_share"] for line in lines if line["kind"] == "train"}


def is_finished(run: Path) -> bool:
    """Return True if the run's state is finished."""
    try:
        return bool(json.loads((run / "state.json").read_text())["state"] == "finished")
    except (OSError, ValueError):
        return False
