"""Every kind of file that the package writes, to be written where the disk takes no more.

    unshare --mount python -m kits.disk_writers FOLDER     # writes them on small real disks; see `main`
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from karmma_dist.demo import Timings
from karmma_dist.evaluation.exports import epic_kitchens, something_something
from karmma_dist.evaluation.exports.epic_kitchens import SupervisionLevels
from karmma_dist.evaluation.exports.predictions import write_predictions
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.write import write_report, write_results
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import append_whole, whole_file, whole_folder, write_json, write_whole
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.packing.tars.writer import write_tar
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.runs.folder import write_state
from karmma_dist.studies.results import write_outcomes
from karmma_dist.training.fault_tolerance.damaged_clips import DamageLog
from karmma_dist.training.profiler import Trace
from karmma_dist.training.trackers.run_log import RunLog
from karmma_dist.training.trackers.tensorboard import TensorBoard
from kits.fusion import predict
from kits.recipes import tiny_recipe
from kits.reports import random_results

TEXT = b"0123456789abcdef" * 2000


def recipe_in(folder: Path) -> Recipe:
    return Recipe.model_validate(tiny_recipe(["video"], name="run", runs_dir=str(folder), data={"shards": "none"}))


def _block(folder: Path) -> None:
    with whole_file(folder / "file") as file:
        for start in range(0, len(TEXT), 100):
            file.write(TEXT[start : start + 100])


def _folder(folder: Path) -> None:
    with whole_folder(folder / "raw") as partial:
        write_whole(partial / "inner", TEXT)


def _media(folder: Path) -> None:
    with whole_folder(folder / "raw") as partial:
        write_kitchen(partial, train_recordings=1, validation_recordings=1, clips_per_recording=1)


def _model(folder: Path) -> None:
    recipe = recipe_in(folder)
    save_model(KarmmaModel(recipe.model, recipe.inputs, ["video"], {"verb": 2}), folder / "run", recipe=recipe)


def _submission(folder: Path) -> None:
    scores = {head: np.zeros((3, num), np.float32) for head, num in epic_kitchens.NUM_CLASSES.items()}
    for suffix in ("pkl", "zip"):
        epic_kitchens.write_submission(folder / f"s.{suffix}", ["a", "b", "c"], scores, SupervisionLevels())


def _something(folder: Path) -> None:
    something_something.write_submission(folder / "s.csv", list(map(str, range(300))), {"action": np.zeros((300, 174))})


def _log(folder: Path) -> None:
    make_folder(folder / "run")
    log = RunLog(recipe_in(folder), 0)
    for step in range(5):
        log.write("train", step, 0, {f"value_{number}": 1.0 for number in range(50)})
    log.close()


def _events(folder: Path) -> None:
    make_folder(folder / "run")
    tracker = TensorBoard(recipe_in(folder), 0)
    for step in range(20):
        tracker.write("train", step, 0, {f"value_{number}": 1.0 for number in range(10)})
    tracker.close()


def _damage(folder: Path) -> None:
    log = DamageLog(folder, 1000, 1.0)
    log.share([{"key": str(number), "what": "x" * 100} for number in range(30)])


def _trace(folder: Path) -> None:
    trace = Trace((0, 1), folder / "trace" / "rank0.json.gz")
    trace.before_step(0)
    for _ in range(100):
        torch.ones(3).add(1)
    trace.end()


def _tar(folder: Path) -> None:
    write_tar(folder / "train-000000.tar", ((f"key{number}", {"json": TEXT[:500]}) for number in range(30)))


def _times(folder: Path) -> None:
    Timings(folder / "timings" / "timings.json").measure("x" * 5000, lambda: None)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda folder: write_whole(folder / "file", TEXT),
    "function": lambda folder: write_whole(folder / "file", lambda path: path.write_bytes(TEXT)),
    "block": _block,
    "end": lambda folder: append_whole(folder / "log", TEXT),
    "folder": _folder,
    "json": lambda folder: write_json(folder / "file.json", ["x" * 100] * 100),
    "state": lambda folder: write_state(folder, "finished", why="x" * 5000),
    "recipe": lambda folder: save_recipe(recipe_in(folder), folder / "recipe.yaml"),
    "model": _model,
    "npz": lambda folder: write_predictions(predict()[0], folder / "p.npz"),
    "parquet": lambda folder: write_predictions(predict()[0], folder / "p.parquet"),
    "submission": _submission,
    "submission_csv": _something,
    "results": lambda folder: write_results(random_results(0, num_clips=5), folder / "eval"),
    "report": lambda folder: write_report(folder / "eval", ReportContent("t", {"a": random_results(0, num_clips=5)})),
    "outcomes": lambda folder: write_outcomes(folder / "o.npz", random_results(0, num_clips=200).per_clip),
    "log": _log,
    "events": _events,
    "damage": _damage,
    "trace": _trace,
    "tar": _tar,
    "media": _media,
    "times": _times,
}
"""Functions that write into a folder, by the kind of what they write."""


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process become larger than `num_bytes` inside the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory on a folder inside the block; for a process with mounts of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _attempt(folder: Path, kind: str) -> dict[str, object]:
    """Write, and return what happened."""
    try:
        WRITERS[kind](folder)
    except Exception as error:
        name = getattr(error, "filename", None)
        code = errno.errorcode.get(getattr(error, "errno", None) or 0)
        left = [str(path) for path in folder.rglob("*.partial*")]
        return {"error": type(error).__name__, "errno": code, "file": name, "text": str(error), "left": left}
    return {"error": None}


def main(folder: Path) -> None:
    """Write every kind on disks that are too small, have no name left or are read-only; print a line of JSON for each.

    On the small disks each kind is written again after the disk has grown.
    """
    for kind in WRITERS:
        for pages in (0, 1, 2, 5):
            with disk(folder, "size=10m"):
                (folder / "fill").write_bytes(b"x" * 4096)
                subprocess.run(["mount", "-o", f"remount,size={4096 * (1 + pages)}", str(folder)], check=True)
                result = _attempt(folder, kind)
                subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
                print(json.dumps({"kind": kind, "disk": "full", **result, "again": _attempt(folder, kind)}), flush=True)
        for name, options in (("names", "nr_inodes=1"), ("read-only", "ro")):
            with disk(folder, options):
                result = _attempt(folder, kind)
            print(json.dumps({"kind": kind, "disk": name, **result}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
