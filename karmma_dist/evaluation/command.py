"""The command `karmma-dist eval`: evaluate one run or compare several, write reports and print them.

    RUN/eval/          results and report of each run
    runs/comparison/   comparison.json, report.md and its plots
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from karmma_dist.distributed.world import World
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
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_json
from karmma_dist.modalities import parse_modalities
from karmma_dist.models.model_card import CARD, ModelCard, read_card
from karmma_dist.models.weights import own_weights
from karmma_dist.progress import Progress, Report, silent
from karmma_dist.recipe import read_run_recipe
from karmma_dist.runs.folder import run_places
from karmma_dist.runs.owner import owned
from karmma_dist.terminal import console, print_line

RUNS = Path("runs")
"""Folder in which runs are looked up and comparisons are written."""


@dataclass(frozen=True)
class Request:
    """The options of the command; None or empty: not given."""

    runs: tuple[Path, ...] = ()
    """Run folders or weights files; empty: the newest finished run."""
    shards: str | None = None
    split: str | None = None
    drop_prob: float | None = None
    modalities: str | None = None
    subsets: bool = False
    sweep: bool = False
    num_seeds: int = 1
    corrupt: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    annotations: Path | None = None
    views: str | None = None
    exports: Exports = field(default_factory=Exports)
    out: Path | None = None

    def conditions(self, available: Sequence[str]) -> list[Condition]:
        """Return the conditions to evaluate, for a model with the modalities `available`."""
        chosen = None if self.modalities is None else parse_modalities(self.modalities, available)
        return build_conditions(
            available, modalities=chosen, drop_prob=self.drop_prob, subsets=self.subsets, sweep=self.sweep,
            num_seeds=self.num_seeds, corrupt=self.corrupt, missing=self.missing,
        )  # fmt: skip

    def plans(self) -> dict[Path, Plan]:
        """Plan the evaluation of each run; everything is checked before the first clip of the first run is read."""
        runs = self.runs or (newest_finished_run(RUNS),)
        plan = partial(
            plan_evaluation, conditions=self.conditions, shards=self.shards, split=self.split,
            annotations=self.annotations, views=None if self.views is None else parse_views(self.views),
            exports=self.exports, out=self.out if len(runs) == 1 else None,
        )  # fmt: skip
        return plan_runs(runs, plan) if len(runs) > 1 else {runs[0]: plan(runs[0])}


@contextmanager
def owned_on_main(folders: Sequence[Path], world: World) -> Iterator[None]:
    """Own the folders that rank 0 writes while the block runs. Every rank must call this.

    Raises:
        UserError: another evaluation writes into one of them.
    """
    from karmma_dist.distributed.collectives import on_main

    with ExitStack() as stack:

        def own() -> None:
            try:
                for folder in folders:
                    stack.enter_context(owned(folder, "an evaluation is being written here"))
            except UserError as error:
                raise UserError(f"{error}; or name another folder with --out") from None

        on_main(own, world)
        yield


@dataclass(frozen=True)
class Evaluation:
    """The evaluated runs of a request."""

    done: dict[str, Evaluated]
    """Evaluated runs by name."""
    content: dict[str, Any]
    """The JSON object."""
    report: Path | None
    """Path of report.md; None: no clip had a label to score."""

    @property
    def is_damaged(self) -> bool:
        """True if a clip could not be read."""
        return any(run.results.summary.num_damaged for run in self.done.values())

    def export(self) -> list[str]:
        """Write the requested predictions and submissions, and return a line about each file.

        Raises:
            UserError: a submission lacks a clip; results and report are already written.
        """
        return [line for run in self.done.values() for line in run.to_export()]


def evaluate_request(request: Request) -> Evaluation | None:
    """Carry out the evaluation on all ranks of the job, and write reports. Every rank must call this.

    Returns:
        The evaluation on rank 0, None on all other ranks.

    Raises:
        UserError: see `plan.plan_evaluation` and `run.carry_out`.
        Stopped: another rank died, hangs or left because of an error.
    """
    if len(request.runs) > 1 and request.exports.are_wanted:
        raise UserError("eval: --predictions and --submission take a single run: name only one")
    comparison_folder = request.out or RUNS / "comparison"
    if len(request.runs) > 1:
        check_folder(comparison_folder, "name another folder with --out")
    with ExitStack() as stack:
        world = stack.enter_context(joined_ranks())
        plans = request.plans()
        folders = [plan.folder for plan in plans.values() if plan.is_scored]
        folders += [comparison_folder] if len(plans) > 1 else []
        stack.enter_context(owned_on_main(folders, world))
        report: Report = stack.enter_context(Progress()) if world.is_main else silent
        if len(plans) > 1:
            done, comparison = evaluate_and_compare(
                list(plans), lambda run: carry_out(plans.pop(run), report, world), writes=world.is_main
            )
            if world.is_main:
                report_path = write_comparison(comparison_folder, done, comparison)
                return Evaluation(done, to_dict(done, comparison), report_path)
            return None
        (plan,) = plans.values()
        run = carry_out(plan, report, world)
        if not world.is_main:
            return None
        return Evaluation({run.name: run}, run.results.to_dict(), write_run(run) if run.results.rows else None)


def print_evaluation(evaluation: Evaluation, as_text: bool) -> None:
    """Print tables on stdout if `as_text`, and notes about labels and damaged clips on stderr."""
    for run in evaluation.done.values():
        if not run.results.rows:
            split = run.data.validation_split
            print_line(f"split '{split}' has no labels: only predictions are written, nothing is scored", err=True)
    if as_text and evaluation.report is not None:
        for name, run in evaluation.done.items():
            terminal.print_table(terminal_rows(run.results, name), console())
        print_line(f"report: {evaluation.report}")
    for name, run in evaluation.done.items():
        summary = run.results.summary
        if summary.num_damaged:
            print_line(
                f"{name}: {summary.num_damaged} clips are damaged and not counted, the first: "
                f"{summary.damage[0]} (karmma-dist verify names them all)", err=True,
            )  # fmt: skip


COMPARISON = "comparison.json"


def plan_runs(runs: Sequence[Path], plan: Callable[[Path], Plan]) -> dict[Path, Plan]:
    """Plan the evaluation of every run, so that a mistake in the last one is found at once, not hours later.

    Args:
        runs: Run folders or weights files.
        plan: Function that plans the evaluation of one run.

    Raises:
        UserError: `plan` raises one, or the runs cannot be compared: see `evaluate_and_compare`.
    """
    _check_runs(runs)
    plans = {run: plan(run) for run in runs}
    keys = {run: planned.scored_keys for run, planned in plans.items()}
    first = plans[runs[0]]
    for run, planned in plans.items():
        if planned.model.heads != first.model.heads:
            raise _other_classes((run, planned.model.heads), (runs[0], first.model.heads))
        check_same_keys((planned.name, keys[run]), (first.name, keys[runs[0]]))
    for planned, other in itertools.combinations(plans.values(), 2):
        check_shared([planned.name, other.name], set(planned.conditions) & set(other.conditions))
    return plans


def evaluate_and_compare(
    runs: Sequence[Path], evaluate: Callable[[Path], Evaluated], writes: bool = True
) -> tuple[dict[str, Evaluated], Comparison]:
    """Evaluate every run, write its results and report into its own folder, and compare the runs.

    Args:
        runs: Run folders or weights files, in the order of the report's columns.
        evaluate: Function that evaluates one run.
        writes: False on every rank but one.

    Returns:
        The evaluated runs by name, and their comparison.

    Raises:
        UserError: a run is named twice, two runs have the same name, or the runs differ in their classes or clips.
    """
    _check_runs(runs)
    done: dict[str, Evaluated] = {}
    for run in runs:
        evaluated = evaluate(run)
        done[evaluated.name] = evaluated
        check_same_clips({name: other.results for name, other in done.items()})
        if writes:
            write_run(evaluated)
    return done, compare({name: evaluated.results for name, evaluated in done.items()})


def write_run(run: Evaluated) -> Path:
    """Write results and report of one run into its folder, and return the report's path."""
    write_results(run.results, run.folder)
    return write_report(run.folder, ReportContent(title([run]), {run.name: run.results}))


def write_comparison(folder: Path, done: dict[str, Evaluated], comparison: Comparison) -> Path:
    """Write comparison.json, report.md and plots into `folder`, and return the report's path."""
    make_folder(folder)
    write_json(folder / COMPARISON, to_dict(done, comparison))
    models = {name: run.results for name, run in done.items()}
    return write_report(folder, ReportContent(title(list(done.values())), models, comparison=comparison))


def to_dict(done: dict[str, Evaluated], comparison: Comparison) -> dict[str, Any]:
    """Return the JSON object: results per model, and the comparison."""
    return {"models": {name: run.results.to_dict() for name, run in done.items()}, "comparison": comparison.to_dict()}


def title(done: Sequence[Evaluated]) -> str:
    """Return the first line of the report."""
    splits = dict.fromkeys(run.data.validation_split for run in done)
    return f"{', '.join(run.name for run in done)} on {', '.join(splits)}"


def _check_runs(runs: Sequence[Path]) -> None:
    """Check the runs' names and model cards before the first long evaluation."""
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
                f"{run} and {names[name]} are both called '{name}': change the name in one recipe.yaml, or rename one "
                "weights file"
            )
        names[name] = run
        card_path = weights.parent / CARD
        if not card_path.is_file():
            raise UserError(f"{weights}: its folder has no {CARD}, so the model to build is unknown")
        if not _is_of_mixture(run):  # its plan tells by which of its heads it is evaluated
            cards[run] = read_card(card_path)
    compared = list(cards.items())
    for run, card in compared[1:]:
        first, expected = compared[0]
        if card.heads != expected.heads or (card.classes and expected.classes and card.classes != expected.classes):
            raise _other_classes((run, card.heads), (first, expected.heads))


def _is_of_mixture(run: Path) -> bool:
    _, home = run_places(run)
    return (home / "recipe.yaml").is_file() and bool(read_run_recipe(home).data.mixture)


def _other_classes(*runs: tuple[Path, Mapping[str, int]]) -> UserError:
    """Return the error of two runs, each given with its heads, that cannot be compared."""
    paths = " and ".join(str(run) for run, _ in runs)
    counts = "; ".join(", ".join(f"{head} {num}" for head, num in heads.items()) for _, heads in runs)
    return UserError(f"{paths} have different classes ({counts}): only models of one dataset can be compared")
