"""What `karmma-dist eval` does: evaluate one run, or compare several, as it was asked to, write it down and say it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from karmma_dist.errors import UserError
from karmma_dist.evaluation.compare_runs import evaluate_and_compare, plan_runs, to_dict, write_comparison, write_one
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.exports import Exports
from karmma_dist.evaluation.plan import Plan, check_folder, plan_evaluation
from karmma_dist.evaluation.ranks import joined_ranks
from karmma_dist.evaluation.report.write import results_table
from karmma_dist.evaluation.run import Evaluated, carry_out, newest_finished_run
from karmma_dist.evaluation.views import parse_views
from karmma_dist.modality import parse_modalities
from karmma_dist.progress import Progress, Report, silent

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
        return any(one.results.summary["num_damaged"] for one in self.done.values())

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
        UserError: see `plan.plan_evaluation`, `compare_runs.plan_runs` and `run.carry_out`.
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
            click.echo(f"split '{split}' has no labels: predictions only, nothing is scored", err=True)
    if as_text and found.report is not None:
        for name, one in found.done.items():
            Console().print(results_table(one.results, name), "")
        click.echo(f"report: {found.report}")
    for name, one in found.done.items():
        summary = one.results.summary
        if summary["num_damaged"]:
            click.echo(
                f"{name}: {summary['num_damaged']} clips are damaged and not counted, the first: "
                f"{summary['damage'][0]} (karmma-dist verify names them all)", err=True,
            )  # fmt: skip
