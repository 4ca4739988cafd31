"""The listing of runs: state, progress, best metric, and the command that resumes each run.

All of it is read from the run folders (`recipe.yaml`, `state.json`, `metrics.jsonl`, `best/state.json`). A killed run
cannot update its state.json, which still says `running`, so its process, its Slurm job and its last sign of life are
checked too.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, one_line
from karmma_dist.runs.folder import STATE
from karmma_dist.runs.name import read_written_recipe
from karmma_dist.runs.process import is_alive
from karmma_dist.terminal import print_table

_NO_RUNS = {"checkpoints", "eval", "best", "trace"}
"""Subfolders of a run that never hold another run."""
_SILENT_S = 1800.0
"""Seconds of silence after which a run is presumed dead, unless twenty log lines take longer."""
_QUEUE_TIMEOUT_S = 10.0
"""Seconds after which squeue is given up."""
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"}
"""Slurm's states of a job that waits to start or restart."""
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT", "gone",
}  # fmt: skip
"""Slurm's states of a job that will not run again; "gone" is a job that Slurm no longer knows."""

JobStates = Callable[[list[str]], dict[str, str] | None]
"""A function that returns the states of Slurm jobs by id, without forgotten jobs; None if Slurm cannot be asked."""


@dataclass
class Run:
    """One run folder."""

    name: str
    folder: str
    state: str
    """State of the run. running, preempted, interrupted, stopped, finished or failed: as the run wrote it; died: the
    run wrote running, but its process or job has ended; died?: the run has long been silent, and its process cannot be
    checked from here; damaged: state.json or recipe.yaml cannot be read."""
    why: str | None
    """Cause of the state, in one line, if known."""
    step: int | None
    total_steps: int | None
    """Optimizer steps of the whole run; None until its first epoch is over, when the steps per epoch are known."""
    epochs: int | None
    loss: float | None
    """Loss of the last train line of metrics.jsonl."""
    best: dict[str, Any] | None
    """`metric` and `value` of the best validation."""
    job_id: str | None
    host: str | None
    age_s: float
    """Seconds since the last sign of life."""
    resume: str | None
    """Command that resumes the run; None if the run cannot be resumed or resumes by itself."""


@dataclass
class _Metrics:
    """The latest values in metrics.jsonl."""

    step: int | None = None
    loss: float | None = None
    clips_per_s: float | None = None
    steps_per_epoch: int | None = None
    best: dict[str, Any] | None = None


def find_runs(folder: Path, job_states: JobStates | None = None, now: float | None = None) -> list[Run]:
    """Return all runs in and below `folder`, the latest sign of life first.

    Args:
        folder: Folder of runs, or of one run.
        job_states: Function that asks Slurm; None: `ask_squeue`.
        now: Current time in seconds since the epoch; None: `time.time()`.

    Raises:
        UserError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name a folder of runs, or start a run: karmma-dist train RECIPE")
    now = time.time() if now is None else now
    files = {run: (read_written_recipe(run), _read_state(run)) for run in _run_folders(folder)}
    unsettled = {
        str(state["job_id"])
        for _, state in files.values()
        if state.get("state") in ("running", "preempted") and "job_id" in state
    }
    jobs = (job_states or ask_squeue)(sorted(unsettled)) if unsettled else None
    runs = [_describe(folder, run, recipe, state, jobs, now) for run, (recipe, state) in files.items()]
    return sorted(runs, key=lambda run: run.age_s)


def ask_squeue(ids: list[str]) -> dict[str, str] | None:
    """Return the states of Slurm jobs from squeue, as `JobStates` describes."""
    command = ["squeue", "--noheader", "--format=%A %T", f"--jobs={','.join(ids)}"]
    try:
        squeue = subprocess.run(command, capture_output=True, text=True, timeout=_QUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if squeue.returncode and "Invalid job id" not in squeue.stderr:
        return None
    return {job: state for job, _, state in (line.partition(" ") for line in squeue.stdout.splitlines())}


def print_runs(runs: Iterable[Run]) -> None:
    """Print a table of runs, and below it the cause of each state and the command that resumes each run."""
    rows: list[list[str]] = []
    footer: list[str] = []
    for run in runs:
        best = "" if run.best is None else f"{run.best['metric']} {run.best['value']:.2f}"
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        rows.append(
            [run.name, run.state, _progress(run), loss, best, run.job_id or "", run.host or "", _age(run.age_s)]
        )
        footer += [f"{run.name}: {run.state}: {run.why}"] if run.why else []
        footer += [f"{run.name}: resume with: {run.resume}"] if run.resume else []
    headings = ["run", "state", "step", "loss", "best", "job", "host", "last sign"]
    print_table(headings, rows, right=["step", "loss", "last sign"], footer=footer)


def to_json(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return the fields of each run for JSON."""
    return [asdict(run) for run in runs]


def _run_folders(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        if STATE in files or "recipe.yaml" in files:
            yield Path(parent)
            folders[:] = [name for name in folders if name not in _NO_RUNS]
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _read_state(run: Path) -> dict[str, Any]:
    """Return state.json, or a damaged state with its cause if the file is missing or cannot be read."""
    path = run / STATE
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return {"state": "damaged", "why": f"{path} is missing"}
    except (OSError, ValueError) as error:
        return {"state": "damaged", "why": f"{path} cannot be read: {error}"}
    return state if isinstance(state, dict) else {"state": "damaged", "why": f"{path} is not a JSON object"}


def _describe(
    top: Path, run: Path, recipe: dict[str, Any] | None, state: dict[str, Any], jobs: dict[str, str] | None, now: float
) -> Run:
    metrics = _read_metrics(run)
    training = (recipe or {}).get("training") or {}
    epochs = training.get("epochs")
    job_id = None if state.get("job_id") is None else str(state["job_id"])
    age_s = max(0.0, now - _last_sign(run, state))
    shown, cause = _settle(state, jobs, age_s, _patience_s(training, metrics))
    if recipe is None:
        shown, cause = "damaged", f"{run / 'recipe.yaml'} is missing or not a recipe"
    finished = shown == "finished"
    step = state.get("step", metrics.step)
    total = step if finished else epochs * metrics.steps_per_epoch if epochs and metrics.steps_per_epoch else None
    is_queued = shown == "preempted" and jobs is not None and jobs.get(job_id or "", "gone") not in _ENDED
    can_resume = recipe is not None and not finished and shown not in ("running", "damaged") and not is_queued
    return Run(
        name=str(run.relative_to(top)) if run != top else run.resolve().name, folder=str(run), state=shown, why=cause,
        step=step, total_steps=total, epochs=epochs, loss=metrics.loss, best=_best(run, state) or metrics.best,
        job_id=job_id, host=state.get("host"), age_s=age_s,
        resume=_resume_command(run, recipe, state) if can_resume and recipe else None,
    )  # fmt: skip


def _settle(
    state: Mapping[str, Any], jobs: Mapping[str, str] | None, age_s: float, patience_s: float
) -> tuple[str, str | None]:
    """Return the state to show and its cause, after checking state.json against the process and the Slurm job."""
    written = str(state.get("state", "damaged"))
    cause = next((one_line(state[name]) for name in ("why", "error", "reason") if state.get(name)), None)
    job_id = state.get("job_id")
    job = None if jobs is None or job_id is None else jobs.get(str(job_id), "gone")
    if job in _WAITING and written in ("running", "preempted"):
        if written == "running":
            cause = "its job was requeued while the run was running"
        return "preempted", f"{f'{cause}; ' if cause else ''}job {job_id} waits in the queue and resumes by itself"
    if written != "running":
        return written, cause
    alive = is_alive(state)
    if alive:
        return "running", None
    host = f"{state.get('host', 'its host')}"
    if alive is False:
        return "died", f"process {state['pid']} on {host} has ended"
    if job in _ENDED:
        return "died", f"its job {job_id} is {'no longer known to Slurm' if job == 'gone' else job}"
    if job is None and age_s > patience_s:
        return "died?", f"silent for {_age(age_s)}: its process on {host} cannot be checked from here"
    return "running", None


def _patience_s(training: Mapping[str, Any], metrics: _Metrics) -> float:
    if not metrics.clips_per_s:
        return _SILENT_S
    line_s = training.get("batch_size", 1) * training.get("log_every_steps", 1) / metrics.clips_per_s
    return max(_SILENT_S, 20 * line_s)


def _last_sign(run: Path, state: Mapping[str, Any]) -> float:
    """Return the time at which the run last wrote its state or a line of metrics, in seconds since the epoch."""
    written = [_modified(run / "metrics.jsonl"), float(state.get("time", 0.0))]
    return max(written) or _modified(run / "recipe.yaml")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # not written yet; damage is reported elsewhere


def _read_metrics(run: Path) -> _Metrics:
    metrics = _Metrics()
    try:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return metrics  # no line has been written yet
    for line in reversed(lines):
        entry = _entry(line)
        if entry.get("kind") == "train":
            metrics.step, metrics.loss, metrics.clips_per_s = entry["step"], entry.get("loss"), entry.get("clips_per_s")
            break
    validations = [entry for line in lines if b'"validation"' in line and (entry := _entry(line))]
    metrics.best = _best_of(validations)
    if validations:  # these are written only at the end of an epoch
        metrics.steps_per_epoch = validations[0]["step"] // (validations[0]["epoch"] + 1)
        return metrics
    before = 0
    for entry in map(_entry, lines):
        if entry.get("epoch", 0) > 0:
            metrics.steps_per_epoch = before or None
            break
        before = entry.get("step", before)
    return metrics


def _entry(line: bytes) -> dict[str, Any]:
    """Parse a line of metrics; return an empty entry for a line cut by a crash."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and {"kind", "step", "epoch"} <= entry.keys() else {}


def _best_of(validations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the highest value of the first metric of validations, the percentage by which models are compared."""
    names = [name for entry in validations for name in entry if name not in ("kind", "step", "epoch")]
    if not names:
        return None
    metric = names[0]
    return {"metric": metric, "value": max(entry[metric] for entry in validations if metric in entry)}


def _best(run: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the best validation that the run itself has recorded, or None."""
    for record in (state.get("best"), _read_state(run / "best")):
        if isinstance(record, dict) and {"metric", "value"} <= record.keys():
            return {"metric": record["metric"], "value": record["value"]}
    return None


def _resume_command(run: Path, recipe: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the command that resumes the run as it was started: through Slurm, on several local ranks, or alone."""
    words = [str(run / "recipe.yaml")]
    if (Path(recipe.get("runs_dir", "runs")) / recipe["name"]).resolve() != run.resolve():
        runs_dir = run.resolve()
        for _ in Path(recipe["name"]).parts:
            runs_dir = runs_dir.parent
        words += ["--set", f"runs_dir={runs_dir}"]
    if state.get("job_id"):
        command = ["launch", *words, "--slurm", "--nodes", str(state.get("nodes", 1))]
    elif state.get("ranks", 1) > 1:
        command = ["launch", *words, "--local", str(state["ranks"])]
    else:
        command = ["train", *words]
    line, stop = shlex.join(["karmma-dist", *command]), run / "STOP"
    return f"rm {shlex.quote(str(stop))} && {line}" if stop.exists() else line


def _progress(run: Run) -> str:
    return "" if run.step is None else f"{run.step:,}/{'?' if run.total_steps is None else f'{run.total_steps:,}'}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
