"""Several runs in one command: check that they can be compared, evaluate each, compare, write one report.

    RUN/eval/          each run's own results and report
    runs/comparison/   comparison.json, report.md and its plots
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.evaluation.compare import check_same_clips, check_same_keys, check_shared, compare
from karmma_dist.evaluation.plan import Plan, run_name
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.write import write_report, write_results
from karmma_dist.evaluation.run import Evaluated
from karmma_dist.models.pretrained import CARD, ModelCard
from karmma_dist.models.weight_files import own_weights
from karmma_dist.settings import read_tree, validate
from karmma_dist.shards import write_json

COMPARISON = "comparison.json"


def plan_runs(runs: Sequence[Path], plan: Callable[[Path], Plan]) -> dict[Path, Plan]:
    """Plan the evaluation of every run, so that what is wrong with the last is not found hours later.

    Args:
        runs: Run folders or weights files.
        plan: Plans the evaluation of one of them.

    Raises:
        UserError: as `plan`, or runs that cannot be compared: see `evaluate_and_compare`.
    """
    _check_runs(runs)
    plans = {run: plan(run) for run in runs}
    (first, *_), keys = plans.values(), {run: one.scored_keys for run, one in plans.items()}
    for run, one in plans.items():
        check_same_keys((one.name, keys[run]), (first.name, keys[runs[0]]))
    for one, other in itertools.combinations(plans.values(), 2):
        check_shared([one.name, other.name], set(one.conditions) & set(other.conditions))
    return plans


def evaluate_and_compare(
    runs: Sequence[Path], evaluate: Callable[[Path], Evaluated], writes: bool = True
) -> tuple[dict[str, Evaluated], dict[str, Any]]:
    """Evaluate every run, leave its results and report in its own folder, and compare them.

    Args:
        runs: Run folders or weights files, in the order of the report's columns.
        evaluate: Evaluates one of them.
        writes: False on every rank but one.

    Returns:
        What was evaluated, per name, and what `compare` says.

    Raises:
        UserError: a run named twice, two of the same name, runs of other classes, or evaluated on other clips.
    """
    _check_runs(runs)
    done: dict[str, Evaluated] = {}
    for run in runs:
        one = evaluate(run)
        done[one.name] = one
        check_same_clips({name: of.results for name, of in done.items()})
        if writes:
            write_one(one)
    return done, compare({name: one.results for name, one in done.items()})


def write_one(one: Evaluated) -> Path:
    """Write results and report of one run into its folder, and return the report's path."""
    write_results(one.results, one.folder)
    return write_report(one.folder, ReportContent(title([one]), {one.name: one.results.to_dict()}))


def write_comparison(folder: Path, done: dict[str, Evaluated], comparison: dict[str, Any]) -> Path:
    """Write comparison.json, report.md and plots into `folder`, and return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMPARISON, to_dict(done, comparison))
    models = {name: one.results.to_dict() for name, one in done.items()}
    return write_report(folder, ReportContent(title(list(done.values())), models, comparison=comparison))


def to_dict(done: dict[str, Evaluated], comparison: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: results per model, and the comparison."""
    return {"models": {name: one.results.to_dict() for name, one in done.items()}, "comparison": comparison}


def title(done: Sequence[Evaluated]) -> str:
    """The report's first line."""
    splits = dict.fromkeys(one.data.validation_split for one in done)
    return f"{', '.join(one.name for one in done)} on {', '.join(splits)}"


def _check_runs(runs: Sequence[Path]) -> None:
    """Find before the first long evaluation what can be found in the runs' descriptions."""
    seen: dict[Path, Path] = {}
    names: dict[str, Path] = {}
    cards: dict[Path, ModelCard] = {}
    for run in runs:
        weights = own_weights(run).resolve()
        if weights in seen:
            raise UserError(f"{run}: named twice (as {seen[weights]}): name every run once")
        seen[weights] = run
        name = run_name(run)
        if name in names:
            raise UserError(
                f"{run} and {names[name]} are both called '{name}': change name: in one's recipe.yaml, or name its "
                "weights file otherwise"
            )
        names[name] = run
        card_path = weights.parent / CARD
        if not card_path.is_file():
            raise UserError(f"{weights}: no {CARD} beside it, so the model to build is unknown")
        cards[run] = validate(read_tree(card_path), ModelCard, str(card_path))
    (first, expected), *others = cards.items()
    for run, card in others:
        if card.heads != expected.heads or (card.classes and expected.classes and card.classes != expected.classes):
            counts = [", ".join(f"{head} {num}" for head, num in of.heads.items()) for of in (card, expected)]
            raise UserError(
                f"{run} and {first} know other classes ({counts[0]}; {counts[1]}): only models of one dataset can be "
                "compared"
            )
