"""Train runs as child processes on this machine, several in parallel, each after the runs that it needs.

A child is `karmma-dist train RECIPE_FILE`, which resumes automatically and dies with this process. SIGINT, SIGTERM and
SIGUSR2 are forwarded: children save and exit. If another study is training a run, this study waits for it.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from karmma_dist.errors import ERROR_FILE, LOST_RANK, Stopped, one_line
from karmma_dist.io.disk_errors import DiskError, free_bytes, make_folder
from karmma_dist.io.files import append, scratch_folder
from karmma_dist.io.locks import FileLock
from karmma_dist.launching.local import rank_command
from karmma_dist.processes import dying_with_parent, kill_sessions, signal_name
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import save_recipe
from karmma_dist.runs.folder import epoch_under_way
from karmma_dist.studies.plan import StudyRun

LOCK = ".study.lock"
"""Lock file in a run's folder, held by the study that trains the run."""

_GRACE_S = 60.0
"""Time in seconds that children have to exit after a signal before they are killed."""
_LOOK_EVERY_S = 1.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_AWAITED = {signal.SIGCHLD, *_FORWARDED}
_PREEMPTED = 85
_LEAST_FREE_BYTES = 1 << 16
"""Free space below which a disk counts as full where a run has left no word on why it failed."""

Say = Callable[[str], None]


@dataclass
class _Child:
    """A training in progress."""

    run: StudyRun
    slot: int
    process: subprocess.Popen[bytes]
    lock: FileLock
    words: Path
    """File for its last line."""
    log: Path
    """File of its output."""
    epoch: int = -1
    started: float = field(default_factory=time.monotonic)


def recipe_file(folder: Path, run: StudyRun) -> Path:
    """Return the path of the resolved recipe of a run, for a study that reports into `folder`."""
    return folder / "recipes" / f"{run.name}.yaml"


def write_recipe(folder: Path, run: StudyRun) -> Path:
    """Write the resolved recipe of a run and return its path."""
    path = recipe_file(folder, run)
    make_folder(path.parent)
    save_recipe(run.recipe, path)
    return path


def train_runs(
    runs: Sequence[StudyRun], folder: Path, num_at_once: int, say: Say, progress: Report = silent
) -> dict[str, str]:
    """Train all runs that are not finished.

    Args:
        runs: Runs, each after the runs that it needs.
        folder: Folder for recipe files and logs.
        num_at_once: Number of children that run in parallel.
        say: Called with one line when a run starts or ends.
        progress: Called when a run reaches another epoch.

    Returns:
        The reason in one line for every run that is not finished, by name.

    Raises:
        UserError: a folder holds a run of another recipe.
        Stopped: a signal arrived, and the children have saved.
    """
    with scratch_folder("karmma-dist-study-") as scratch:  # for last words: `folder` may be on a full disk
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
        workshop = _Workshop(folder, scratch, num_at_once, say, progress, unmasked)
        try:
            return workshop.train(runs)
        finally:
            workshop.kill()
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)


class _Workshop:
    """The running children and the remaining runs."""

    def __init__(
        self, folder: Path, scratch: Path, num_at_once: int, say: Say, progress: Report,
        unmasked: set[int | signal.Signals],
    ) -> None:  # fmt: skip
        self._folder, self._scratch, self._say, self._progress = folder, scratch, say, progress
        self._free = list(range(num_at_once))
        self._num_at_once = num_at_once
        self._children: list[_Child] = []
        self._failed: dict[str, str] = {}
        self._prepare = dying_with_parent(unmasked)
        self._gpus = _visible_gpus()

    def train(self, runs: Sequence[StudyRun]) -> dict[str, str]:
        """Train the runs: see `train_runs`."""
        waiting = {run.name: run for run in runs}
        while waiting or self._children:
            self._give_up(waiting)
            for run in list(waiting.values()):
                is_ready = not any(need in waiting or self._is_running(need) for need in run.needs)
                if self._free and is_ready and self._start(run) is not None:
                    del waiting[run.name]
            if not self._children and not waiting:
                break
            self._wait()
            self._show()
            self._collect()
        return self._failed

    def _give_up(self, waiting: dict[str, StudyRun]) -> None:
        """Mark runs as failed that need a failed run."""
        for run in list(waiting.values()):
            lost = next((need for need in run.needs if need in self._failed), None)
            if lost is not None:
                self._failed[run.name] = f"needs {lost}"
                del waiting[run.name]

    def _is_running(self, name: str) -> bool:
        return any(child.run.name == name for child in self._children)

    def _start(self, run: StudyRun) -> bool | None:
        """Start a child and return True; return False if the run is finished, None if another study trains it."""
        make_folder(run.recipe.run_dir)
        lock = FileLock(run.recipe.run_dir / LOCK)  # held while the child runs
        if not lock.take(wait=False):
            lock.release()
            return None
        if run.state() == "finished":
            lock.release()
            return False
        path = write_recipe(self._folder, run)
        log_path, words = self._folder / "logs" / f"{run.name}.log", self._scratch / f"{run.name}.error"
        make_folder(log_path.parent)
        make_folder(words.parent)
        slot = self._free.pop(0)
        with append(log_path) as log:
            process = subprocess.Popen(
                rank_command(["train", str(path)]), env={**os.environ, **self._environment(slot, words)},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=self._prepare,
            )  # fmt: skip
        self._children.append(_Child(run, slot, process, lock, words, log_path))
        self._say(f"train {run.name}: started")
        return True

    def _environment(self, slot: int, words: Path) -> dict[str, str]:
        threads = max(1, len(os.sched_getaffinity(0)) // self._num_at_once)
        variables = {ERROR_FILE: str(words), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
        if self._gpus:
            variables["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
        return variables

    def _wait(self) -> None:
        received = signal.sigtimedwait(_AWAITED, _LOOK_EVERY_S)
        if received is not None and received.si_signo in _FORWARDED:
            self._end(received.si_signo)

    def _show(self) -> None:
        for child in self._children:
            epoch = epoch_under_way(child.run.recipe.run_dir)
            if epoch != child.epoch:
                child.epoch = epoch
                self._progress(f"train {child.run.name}", epoch, child.run.recipe.training.epochs, "epochs")

    def _end(self, number: int) -> None:
        """Forward a signal, wait for the children and raise `Stopped`."""
        for child in self._children:
            child.process.send_signal(number)
        deadline = time.monotonic() + _GRACE_S
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._say(f"train {child.run.name}: killed, since it had not ended {_GRACE_S:.0f} s after the signal")
        code = 130 if number == signal.SIGINT else _PREEMPTED
        names = ", ".join(child.run.name for child in self._children) or "no run"
        raise Stopped(f"interrupted while {names} trained: run the same command again to resume", code)

    def _collect(self) -> None:
        for child in list(self._children):
            code = child.process.poll()
            if code is None:
                continue
            self._children.remove(child)
            self._free.append(child.slot)
            child.lock.release()
            if code == 0:
                epochs = child.run.recipe.training.epochs
                self._progress(f"train {child.run.name}", epochs, epochs, "epochs")
                self._say(f"train {child.run.name}: finished after {time.monotonic() - child.started:.0f} s")
            else:
                self._failed[child.run.name] = _last_words(child, code)
                self._say(f"train {child.run.name}: failed: {self._failed[child.run.name]}")

    def kill(self) -> None:
        """Kill all remaining processes of the children's sessions."""
        kill_sessions([child.process for child in self._children])
        for child in self._children:
            child.lock.release()


def _last_words(child: _Child, code: int) -> str:
    lines = child.words.read_text("utf-8", "replace").splitlines() if child.words.is_file() else []
    if lines:
        line = one_line(lines[-1].removeprefix(LOST_RANK).removeprefix("error: "))
        return f"{child.log}{line.removeprefix('output')}" if line.startswith("output: ") else line
    cause = f"killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"
    free = free_bytes(child.log.parent)
    if free is not None and free < _LEAST_FREE_BYTES:  # so its output may be lost
        return str(DiskError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(child.log)))
    return f"{cause}: see {child.log}"


def _visible_gpus() -> list[str]:
    """Return numbers or names of the GPUs; each child gets one of them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    torch = sys.modules.get("torch")
    return [] if torch is None else [str(number) for number in range(torch.cuda.device_count())]
