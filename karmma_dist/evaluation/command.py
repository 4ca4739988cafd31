"""Carries out `karmma-dist eval`: evaluates one run, or compares several, writes reports and prints them.

    RUN/eval/          each run's own results and report
    runs/comparison/   comparison.json, report.md and its plots
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.exports.exports import Exports
from karmma_dist.evaluation.plan import Plan, check_folder, plan_evaluation, run_name
from karmma_dist.evaluation.report import terminal
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.rows import terminal_rows
from karmma_dist.evaluation.report.write import write_report, write_results
from karmma_dist.evaluation.run import Evaluated, carry_out, joined_ranks, newest_finished_run
from karmma_dist.evaluation.statistics.compare import (
    Comparison,
    check_same_clips,
    check_same_keys,
    check_shared,
    compare,
)
from karmma_dist.evaluation.views import parse_views
from karmma_dist.io.files import write_json
from karmma_dist.modalities import parse_modalities
from karmma_dist.models.model_card import CARD, ModelCard
from karmma_dist.models.weights import own_weights
from karmma_dist.progress import Progress, Report, silent
from karmma_dist.settings import read_tree, validate
from karmma_dist.terminal import print_line

RUNS = Path("runs")
"""Where runs are looked for, and where comparisons go."""


@dataclass(frozen=True)
class Request:
    """The command's options; None and empty: not given."""

    runs: tuple[Path, ...] = ()
    """Run folders or weights files; none: the newest finished run."""
    shards: str | None = None
    split: str | None = None
    drop_prob: float | None = None
    modalities: str | None = None
    subsets: bool = False
    sweep: bool = False
    num_seeds: int = 1
    corrupt: tuple[str, ...] = ()
    annotations: Path | None = None
    views: str | None = None
    exports: Exports = field(default_factory=Exports)
    out: Path | None = None

    def conditions(self, available: Sequence[str]) -> list[Condition]:
        """What is there at inference, of the modalities a model has."""
        chosen = None if self.modalities is None else parse_modalities(self.modalities, available)
        return build_conditions(
            available, modalities=chosen, drop_prob=self.drop_prob, subsets=self.subsets, sweep=self.sweep,
            num_seeds=self.num_seeds, corrupt=self.corrupt,
        )  # fmt: skip

    def plans(self) -> dict[Path, Plan]:
        """What is going to be evaluated, per run, checked before the first clip of the first is read."""
        runs = self.runs or (newest_finished_run(RUNS),)
        plan = partial(
            plan_evaluation, conditions=self.conditions, shards=self.shards, split=self.split,
            annotations=self.annotations, views=None if self.views is None else parse_views(self.views),
            exports=self.exports, out=self.out if len(runs) == 1 else None,
        )  # fmt: skip
        return plan_runs(runs, plan) if len(runs) > 1 else {runs[0]: plan(runs[0])}


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    done: dict[str, Evaluated]
    """Per run."""
    content: dict[str, Any]
    """The JSON object."""
    report: Path | None
    """The report.md; None: there were no labels to score."""

    @property
    def is_damaged(self) -> bool:
        """Whether a clip could not be read."""
        return any(one.results.summary.num_damaged for one in self.done.values())

    def export(self) -> list[str]:
        """Write the predictions and submissions asked for, and return a line about each file.

        Raises:
            UserError: a clip is missing from a submission; results and report are there already.
        """
        return [line for one in self.done.values() for line in one.to_export()]


def answer(request: Request) -> Answer | None:
    """Evaluate as asked, on all ranks of the job, and write reports. Every rank must call this.

    Returns:
        On rank 0 what came out, on the others None.

    Raises:
        UserError: see `plan.plan_evaluation` and `run.carry_out`.
        Stopped: another rank is gone.
    """
    if len(request.runs) > 1 and request.exports.are_wanted:
        raise UserError("eval: --predictions and --submission are of one run: name only that one")
    together = request.out or RUNS / "comparison"
    if len(request.runs) > 1:
        check_folder(together, "name another folder with --out")
    with ExitStack() as stack:
        world = stack.enter_context(joined_ranks())
        plans = request.plans()
        report: Report = stack.enter_context(Progress()) if world.is_main else silent
        if len(plans) > 1:
            done, comparison = evaluate_and_compare(
                list(plans), lambda run: carry_out(plans.pop(run), report, world), writes=world.is_main
            )
            if world.is_main:
                return Answer(done, to_dict(done, comparison), write_comparison(together, done, comparison))
            return None
        (plan,) = plans.values()
        one = carry_out(plan, report, world)
        if not world.is_main:
            return None
        return Answer({one.name: one}, one.results.to_dict(), write_one(one) if one.results.rows else None)


def print_answer(found: Answer, as_text: bool) -> None:
    """Say what came out: on stdout the tables where it is to be text, on stderr what a person should know."""
    for one in found.done.values():
        if not one.results.rows:
            split = one.data.validation_split
            print_line(f"split '{split}' has no labels: predictions only, nothing is scored", err=True)
    if as_text and found.report is not None:
        for name, one in found.done.items():
            terminal.print_table(terminal_rows(one.results, name), Console())
        print_line(f"report: {found.report}")
    for name, one in found.done.items():
        summary = one.results.summary
        if summary.num_damaged:
            print_line(
                f"{name}: {summary.num_damaged} clips are damaged and not counted, the first: "
                f"{summary.damage[0]} (karmma-dist verify names them all)", err=True,
            )  # fmt: skip


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
) -> tuple[dict[str, Evaluated], Comparison]:
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
    return write_report(one.folder, ReportContent(title([one]), {one.name: one.results}))


def write_comparison(folder: Path, done: dict[str, Evaluated], comparison: Comparison) -> Path:
    """Write comparison.json, report.md and plots into `folder`, and return the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMPARISON, to_dict(done, comparison))
    models = {name: one.results for name, one in done.items()}
    return write_report(folder, ReportContent(title(list(done.values())), models, comparison=comparison))


def to_dict(done: dict[str, Evaluated], comparison: Comparison) -> dict[str, Any]:
    """The JSON object: results per model, and the comparison."""
    return {"models": {name: one.results.to_dict() for name, one in done.items()}, "comparison": comparison.to_dict()}


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
