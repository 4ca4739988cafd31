"""The sbatch scripts on a real Slurm cluster of two nodes: packing, training, chains, preemption, lost nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.studies import write_study
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
CPU = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
STEPS = 100
STEPS_PER_CHECKPOINT = 20

pytestmark = pytest.mark.slurm


def launch(cluster: Cluster, home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `karmma-dist launch` as on the cluster's login node."""
    command = [sys.executable, "-m", "karmma_dist", "launch", *arguments]
    environment = {**cluster.environment, **variables}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=HANGS_S)


def train(cluster: Cluster, home: Path, name: str) -> tuple[str, Path]:
    """Submit distill.sh for the student under another name; return the job id and the path of its log."""
    log = home / f"{name}.log"
    job = cluster.sbatch(
        *CPU, f"--output={log}", str(SCRIPTS / "distill.sh"), "student.yaml", "--set", f"name={name}",
        cwd=home, KEYS_FOLDER=str(home / "keys"),
    )  # fmt: skip
    return job, log


def steps_done(home: Path, name: str) -> int:
    """Return the last training step in the run's metrics."""
    path = home / "runs" / name / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []  # after the last newline a line is unfinished
    return max((json.loads(line)["step"] for line in lines), default=0)


def losses(home: Path, name: str) -> list[float]:
    """Return the loss of every training step."""
    lines = [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def batches(home: Path, job: str, start: int, killed: bool = False) -> list[list[str]]:
    """Return the clip keys of every global batch that one start of a job trained on, in order.

    One killed rank may have got further than the other: only what both began is a batch.
    """
    ranks = [(home / "keys" / f"{job}-{start}-{rank}").read_text().splitlines() for rank in (0, 1)]
    return [json.loads(first) + json.loads(second) for first, second in zip(*ranks, strict=not killed)]


def seen_twice_and_never(steps: list[list[str]], shards: Path) -> tuple[int, int]:
    """Count, over epochs of five steps, the clips seen more than once in an epoch and those not seen in it."""
    all_keys = {clip.key for clip in ShardFolder(shards).clips("train")}
    epochs = [Counter(key for step in steps[place : place + 5] for key in step) for place in range(0, len(steps), 5)]
    twice = sum(count > 1 for epoch in epochs for count in epoch.values())
    return twice, sum(len(all_keys - epoch.keys()) for epoch in epochs)


def impostor(folder: Path, does: str) -> dict[str, str]:
    """Return the PATH of a job whose karmma-dist is the shell script `does`."""
    program = folder / "karmma-dist"
    program.write_text(f"#!/bin/bash\n{does}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def chain(cluster: Cluster, home: Path) -> tuple[str, str]:
    """The ids of two jobs that have ended: a teacher's, and a student's that was submitted to follow it."""
    variables = {"KEYS_FOLDER": str(home / "keys"), "KARMMA_DIST_PREFLIGHT": "1"}
    done = launch(cluster, home, "teacher.yaml", "--then", "student.yaml", **variables)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    teacher, student = first.split()[1].rstrip(":"), second.split()[1].rstrip(":")
    assert (first, second) == (f"job {teacher}: teacher", f"job {student}: student, after job {teacher}")
    waiting = cluster.job(student)
    assert (waiting["JobState"], waiting["Dependency"]) == ("PENDING", f"afterok:{teacher}(unfulfilled)")
    cluster.wait_until_ended(student, home / f"student_{student}.log")
    return teacher, student


def test_a_student_starts_when_its_teacher_has_finished(
    cluster: Cluster, home: Path, shards: Path, chain: tuple[str, str]
) -> None:
    teacher, student = (cluster.job(job) for job in chain)
    logs = [(home / f"{name}_{job}.log").read_text() for name, job in zip(("teacher", "student"), chain, strict=True)]
    assert (teacher["JobState"], student["JobState"]) == ("COMPLETED", "COMPLETED"), "\n".join(logs)
    assert teacher["NodeList"] == student["NodeList"] == "n[1-2]"
    assert teacher["EndTime"] <= student["StartTime"]
    for log, job in zip(logs, chain, strict=True):
        assert re.search(rf"job {job} .*n\[1-2\].*restart 0 .* 20", log)
        assert "all-reduce" in log  # from the ranks' preflight
        assert f"job {job} ended with status 0" in log
    assert len(losses(home, "student")) == STEPS
    assert seen_twice_and_never(batches(home, chain[1], 0), shards) == (0, 0)
    assert "already finished" in logs[1]  # the teacher, in the student's job


def test_a_student_whose_teacher_fails_leaves_the_queue(cluster: Cluster, home: Path, tmp_path: Path) -> None:
    fails = impostor(tmp_path, 'echo "trained $2"; exit 3')
    done = launch(cluster, home, "teacher.yaml", "--then", "student.yaml", **fails)
    teacher, student = (line.split()[1].rstrip(":") for line in done.stdout.splitlines())
    assert cluster.wait_until_ended(student) == "CANCELLED"
    assert cluster.state(teacher) == "FAILED"
    assert "0: trained teacher.yaml" in (home / f"teacher_{teacher}.log").read_text()
    assert not (home / f"student_{student}.log").exists()


def test_a_job_with_a_wrong_recipe_fails_with_the_reason(cluster: Cluster, home: Path) -> None:
    log = home / "wrong.log"
    (home / "wrong.yaml").write_text("extends: student.yaml\ntraining: {epoch: 3}\n")
    job = cluster.sbatch(*CPU, f"--output={log}", str(SCRIPTS / "teacher.sh"), "wrong.yaml", cwd=home)
    assert cluster.wait_until_ended(job, log) == "FAILED"
    text = log.read_text()
    assert "'training.epoch'" in text
    assert "'epochs'" in text
    assert "Traceback" not in text
    assert f"job {job} ended with status 2" in text
    assert cluster.job(job)["Restarts"] == "0"
    assert cluster.job(job)["ExitCode"] == "2:0"


def test_an_array_of_jobs_packs_what_one_process_packs(
    cluster: Cluster, home: Path, kitchen: Path, shards: Path
) -> None:
    out = home / "packed"
    job = cluster.sbatch(
        "--array=1-3", "--cpus-per-task=1", f"--output={home}/shard_%a.log", str(SCRIPTS / "shard.sh"),
        "demo", "--raw", str(kitchen), "--out", str(out), "--set", "clips_per_shard=8", cwd=home,
    )  # fmt: skip
    for part in (1, 2, 3):
        log = home / f"shard_{part}.log"
        assert cluster.wait_until_ended(f"{job}_{part}", log) == "COMPLETED", log.read_text()
        assert f"demo, part {part}/3 " in log.read_text()
    packed, expected = ({path.name: path for path in folder.glob("*.tar")} for folder in (out, shards))
    assert packed.keys() == expected.keys()
    assert len(packed) > 3
    assert all(packed[name].read_bytes() == expected[name].read_bytes() for name in expected)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, shards)]
    assert manifests[0]["splits"] == manifests[1]["splits"]


@pytest.mark.usefixtures("chain")
def test_a_run_is_evaluated(cluster: Cluster, home: Path) -> None:
    log = home / "eval.log"
    job = cluster.sbatch(
        *CPU, f"--output={log}", str(SCRIPTS / "eval.sh"), "runs/student",
        "--modalities", "V,A", cwd=home,
    )  # fmt: skip
    assert cluster.wait_until_ended(job, log) == "COMPLETED", log.read_text()
    rows = json.loads((home / "runs/student/eval/results.json").read_text())["rows"]
    assert [row["modalities"] for row in rows] == [["video", "audio"]]


def test_a_test_only_launch_submits_nothing(cluster: Cluster, home: Path) -> None:
    before = cluster.command("squeue", "--noheader")
    done = launch(cluster, home, "teacher.yaml", "--then", "student.yaml", "--test-only")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert all("n[1-2]" in line for line in done.stdout.splitlines())
    assert cluster.command("squeue", "--noheader") == before


def test_a_study_trains_in_arrays_and_ends_with_its_report(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    write_study(tmp_path, shards=shards)
    shape = [f"--set=slurm.{field}" for field in ("nodes=1", "gpus_per_node=0", "cpus_per_task=1")]
    command = [sys.executable, "-m", "karmma_dist", "study", "tiny/tab0", "--slurm", *shape]
    done = subprocess.run(
        command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stderr
    teacher, student, report = (line.split()[1].rstrip(":") for line in done.stdout.splitlines())
    assert done.stdout.splitlines()[1].endswith(f", after {teacher}")
    assert done.stdout.splitlines()[2].endswith(f", after {teacher}, {student}")
    log = next(iter(tmp_path.glob(f"*_{report}.log")), tmp_path / "report.log")
    assert cluster.wait_until_ended(report, log, limit_s=400) == "COMPLETED", cluster.logs()
    results = json.loads((tmp_path / "runs/studies/tiny/tab0/results.json").read_text())
    assert [row["evaluated"] for row in results["rows"]] == [[0, 1], [0, 1]]
    assert results["missing"] == {}


def test_an_error_of_sbatch_is_one_line(cluster: Cluster, home: Path) -> None:
    done = launch(cluster, home, "teacher.yaml", "--slurm", "--set", "slurm.partition=nowhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: sbatch ")
    assert "partition" in line
    assert "nowhere" in line


@pytest.mark.usefixtures("chain")
def test_a_preempted_and_robbed_run_ends_as_undisturbed(cluster: Cluster, home: Path, shards: Path) -> None:
    """Warn a run by USR2, take it out by `scontrol requeue`, then kill a node: it trains on every clip once an epoch.

    The warned run goes on at the exact step, the robbed one at its newest checkpoint.
    """
    job, log = train(cluster, home, "disturbed")
    cluster.wait(lambda: steps_done(home, "disturbed") > 3, "training is under way", 120, log)
    cluster.command("scancel", "--signal=USR2", job)
    for restarts in (1, 2):
        cluster.wait(lambda: cluster.job(job)["Restarts"] == str(restarts), "the job is requeued", 120, log)  # noqa: B023
        saved = steps_done(home, "disturbed")
        cluster.wait(lambda: steps_done(home, "disturbed") > saved, "training goes on", 120, log)  # noqa: B023
        if restarts == 1:
            cluster.command("scontrol", "requeue", job)
    checkpoints = home / "runs" / "disturbed" / "checkpoints"
    boundary = checkpoints / f"step-{(saved // STEPS_PER_CHECKPOINT + 1) * STEPS_PER_CHECKPOINT:08d}"
    cluster.wait(boundary.exists, f"{boundary.name} is saved", 120, log)
    cluster.kill_node("n2")
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "3", "the job is requeued", 120, log)
    cluster.start_node("n2")
    assert cluster.wait_until_ended(job, log) == "COMPLETED", log.read_text()
    assert log.read_text().count(f"job {job} ended with status 85, saved: requeued") == 1

    starts = [batches(home, job, start, killed=start == 2) for start in range(4)]
    assert all(starts)
    exact, robbed, last = [*starts[0], *starts[1]], starts[2], starts[3]
    kept = STEPS - len(exact) - len(last)
    assert 0 < kept <= len(robbed)
    assert (len(exact) + kept) % STEPS_PER_CHECKPOINT == 0
    assert seen_twice_and_never([*exact, *robbed[:kept], *last], shards) == (0, 0)
    assert losses(home, "disturbed") == losses(home, "student")
    weights, expected = (load_file(home / "runs" / name / "weights.safetensors") for name in ("disturbed", "student"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_run_always_preempted_stops_at_the_restart_limit(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.sbatch(
        *CPU, f"--output={log}", str(SCRIPTS / "distill.sh"), cwd=tmp_path, KARMMA_DIST_MAX_RESTARTS="1",
        **impostor(tmp_path, "exit 85"),
    )  # fmt: skip
    assert cluster.wait_until_ended(job, log) == "FAILED"
    assert cluster.job(job)["Restarts"] == "1"
    assert re.search("status 85, saved: not requeued after 1 restart", log.read_text())


def test_a_run_that_is_cancelled_saves_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    path = impostor(tmp_path, "trap 'echo saved; exit 85' TERM; echo ready; while true; do sleep 0.1; done")
    job = cluster.sbatch(*CPU, f"--output={log}", str(SCRIPTS / "distill.sh"), cwd=tmp_path, **path)
    cluster.wait(lambda: log.is_file() and log.read_text().count(": ready") == 2, "both ranks are up", 60, log)
    cluster.command("scancel", job)
    cluster.wait(lambda: "ended with" in log.read_text(), "the script writes its last line", 60, log)
    assert cluster.wait_until_ended(job, log) == "CANCELLED"
    assert log.read_text().count(": saved") == 2
    assert f"job {job} ended with status 85\n" in log.read_text()
