"""The demo, all steps in one command: synthetic raw clips -> shards -> encoders -> teacher -> students -> report.

    OUT/raw/             untrimmed recordings with audio and official-style CSVs, in Epic-Kitchens' layout
    OUT/shards/          packed shards
    OUT/runs/            one folder per run
    OUT/training/        the resolved recipe and the output of each run
    OUT/comparison.json  results of the students, and paired tests between them
    OUT/report.md        results with plots; report.html: the same in one file

A repeated run does only the unfinished steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from karmma_dist.errors import UserError
from karmma_dist.evaluation.command import COMPARISON, evaluate_and_compare, to_dict
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.plan import plan_evaluation
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.write import RESULTS, write_report
from karmma_dist.evaluation.results import parse_results
from karmma_dist.evaluation.run import Evaluated, carry_out
from karmma_dist.evaluation.statistics.compare import parse_comparison
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import whole_folder, write_json
from karmma_dist.io.json_fields import JsonObject, read_json
from karmma_dist.models.weights import own_weights
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.progress import Report
from karmma_dist.recipe import Recipe, load_chain
from karmma_dist.runs.owner import owned
from karmma_dist.studies.jobs import train_runs
from karmma_dist.studies.plan import StudyRun

STUDENTS = {"Baseline": "baseline", "Baseline + dropout": "baseline_dropout", "KARMMA student": "distill"}
"""Models of the report and their recipes under recipes/demo/."""

Done = TypeVar("Done")

_SEED = 0
_NUM_SEEDS = 3


def run_demo(out: Path, report: Report) -> Path:
    """Run the demo in `out` and return the path of its report.

    Raises:
        UserError: another demo runs in `out`, or `out` holds another demo's files.
    """
    with owned(out, "a demo is running", report):
        return _run_steps(out, report)


def _run_steps(out: Path, report: Report) -> Path:
    timings = Timings(out / "timings.json")
    raw, shards = out / "raw", out / "shards"
    if not raw.exists():
        timings.measure("make raw recordings", partial(_make_raw, raw, report))
    spec = load_spec("demo", raw=raw, out=shards)
    timings.measure("pack", partial(pack, spec, workers=2, progress=report))
    recipes = _recipes(out)
    timings.measure(f"train {len(recipes)} models", partial(train_side_by_side, out, recipes, report))
    runs = {title: recipes[f"demo/{name}"].run_dir for title, name in STUDENTS.items()}
    found = compare_students(out, runs, timings, report)
    notes = [
        "The clips are synthetic: the figures show how the three ways of training compare, not what a model "
        "reaches on real recordings.",
        f"Everything lies in {out}: raw recordings, shards, and one folder per run.",
    ]
    title = "karmma-dist demo: a synthetic kitchen with failing sensors"
    file = str(out / COMPARISON)
    models = {name: parse_results(results, file) for name, results in found["models"].items()}
    comparison = parse_comparison(found["comparison"], file)
    return write_report(out, ReportContent(title, models, notes, timings.seconds, comparison))


def train_side_by_side(out: Path, recipes: Mapping[str, Recipe], report: Report) -> None:
    """Train the unfinished models, as many at a time as the machine has cores, at most two.

    Raises:
        UserError: a model could not be trained.
        Stopped: a signal ended the training, after saving.
    """
    runs = []
    for name, recipe in recipes.items():
        earlier = [str(recipes[other].run_dir / "recipe.yaml") for other in recipe.after]
        runs.append(StudyRun(recipe.model_copy(update={"after": earlier}), tuple(recipe.after), name))
    failed = train_runs(runs, out / "training", min(2, len(os.sched_getaffinity(0))), lambda _: None, report)
    for name, reason in failed.items():
        raise UserError(f"{name}: {reason}")


def compare_students(out: Path, runs: Mapping[str, Path], timings: Timings, report: Report) -> dict[str, Any]:
    """Evaluate runs and compare them, unless `out`/comparison.json holds their results.

    Args:
        out: Folder of comparison.json.
        runs: Run folder by model name.
        timings: Record of the time of each evaluation.
        report: Progress callback.

    Returns:
        The object of comparison.json: results by model, and their comparison.

    Raises:
        UserError: a run has no weights, or a file of results cannot be read.
    """
    found = _stored_comparison(out / COMPARISON, runs)
    if found is None:
        titles = {run: title for title, run in runs.items()}

        def evaluate(run: Path) -> Evaluated:
            work = partial(carry_out, plan_evaluation(run, _conditions), report)
            return replace(timings.measure(f"evaluate {titles[run]}", work), name=titles[run])

        found = to_dict(*evaluate_and_compare(list(runs.values()), evaluate))
        write_json(out / COMPARISON, found)
    return found


def _stored_comparison(path: Path, runs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Return the object of comparison.json if it compares the runs' current results of their current weights, or None.

    Stored results cannot be compared again: a comparison needs results per clip, which only an evaluation has.
    """
    stored = {title: run / "eval" / RESULTS for title, run in runs.items()}
    if not all(file.is_file() for file in (path, *stored.values())):
        return None
    if any(own_weights(run).stat().st_mtime_ns > stored[title].stat().st_mtime_ns for title, run in runs.items()):
        return None
    comparison = _read_object(path)
    results = {title: _read_object(file) for title, file in stored.items()}
    return comparison if "comparison" in comparison and comparison.get("models") == results else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, with_gaps=True).unchecked()
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): remove it to make it again") from None


def _read_seconds(path: Path) -> dict[str, float]:
    content = JsonObject(_read_object(path))
    try:
        return {step: content.number(step) for step in content}
    except ValueError as error:
        raise UserError(f"{path}: {error}: remove it to measure again") from None


def _make_raw(raw: Path, report: Report) -> None:
    """Write the recordings under a temporary name and rename them, so that the folder is complete or absent."""
    make_folder(raw.parent)
    with whole_folder(raw) as partial_raw:
        write_kitchen(partial_raw, seed=_SEED, progress=report)


def _recipes(out: Path) -> dict[str, Recipe]:
    """Return all recipes of the demo, each after those it builds on, the longest chain first (two train at a time)."""
    places = [f"runs_dir={out / 'runs'}", f"data.shards={out / 'shards'}"]
    chains = sorted((load_chain(f"demo/{name}", places) for name in STUDENTS.values()), key=len, reverse=True)
    return {recipe.name: recipe for chain in chains for recipe in chain}


def _conditions(modalities: Sequence[str]) -> list[Condition]:
    return build_conditions(modalities, subsets=True, sweep=True, num_seeds=_NUM_SEEDS)


class Timings:
    """The seconds of each step, kept on disk so that an interrupted demo still reports its earlier steps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = _read_seconds(path) if path.is_file() else {}

    def measure(self, step: str, work: Callable[[], Done]) -> Done:
        """Run `work` and return its result; keep the longest time of a repeated step, which may be done already."""
        started = time.perf_counter()
        done = work()
        seconds = time.perf_counter() - started
        make_folder(self._path.parent)
        self.seconds[step] = max(seconds, self.seconds.get(step, 0.0))
        write_json(self._path, self.seconds)
        return done
