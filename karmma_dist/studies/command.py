"""What `karmma-dist study` does: show the plan, hand it to Slurm, or carry it out and say what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from karmma_dist.evaluation.report import terminal
from karmma_dist.progress import Progress
from karmma_dist.studies.costs import RunCost, plan_costs
from karmma_dist.studies.jobs import write_recipe
from karmma_dist.studies.plan import StudyPlan, plan_study
from karmma_dist.studies.report import study_table
from karmma_dist.studies.run import carry_out_study, check_teachers
from karmma_dist.studies.slurm import plan_arrays, shown_arrays, submit_arrays
from karmma_dist.studies.study import StudyFile
from karmma_dist.terminal import print_line, print_table

_WIDTH = 140
"""Columns of a table where stdout is not a terminal: names of runs are long."""


@dataclass(frozen=True)
class StudyRequest:
    """The command's options."""

    file: StudyFile
    seeds: int | None
    local: int
    only: tuple[str, ...]
    overrides: tuple[str, ...]
    out: Path | None

    @property
    def arguments(self) -> list[str]:
        """The same study on the command line, carried out where it is started."""
        words = [str(self.file.path), *(f"--only={label}" for label in self.only)]
        words += [f"--set={override}" for override in self.overrides]
        optional = {"seeds": self.seeds, "out": self.out}
        return [*words, *(f"--{name}={value}" for name, value in optional.items() if value is not None)]

    def plan(self) -> StudyPlan:
        """Return the runs.

        Raises:
            UserError: see `plan_study`.
        """
        return plan_study(self.file, self.seeds, self.only, self.overrides)


def shown_plan(request: StudyRequest) -> None:
    """Print each run once with its state and cost, and the totals; needs neither shards nor weights.

    Raises:
        UserError: see `plan_costs`.
    """
    plan = request.plan()
    check_teachers(plan)
    costs = plan_costs(plan) if plan.file.study.is_measured else []
    if not costs:
        print_line(f"{plan.file.name}: no column needs training")
        return
    print_plan(plan, costs)


def submitted(request: StudyRequest, is_dry: bool) -> list[str]:
    """Submit the study and return a line per job, or with `is_dry` the shell lines that would.

    Args:
        request: The options.
        is_dry: True if nothing is to be submitted.

    Raises:
        UserError: see `plan_study`, `plan_arrays` and `submit_arrays`.
    """
    plan = request.plan()
    check_teachers(plan)
    out = request.out or plan.out
    jobs = plan_arrays(plan, out, request.arguments)
    if is_dry:
        return shown_arrays(jobs)
    for run in plan.chosen_runs:
        write_recipe(out, run)
    return submit_arrays(jobs)


def carry_out(request: StudyRequest) -> bool:
    """Carry a study out and print its table; return False where a run is missing.

    Raises:
        UserError: see `carry_out_study`.
        Stopped: by a signal.
    """
    plan = request.plan()
    with Progress() as progress:
        done = carry_out_study(
            plan, request.out or plan.out, request.local, progress, lambda line: print_line(line, err=True)
        )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    terminal.print_table(study_table(done.report), console, has_asides=False)
    print_line(f"report: {done.path}")
    for name, why in done.report.missing.items():
        print_line(f"missing: {name}: {why}", err=True)
    return not done.report.missing


def print_plan(plan: StudyPlan, costs: Sequence[RunCost]) -> None:
    """Print a line per run, in the order to train them, and what each row and the study cost."""
    places = {cost.run.name: place for place, cost in enumerate(costs, 1)}
    rows = []
    for place, cost in enumerate(costs, 1):
        needs = ", ".join(str(places[need]) for need in cost.run.needs)
        passes = f"{cost.run.recipe.training.epochs} x {'?' if cost.clips is None else f'{cost.clips:,}'}"
        rows.append([str(place), cost.run.name, cost.state, needs, passes, flops_text(cost.flops)])
    numbers = ["#", "after", "epochs x clips", "FLOPs"]
    print_table(
        ["#", "run", "state", *numbers[1:]], rows, right=numbers, footer=["", *total_lines(plan, costs)],
        title=f"{plan.file.study.title} ({plan.file.path})", width=_WIDTH,
    )  # fmt: skip


def total_lines(plan: StudyPlan, costs: Sequence[RunCost]) -> list[str]:
    """Return the cost per row, runs that rows share counted with each of them, and of the study, each run once."""
    lines = []
    for label in plan.chosen:
        own = [cost for cost in costs if label in cost.run.labels]
        shared = sum(len(cost.run.labels) > 1 for cost in own)
        aside = f", {shared} of them shared with other rows" if shared else ""
        lines.append(f"{label}: {_sum(own)} in {len(own)} run{'s' * (len(own) != 1)}{aside}")
    left = [cost for cost in costs if cost.state != "finished"]
    lines.append(f"study: {_sum(costs)} in {len(costs)} runs; not finished: {_sum(left)} in {len(left)}")
    return lines


def flops_text(flops: float | None) -> str:
    """Return FLOPs as a person reads them: 1.23e+18."""
    return "?" if flops is None else f"{flops:.2e}"


def _sum(costs: Sequence[RunCost]) -> str:
    known = [cost.flops for cost in costs if cost.flops is not None]
    return f"{flops_text(sum(known) if len(known) == len(costs) else None)} FLOPs"
