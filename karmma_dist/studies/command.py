"""The command `karmma-dist study`: show the plan, submit it to Slurm, or carry it out and print the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from karmma_dist.evaluation.report import terminal
from karmma_dist.progress import Progress
from karmma_dist.studies.costs import plan_costs
from karmma_dist.studies.jobs import write_recipe
from karmma_dist.studies.plan import StudyPlan, plan_study
from karmma_dist.studies.plan_table import print_plan
from karmma_dist.studies.report import study_table
from karmma_dist.studies.run import carry_out_study, check_teachers
from karmma_dist.studies.slurm import plan_arrays, shown_arrays, submit_arrays
from karmma_dist.studies.study import StudyFile
from karmma_dist.terminal import console, print_line


@dataclass(frozen=True)
class StudyRequest:
    """The options of the command."""

    file: StudyFile
    seeds: int | None
    local: int
    only: tuple[str, ...]
    overrides: tuple[str, ...]
    out: Path | None
    gpu: str
    """GPU whose hours are shown."""

    @property
    def arguments(self) -> list[str]:
        """Command-line arguments that carry out the same study locally."""
        words = [str(self.file.path), *(f"--only={label}" for label in self.only)]
        words += [f"--set={override}" for override in self.overrides]
        optional = {"seeds": self.seeds, "out": self.out}
        return [*words, *(f"--{name}={value}" for name, value in optional.items() if value is not None)]

    def plan(self) -> StudyPlan:
        """Plan the runs.

        Raises:
            UserError: see `plan_study`.
        """
        return plan_study(self.file, self.seeds, self.only, self.overrides)


def shown_plan(request: StudyRequest) -> None:
    """Print each run once with its state and cost, and the totals. Neither shards nor weights are needed.

    Raises:
        UserError: see `plan_costs` and `print_plan`.
    """
    plan = request.plan()
    check_teachers(plan)
    if not plan.file.study.is_measured:
        print_line(f"{plan.file.name}: no column needs training")
        return
    print_plan(plan, plan_costs(plan), request.gpu)


def submitted(request: StudyRequest, is_dry: bool) -> list[str]:
    """Submit the study and return a line per job; with `is_dry`, only return the shell commands.

    Args:
        request: Options of the command.
        is_dry: True to submit nothing.

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
    """Carry out a study and print its table; return False if a run is missing.

    Raises:
        UserError: see `carry_out_study`.
        Stopped: a signal stopped the study.
    """
    plan = request.plan()
    with Progress() as progress:
        done = carry_out_study(
            plan, request.out or plan.out, request.local, progress, lambda line: print_line(line, err=True)
        )
    terminal.print_table(study_table(done.report), console(), has_asides=False)
    print_line(f"report: {done.path}")
    for name, reason in done.report.missing.items():
        print_line(f"missing: {name}: {reason}", err=True)
    return not done.report.missing
