"""The results of a study: results.json for scripts, report.md and report.html for people, a table for the terminal.

    OUT/results.json   report.md   report.html   drop_curve.png
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from karmma_dist.evaluation.report.model import (
    NONE,
    Cell,
    Page,
    Picture,
    Section,
    Table,
    TableLine,
    interval,
    p_equals,
    p_value,
)
from karmma_dist.evaluation.report.plots import Line, Point, line_figure
from karmma_dist.evaluation.report.sections import CURVE_PLOT
from karmma_dist.evaluation.report.sentences import compared_heading
from karmma_dist.evaluation.report.write import RESULTS, write_page
from karmma_dist.evaluation.summary import LEVEL
from karmma_dist.io.files import write_json
from karmma_dist.studies.statistics import Summary, Test
from karmma_dist.studies.study import Column, Row, Study


@dataclass(frozen=True)
class ReportRow:
    """A row of the table with its figures."""

    row: Row
    runs: dict[int, str]
    """The run of each seed."""
    evaluated: list[int]
    """Seeds that were evaluated."""
    cells: dict[str, Summary]
    """By column name."""
    curve: dict[float, Summary] = field(default_factory=dict)
    """Action top-1 by drop probability, where the study sweeps."""


@dataclass(frozen=True)
class StudyReport:
    """Everything the report shows."""

    name: str
    study: Study
    seeds: list[int]
    overrides: Sequence[str]
    num_clips: int
    """Evaluated clips; 0: nothing was evaluated."""
    rows: list[ReportRow]
    tests: list[Test]
    missing: dict[str, str]
    """Why a run is not in the table, by its name."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of results.json."""
        return {
            "study": self.name,
            "title": self.study.title,
            "caption": self.study.caption,
            "seeds": self.seeds,
            "overrides": list(self.overrides),
            "num_clips": self.num_clips,
            "columns": [column.model_dump(mode="json") for column in self.study.columns],
            "rows": [
                {
                    "label": one.row.label,
                    "recipe": one.row.recipe,
                    "set": one.row.set,
                    "weights": one.row.weights,
                    "runs": one.runs,
                    "evaluated": one.evaluated,
                    "cells": {
                        name: {**asdict(cell), "published": one.row.published.get(name)}
                        for name, cell in one.cells.items()
                    },
                    "curve": [{"drop_prob": p, **asdict(point)} for p, point in one.curve.items()],
                    "note": one.row.note,
                }
                for one in self.rows
            ],
            "tests": [asdict(test) for test in self.tests],
            "missing": self.missing,
            "notes": _notes(self),
        }


def write_study_report(report: StudyReport, folder: Path) -> Path:
    """Write everything into `folder`, which is made if missing, each file whole or not at all; return report.md."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, report.to_dict())
    return write_page(folder, study_page(report))


def study_page(report: StudyReport) -> Page:
    """Return the report: what came out, the curves, the table, tests and seeds."""
    pictures = [picture] if (picture := _curve_picture(report)) is not None else []
    sections = [
        Section("table", "The table", tables=[study_table(report)], short="Table"),
        Section("tests", "Tests", tables=[_test_table(report.tests)]),
        Section("seeds", "Every seed", tables=[_seed_table(report)]),
        Section("missing", "Not in the table", [f"{name}: {reason}" for name, reason in report.missing.items()]),
        Section("notes", "Notes", _notes(report)),
    ]
    said = [sentence for sentence in (_headline(report), report.study.caption) if sentence]
    return Page(report.study.title, Section("outcome", "", said, pictures=pictures), sections)


def study_table(report: StudyReport) -> Table:
    """Return the table: a line per row of the study, or per column where these are more."""
    header, body = _grid(report)
    return Table(report.study.title, header, body, caption=_caption(report))


def _headline(report: StudyReport) -> str:
    """Which row is the best, and by which figure: the first that is tested."""
    column = next(iter(report.study.tested_columns), None)
    means = {} if column is None else {one.row.label: one.cells[column.name].mean for one in report.rows}
    known = {label: mean for label, mean in means.items() if mean is not None}
    if column is None or not known:
        return ""
    ranked = sorted(known, key=lambda label: known[label], reverse=not column.lower_is_better)
    best = next(one.cells[column.name] for one in report.rows if one.row.label == ranked[0])
    shown = f"{_short(best)} {interval(best.ci)}".strip()
    if len(ranked) == 1:
        return f"“{ranked[0]}” has {column.name} {shown}."
    certainty = _certainty(report, column, *ranked[:2])
    return f"Of {len(ranked)} rows, “{ranked[0]}” has the best {column.name}: {shown}{certainty}."


def _certainty(report: StudyReport, column: Column, best: str, second: str) -> str:
    """Whether the lead in a column would hold with other seeds and clips."""
    tests = [test for test in report.tests if test.column == column.name]
    test = next((test for test in tests if {test.first, test.second} == {best, second}), None)
    if test is None or test.p_holm is None:
        return ""
    hold = "is within the sampling error" if test.p_holm >= LEVEL else "would hold with other seeds and clips"
    return f"; its lead over “{second}” {hold}, {p_equals(test.p_holm)}"


def _grid(report: StudyReport) -> tuple[list[str], list[TableLine]]:
    """Header and lines: a line per row of the study, or per column where these are more; published beside ours."""
    columns = report.study.columns
    ours = [[_cell(one.cells[column.name]) for column in columns] for one in report.rows]
    for c, column in enumerate(columns):
        _mark_best([line[c] for line in ours], [one.cells[column.name].mean for one in report.rows], column, ours, c)
    published = [[_number(one.row.published.get(column.name)) for column in columns] for one in report.rows]
    labels, names = [one.row.label for one in report.rows], [column.name for column in columns]
    if len(columns) > len(labels):
        ours, published = [[*line] for line in zip(*ours, strict=True)], [[*of] for of in zip(*published, strict=True)]
        labels, names = names, labels
    has_published = [any(line[place] for line in published) for place in range(len(names))]
    header = ["", *(text for name, has in zip(names, has_published, strict=True)
                       for text in ([name, "published"] if has else [name]))]  # fmt: skip
    body: list[TableLine] = [
        [
            label,
            *(
                cell
                for place, has in enumerate(has_published)
                for cell in ([ours[line][place], Cell(published[line][place])] if has else [ours[line][place]])
            ),
        ]
        for line, label in enumerate(labels)
    ]
    return header, body


def _mark_best(
    cells: Sequence[Cell], means: Sequence[float | None], column: Column, ours: list[list[Cell]], place: int
) -> None:
    """Mark the best of a column, where there are several to choose from and it is no cost."""
    known = [mean for mean in means if mean is not None]
    if len(known) < 2 or column.is_cost or _number(min(known)) == _number(max(known)):
        return
    best = (min if column.lower_is_better else max)(known)
    for line, (cell, mean) in enumerate(zip(cells, means, strict=True)):
        if mean is not None and _number(mean) == _number(best):
            ours[line][place] = Cell(cell.text, cell.aside, is_best=True)


def _seed_table(report: StudyReport) -> Table:
    """Each seed's own figures, where there are several seeds."""
    columns = [column for column in report.study.columns if not column.is_cost]
    body = [
        [f"{one.row.label}, seed {seed}", *(_number(one.cells[c.name].per_seed.get(seed)) or NONE for c in columns)]
        for one in report.rows
        for seed in one.evaluated
        if len(report.seeds) > 1 and columns
    ]
    return Table("Every seed", ["", *(column.name for column in columns)], body)


def _test_table(tests: Sequence[Test]) -> Table:
    columns = ["column", "row", "against", "difference", "95 % interval", "p (bootstrap)", "Holm", "p (paired t)",
               "Holm"]  # fmt: skip
    body = [
        [
            test.column, test.second, test.first, NONE if test.difference is None else f"{test.difference:+.2f}",
            interval(test.ci) or NONE, *map(p_value, (test.p, test.p_holm, test.t_p, test.t_p_holm)),
        ]
        for test in tests
    ]  # fmt: skip
    return Table("Tests", columns, body, text_columns=frozenset({0, 1, 2}))


def _caption(report: StudyReport) -> str:
    parts = []
    if report.num_clips:
        several = len(report.seeds) > 1
        spread = "mean over seeds ± their standard deviation; intervals hold 95 % over seeds and clips"
        only = "one seed: intervals are over clips only, and do not hold how much another training would differ"
        parts = [f"{len(report.seeds)} seed{'s' * several}, {report.num_clips:,} clips", spread if several else only]
    if report.overrides:
        parts.append(f"every run with {', '.join(report.overrides)}")
    return "; ".join(parts)


def _notes(report: StudyReport) -> list[str]:
    rows = [f"{one.row.label}: {one.row.note}" for one in report.rows if one.row.note]
    tests = []
    if report.tests:
        tests.append(
            "Tests are paired on clips and seeds, and corrected by Holm over all tests of the study. The bootstrap "
            "draws seeds and clips together; the t-test compares the rows' figures seed by seed."
        )
    fewer = [one.row.label for one in report.rows if one.evaluated and len(one.evaluated) < len(report.seeds)]
    if fewer:
        tests.append(f"Fewer seeds than the others have: {', '.join(fewer)}.")
    return [*report.study.notes, *rows, *tests]


def _curve_picture(report: StudyReport) -> Picture | None:
    """The rows over the drop probability, with their intervals as bands; None: nothing was swept."""
    lines: dict[str, Line] = {
        one.row.label: {100 * p: Point(point.mean, *(point.ci or ())) for p, point in one.curve.items()}
        for one in report.rows
        if one.curve
    }
    if not lines:
        return None
    ends = [f"{label}: {_first_and_last(line)}." for label, line in lines.items()]
    heading = compared_heading()
    return Picture(
        CURVE_PLOT,
        f"{heading[0].upper()}{heading[1:]} over the probability that a modality is missing, with 95 % intervals",
        " ".join(ends),
        lambda: line_figure(lines, "probability that a modality is missing (%)", f"{heading} (%)"),
    )


def _first_and_last(line: Line) -> str:
    (first, start), *_, (last, end) = line.items()
    return f"{_number(start.value)} % at {first:g} %, {_number(end.value)} % at {last:g} %"


def _cell(summary: Summary) -> Cell:
    return Cell(_short(summary), interval(summary.ci))


def _short(summary: Summary) -> str:
    spread = "" if summary.sd is None else f" ± {summary.sd:.2f}"
    return (_number(summary.mean) or NONE) + spread


def _number(value: float | None) -> str:
    """Two digits after the point, of large and small figures as many as tell something; empty where there is none."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:,.1f}" if size >= 1000 else f"{value:.3g}" if 0 < size < 0.1 else f"{value:.2f}"
