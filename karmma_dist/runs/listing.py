"""The listing of runs: state, progress, best metric, and the command that resumes each run.

All of it is read from the run folders (`recipe.yaml`, `state.json`, `metrics.jsonl`, `best/state.json`). A killed run
cannot update its state.json, which still says `running`, so its process, its Slurm job and its last sign of life are
checked too.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, one_line
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.runs.folder import BEST, METRICS, STATE, MetricsLine, metrics_lines, read_state, run_folders
from karmma_dist.runs.name import read_written_recipe
from karmma_dist.runs.process import is_alive
from karmma_dist.terminal import print_table

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

_NAME = re.compile("[^\\x00\ud800-\udfff]+")
"""A text that can be part of a path."""
_JOB_ID = re.compile("[0-9]{1,18}")
"""Ids of jobs that Slurm may be asked about: another would make it refuse the whole question."""

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
    checked from here; damaged: one of its files cannot be read, or holds what no run writes."""
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
class _Files:
    """What a run folder holds besides its metrics."""

    recipe: dict[str, Any] | None
    """recipe.yaml; None if it cannot be read."""
    state: dict[str, Any]
    """state.json; empty if it cannot be read."""
    best: dict[str, Any]
    """`metric` and `value` of the best validation, as the run recorded it; may be empty."""
    problems: list[str]
    """Causes of the damage, each one line."""

    @property
    def is_known(self) -> bool:
        """True if recipe and state can be read."""
        return self.recipe is not None and bool(self.state)


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
    files = {run: _read_files(run, error) for run, error in run_folders(folder)}
    unsettled = {
        found.state["job_id"]
        for found in files.values()
        if found.state.get("state") in ("running", "preempted") and _JOB_ID.fullmatch(found.state.get("job_id", ""))
    }
    jobs = (job_states or ask_squeue)(sorted(unsettled)) if unsettled else None
    runs = [_describe(folder, run, found, jobs, now) for run, found in files.items()]
    return sorted(runs, key=lambda run: run.age_s)


def ask_squeue(ids: list[str]) -> dict[str, str] | None:
    """Return the states of Slurm jobs from squeue, as `JobStates` describes."""
    command = ["squeue", "--noheader", "--format=%A %T", f"--jobs={','.join(ids)}"]
    try:
        squeue = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_QUEUE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if squeue.returncode and "Invalid job id" not in squeue.stderr:
        return None
    return {job: state for job, _, state in (line.partition(" ") for line in squeue.stdout.splitlines())}


def has_ended(job_state: str | None) -> bool:
    """Return True if a Slurm job of this state does not run and will not; None: Slurm no longer knows the job."""
    return job_state is None or job_state in _ENDED


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


def _read_files(run: Path, error: OSError | None) -> _Files:
    """Read the files of a run folder; `error` is why the folder cannot be listed."""
    if error is not None:
        return _Files(None, {}, {}, [f"{run} cannot be read: {error.strerror}"])
    problems: list[str] = []
    state: dict[str, Any] = {}
    best: dict[str, Any] = {}
    recipe = read_written_recipe(run)
    if recipe is None:
        problems.append(f"{run / 'recipe.yaml'} is missing or not a recipe")
    else:
        try:
            _check_recipe(JsonObject(recipe))
        except ValueError as error:
            problems.append(f"{run / 'recipe.yaml'}: {error}")
            recipe = None
    try:
        state = read_state(run)
        if not state:
            problems.append(f"{run / STATE} is missing")
        best = state.get("best") or read_state(run / BEST)
    except UserError as error:
        problems.append(str(error))
    return _Files(recipe, state, best, problems)


def _check_recipe(recipe: JsonObject) -> None:
    """Check the fields of a recipe that are used here.

    Raises:
        ValueError: a field is of another type.
    """
    for name in ("name", "runs_dir"):
        if name in recipe and not _NAME.fullmatch(recipe.text(name)):
            raise recipe.problem(name)
    training = recipe.nested("training") if recipe.others().get("training") is not None else JsonObject({})
    for name in ("epochs", "batch_size", "log_every_steps"):
        if training.others().get(name) is not None:
            training.whole(name)


def _describe(top: Path, run: Path, files: _Files, jobs: dict[str, str] | None, now: float) -> Run:
    recipe, state, problems = files.recipe, files.state, list(files.problems)
    metrics = _Metrics()
    try:
        metrics = _read_metrics(run)
    except (OSError, ValueError) as error:
        problems.append(f"{run / METRICS}: {getattr(error, 'strerror', None) or error}")
    training = (recipe or {}).get("training") or {}
    epochs = training.get("epochs")
    job_id = state.get("job_id")
    age_s = max(0.0, now - _last_sign(run, state))
    settled, cause = _settle(state, jobs, age_s, _patience_s(training, metrics))
    if problems:
        written = f" (state.json: {settled})" if files.is_known else ""
        cause = one_line("; ".join(problems)) + written
    finished = settled == "finished"
    step = state.get("step", metrics.step)
    total = step if finished else epochs * metrics.steps_per_epoch if epochs and metrics.steps_per_epoch else None
    is_queued = settled == "preempted" and jobs is not None and jobs.get(job_id or "", "gone") not in _ENDED
    can_resume = files.is_known and not finished and settled != "running" and not is_queued
    best = metrics.best
    if {"metric", "value"} <= files.best.keys():
        best = {"metric": files.best["metric"], "value": files.best["value"]}
    return Run(
        name=str(run.relative_to(top)) if run != top else run.resolve().name, folder=str(run),
        state="damaged" if problems else settled, why=cause,
        step=step, total_steps=total, epochs=epochs, loss=metrics.loss, best=best,
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
    written = [_modified(run / METRICS), float(state.get("time", 0.0))]
    return max(written) or _modified(run / "recipe.yaml")


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0  # not written yet; damage is reported elsewhere


def _read_metrics(run: Path) -> _Metrics:
    """Read the lines of metrics.jsonl that matter here; most lines of a long run do not.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no line of metrics; it is named by its number.
    """
    lines = metrics_lines(run)[:-1]  # a crash may have cut what follows the last line break

    def entries(numbers: Iterable[int]) -> Iterator[MetricsLine]:
        for number in numbers:
            try:
                if lines[number]:
                    yield MetricsLine.parse(lines[number])
            except ValueError as error:
                raise ValueError(f"line {number + 1}: {error}") from None

    metrics = _Metrics()
    last = next((entry for entry in entries(reversed(range(len(lines)))) if entry.kind == "train"), None)
    if last is not None:
        metrics.step, metrics.loss, metrics.clips_per_s = last.step, last.number("loss"), last.number("clips_per_s")
    named = [number for number, line in enumerate(lines) if b'"validation"' in line]
    validations = [entry for entry in entries(named) if entry.kind == "validation"]
    metrics.best = _best_of([entry.numbers() for entry in validations])
    if validations:  # these are written only at the end of an epoch
        metrics.steps_per_epoch = validations[0].step // (validations[0].epoch + 1)
        return metrics
    before = 0
    for entry in entries(range(len(lines))):
        if entry.epoch > 0:
            metrics.steps_per_epoch = before or None
            break
        before = entry.step
    return metrics


def _best_of(validations: list[dict[str, float]]) -> dict[str, Any] | None:
    """Return the highest value of the first metric of validations, the percentage by which models are compared."""
    metric = next((name for scores in validations for name in scores), None)
    values = [scores[metric] for scores in validations if metric in scores and math.isfinite(scores[metric])]
    return {"metric": metric, "value": max(values)} if values else None


def _resume_command(run: Path, recipe: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return the command that resumes the run as it was started: through Slurm, on several local ranks, or alone."""
    words = [str(run / "recipe.yaml")]
    real = Path(os.path.realpath(run))
    if not _is_at(Path(recipe.get("runs_dir", "runs")) / recipe["name"], real):
        runs_dir = real
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


def _is_at(path: Path, real: Path) -> bool:
    try:
        return os.path.realpath(path) == str(real)
    except UnicodeEncodeError:  # no file has such a name in this locale
        return False


def _progress(run: Run) -> str:
    return "" if run.step is None else f"{run.step:,}/{'?' if run.total_steps is None else f'{run.total_steps:,}'}"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
