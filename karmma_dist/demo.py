"""The whole way in one command: synthetic raw clips -> shards -> encoders -> teacher -> students -> report.

    OUT/raw/       untrimmed recordings with sound and official-style CSVs, in Epic-Kitchens' layout
    OUT/shards/    packed
    OUT/runs/      one folder per run
    OUT/report.md  what was measured, with plots

Running it again does only what is not done yet.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.report import write_report, write_results
from karmma_dist.evaluation.run import evaluate_run, validate
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic import write_kitchen
from karmma_dist.progress import Report
from karmma_dist.recipe import Recipe, load_chain
from karmma_dist.shards import write_json
from karmma_dist.training.session import train_chain

STUDENTS = {"Baseline": "baseline", "Baseline + dropout": "baseline_dropout", "KARMMA student": "distill"}
"""Models of the report and their recipes under recipes/demo/."""

_SEED = 0
_NUM_SEEDS = 3


def run_demo(out: Path, report: Report) -> Path:
    """Run the demo in `out` and return the path of its report.

    Raises:
        UserError: `out` holds another demo's files.
    """
    timings = _Timings(out / "timings.json")
    raw, shards = out / "raw", out / "shards"
    if not raw.exists():
        timings.measure("make raw recordings", partial(_make_raw, raw, report))
    spec = load_spec("demo", raw=raw, out=shards)
    timings.measure("pack", partial(pack, spec, workers=2, progress=report))
    recipes = _recipes(out)
    for recipe in recipes.values():
        timings.measure(f"train {recipe.name}", partial(train_chain, [recipe], validate, report=report))
    models = {}
    for title, name in STUDENTS.items():
        run = recipes[f"demo/{name}"].run_dir
        results_path = run / "eval" / "results.json"
        timings.measure(f"evaluate {title}", partial(_evaluate, run, report))
        models[title] = json.loads(results_path.read_text())
    notes = [
        "The clips are synthetic: the figures show how the three ways of training compare, not what a model "
        "reaches on real recordings.",
        f"Everything lies in {out}: raw recordings, shards, and one folder per run.",
    ]
    title = "karmma-dist demo: a synthetic kitchen with failing sensors"
    return write_report(out, title, models, notes, timings.seconds)


def _make_raw(raw: Path, report: Report) -> None:
    """Write the recordings under a temporary name first: the folder is whole or not there."""
    partial_raw = raw.with_name(".raw.partial")
    shutil.rmtree(partial_raw, ignore_errors=True)
    write_kitchen(partial_raw, seed=_SEED, progress=report)
    partial_raw.rename(raw)


def _recipes(out: Path) -> dict[str, Recipe]:
    """All runs of the demo, each after those it builds on."""
    places = [f"runs_dir={out / 'runs'}", f"data.shards={out / 'shards'}"]
    chains = [load_chain(f"demo/{name}", places) for name in STUDENTS.values()]
    return {recipe.name: recipe for chain in chains for recipe in chain}


def _conditions(modalities: Sequence[str]) -> list[Condition]:
    return build_conditions(modalities, subsets=True, sweep=True, num_seeds=_NUM_SEEDS)


def _evaluate(run: Path, report: Report) -> None:
    write_results(evaluate_run(run, _conditions, report=report).results, run / "eval")


class _Timings:
    """Seconds each step took, kept on disk so that a demo that was cut off still reports its first half."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def measure(self, step: str, work: Callable[[], object]) -> None:
        """Do `work`; a repeat that finds everything done does not replace the time of the first."""
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.seconds[step] = max(seconds, self.seconds.get(step, 0.0))
        write_json(self._path, self.seconds)
