"""Carry out a study: train the unfinished runs, evaluate all runs, write the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.evaluation.plan import check_folder
from karmma_dist.evaluation.results import ClipResults
from karmma_dist.models.model_card import CARD, read_card
from karmma_dist.progress import Report
from karmma_dist.runs.owner import owned
from karmma_dist.studies.costs import Counter
from karmma_dist.studies.jobs import train_runs
from karmma_dist.studies.plan import StudyPlan
from karmma_dist.studies.report import ReportRow, StudyReport, write_study_report
from karmma_dist.studies.results import evaluate_run
from karmma_dist.studies.statistics import Resampled, Summary, Test, curve_points
from karmma_dist.studies.study import Column


@dataclass(frozen=True)
class Done:
    """A study that was carried out."""

    report: StudyReport
    path: Path
    """Path of report.md."""


def carry_out_study(plan: StudyPlan, out: Path, num_at_once: int, progress: Report, say: Callable[[str], None]) -> Done:
    """Train, evaluate and report; finished trainings and evaluations are reused.

    Args:
        plan: Planned runs.
        out: Folder for report, recipes and logs.
        num_at_once: Number of runs that train in parallel.
        progress: Called with the progress of trainings and evaluations.
        say: Called with one line about the state of a run.

    Raises:
        UserError: another process carries out this study, a folder holds a run of another recipe, or the report cannot
            be written.
        Stopped: a signal arrived, and the runs in training have saved.
    """
    check_folder(out, "give another with --out")
    check_teachers(plan)
    with owned(out, "this study is being carried out", progress):
        missing: dict[str, str] = {}
        outcomes: dict[str, dict[int, ClipResults]] = {}
        if plan.file.study.is_measured:
            unfinished = [run for run in plan.chosen_runs if run.state() != "finished"]
            missing = train_runs(unfinished, out, num_at_once, say, progress)
            outcomes = _evaluate(plan, progress, missing, say)
        report = _report(plan, outcomes, missing)
        return Done(report, write_study_report(report, out))


def check_teachers(plan: StudyPlan) -> None:
    """Check, before anything is trained, that finished teachers have the same classes as the clips.

    Raises:
        UserError: the classes of a teacher differ; the message names the student and the teacher.
    """
    counter = Counter(plan.file.study)
    for run in plan.chosen_runs:
        distill = run.recipe.distill
        for path in map(run.recipe.find_run, distill.names if distill else []):
            if not (path / CARD).is_file():
                continue
            card = read_card(path / CARD)
            heads = counter.heads(run.recipe)
            if card.heads != heads:
                raise UserError(
                    f"{run.name}: its teacher {path} has the classes {_listed(card.heads)}, but the clips have "
                    f"{_listed(heads)}"
                )


def _listed(heads: dict[str, int]) -> str:
    return ", ".join(f"{head} {num}" for head, num in sorted(heads.items()))


def _evaluate(
    plan: StudyPlan, progress: Report, missing: dict[str, str], say: Callable[[str], None]
) -> dict[str, dict[int, ClipResults]]:
    """Return the results per label and seed; for chosen runs without results, add the reason to `missing`."""
    outcomes: dict[str, dict[int, ClipResults]] = {}
    known: dict[Path, ClipResults] = {}
    for (label, seed), name in plan.cells.items():
        run, weights = plan.runs[name], plan.weights_of(label, seed)
        if name in missing or (label not in plan.chosen and run.state() != "finished"):
            continue
        try:
            if weights not in known:
                known[weights] = evaluate_run(weights, run.recipe, plan.file.study, progress)
        except UserError as error:
            missing[name] = str(error)
            say(f"eval {name}: failed: {error}")
            continue
        outcomes.setdefault(label, {})[seed] = known[weights]
    return outcomes


def _report(plan: StudyPlan, outcomes: dict[str, dict[int, ClipResults]], missing: dict[str, str]) -> StudyReport:
    study = plan.file.study
    measured = [column for column in study.columns if not column.is_cost]
    swept = [p for seeds in outcomes.values() for clips in seeds.values() for p in curve_points(clips.conditions)]
    sweep = [Column(name=f"drop {p:g}", at=f"drop {p:g}") for p in sorted(set(swept))] if study.evaluate.sweep else []
    inner = [column.model_copy(update={"name": f"sweep {column.name}"}) for column in sweep]
    resampled = Resampled(outcomes, [*measured, *inner]) if outcomes else None
    counter = Counter(study)
    rows = []
    for row in study.rows:
        runs = {seed: plan.cells[row.label, seed] for seed in plan.seeds}
        recipe = plan.runs[runs[plan.seeds[0]]].recipe
        cells = {
            column.name: _constant(counter.cost_figure(recipe, column))
            if column.is_cost
            else _measured(resampled, row.label, column.name)
            for column in study.columns
        }
        evaluated = sorted(outcomes.get(row.label, {}))
        points = {column.drop_prob or 0.0: _measured(resampled, row.label, column.name) for column in inner}
        curve = {p: point for p, point in points.items() if point.mean is not None}
        rows.append(ReportRow(row, runs, evaluated, cells, curve if len(curve) > 1 else {}))
    tests = _tests(plan, resampled, outcomes)
    num_clips = 0 if resampled is None else resampled.num_clips
    return StudyReport(plan.file.name, study, plan.seeds, plan.overrides, num_clips, rows, tests, missing)


def _tests(plan: StudyPlan, resampled: Resampled | None, outcomes: dict[str, dict[int, ClipResults]]) -> list[Test]:
    if resampled is None:
        return []
    pairs = [pair for pair in plan.file.study.pairs if all(label in outcomes for label in pair)]
    return resampled.tests(pairs, [column.name for column in plan.file.study.tested_columns])


def _measured(resampled: Resampled | None, label: str, column: str) -> Summary:
    return Summary(None, None, None, {}) if resampled is None else resampled.summary(label, column)


def _constant(value: float | None) -> Summary:
    return Summary(value, None, None, {})
