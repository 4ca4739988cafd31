"""The report of a study: results.json for scripts, report.md and report.html for people, a table for the terminal.

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
    p_value,
)
from karmma_dist.evaluation.report.plots import Line, Point, line_figure
from karmma_dist.evaluation.report.sections import CURVE_PLOT
from karmma_dist.evaluation.report.sentences import compared_heading, lead
from karmma_dist.evaluation.report.write import RESULTS, write_page
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_json
from karmma_dist.studies.statistics import Summary, Test
from karmma_dist.studies.study import Column, Row, Study


@dataclass(frozen=True)
class ReportRow:
    """A row of the table with its figures."""

    row: Row
    runs: dict[int, str]
    """Name of the run for each seed."""
    evaluated: list[int]
    """Seeds that were evaluated."""
    cells: dict[str, Summary]
    """Figures by column name."""
    curve: dict[float, Summary] = field(default_factory=dict)
    """Action top-1 by drop probability; empty without a sweep."""


@dataclass(frozen=True)
class StudyReport:
    """The content of a study's report."""

    name: str
    study: Study
    seeds: list[int]
    overrides: Sequence[str]
    num_clips: int
    """Number of evaluated clips; 0: nothing was evaluated."""
    rows: list[ReportRow]
    tests: list[Test]
    missing: dict[str, str]
    """Reason why a run is not in the table, by its name."""

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
                    "label": entry.row.label,
                    "recipe": entry.row.recipe,
                    "set": entry.row.set,
                    "weights": entry.row.weights,
                    "runs": entry.runs,
                    "evaluated": entry.evaluated,
                    "cells": {
                        name: {**asdict(cell), "published": entry.row.published.get(name)}
                        for name, cell in entry.cells.items()
                    },
                    "curve": [{"drop_prob": p, **asdict(point)} for p, point in entry.curve.items()],
                    "note": entry.row.note,
                }
                for entry in self.rows
            ],
            "tests": [asdict(test) for test in self.tests],
            "missing": self.missing,
            "notes": _notes(self),
        }


def write_study_report(report: StudyReport, folder: Path) -> Path:
    """Write all files of the report into `folder`, which is created if missing, and return the path of report.md.

    Each file is written whole or not at all.
    """
    make_folder(folder)
    write_json(folder / RESULTS, report.to_dict())
    return write_page(folder, study_page(report))


def study_page(report: StudyReport) -> Page:
    """Return the report: main result, curves, table, tests and seeds."""
    pictures = [picture] if (picture := _curve_picture(report)) is not None else []
    sections = [
        Section("table", "The table", tables=[study_table(report)], short="Table"),
        Section("tests", "Tests", tables=[_test_table(report.tests)]),
        Section("seeds", "Figures per seed", tables=[_seed_table(report)]),
        Section("missing", "Missing runs", [f"{name}: {reason}" for name, reason in report.missing.items()]),
        Section("notes", "Notes", _notes(report)),
    ]
    sentences = [sentence for sentence in (_headline(report), report.study.caption) if sentence]
    return Page(report.study.title, Section("outcome", "", sentences, pictures=pictures), sections)


def study_table(report: StudyReport) -> Table:
    """Return the table: one line per row of the study, or per column if the study has more columns than rows."""
    header, body = _grid(report)
    return Table(report.study.title, header, body, caption=_caption(report))


def _headline(report: StudyReport) -> str:
    """Return a sentence that names the best row by the first tested column."""
    column = next(iter(report.study.tested_columns), None)
    means = {} if column is None else {entry.row.label: entry.cells[column.name].mean for entry in report.rows}
    known = {label: mean for label, mean in means.items() if mean is not None}
    if column is None or not known:
        return ""
    ranked = sorted(known, key=lambda label: known[label], reverse=not column.lower_is_better)
    best = next(entry.cells[column.name] for entry in report.rows if entry.row.label == ranked[0])
    figure = f"{_short(best)} {interval(best.ci)}".strip()
    if len(ranked) == 1:
        return f"“{ranked[0]}”: {column.name} {figure}."
    certainty = _certainty(report, column, *ranked[:2])
    return f"Of {len(ranked)} rows, “{ranked[0]}” is best in column “{column.name}”: {figure}{certainty}."


def _certainty(report: StudyReport, column: Column, best: str, second: str) -> str:
    """Return whether the lead in a column is significant over seeds and clips, in words; empty without a test."""
    tests = [test for test in report.tests if test.column == column.name]
    test = next((test for test in tests if {test.first, test.second} == {best, second}), None)
    return "" if test is None or test.p_holm is None else lead(f"“{second}”", test.p_holm)


def _grid(report: StudyReport) -> tuple[list[str], list[TableLine]]:
    """Return header and lines of the table, with published figures next to ours: see `study_table`."""
    columns, rows = report.study.columns, report.rows
    ours = [[_cell(entry.cells[column.name]) for column in columns] for entry in rows]
    for c, column in enumerate(columns):
        _mark_best([line[c] for line in ours], [entry.cells[column.name].mean for entry in rows], column, ours, c)
    published = [[_number(entry.row.published.get(column.name)) for column in columns] for entry in rows]
    labels, names = [entry.row.label for entry in rows], [column.name for column in columns]
    if len(columns) > len(labels):
        ours, published = list(map(list, zip(*ours, strict=True))), list(map(list, zip(*published, strict=True)))
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
    """Mark the best cell of a column in `ours`, unless the column is a cost or its values do not differ."""
    known = [mean for mean in means if mean is not None]
    if len(known) < 2 or column.is_cost or _number(min(known)) == _number(max(known)):
        return
    best = (min if column.lower_is_better else max)(known)
    for line, (cell, mean) in enumerate(zip(cells, means, strict=True)):
        if mean is not None and _number(mean) == _number(best):
            ours[line][place] = Cell(cell.text, cell.aside, is_best=True)


def _seed_table(report: StudyReport) -> Table:
    """Return the figures of each seed; empty for a single seed."""
    columns = [column for column in report.study.columns if not column.is_cost]
    body = [
        [f"{entry.row.label}, seed {seed}", *(_number(entry.cells[c.name].per_seed.get(seed)) or NONE for c in columns)]
        for entry in report.rows
        for seed in entry.evaluated
        if len(report.seeds) > 1 and columns
    ]
    return Table("Figures per seed", ["", *(column.name for column in columns)], body)


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
        spread = "mean ± standard deviation over seeds; 95 % intervals over seeds and clips"
        only = "95 % intervals over clips only, without the variation between trainings"
        parts = [f"{len(report.seeds)} seed{'s' * several}, {report.num_clips:,} clips", spread if several else only]
    if report.overrides:
        parts.append(f"all runs with {', '.join(report.overrides)}")
    return "; ".join(parts)


def _notes(report: StudyReport) -> list[str]:
    rows = [f"{entry.row.label}: {entry.row.note}" for entry in report.rows if entry.row.note]
    tests = []
    if report.tests:
        tests.append(
            "Tests are paired on clips and seeds, and p-values are corrected with Holm's method over all tests of the "
            "study. The bootstrap draws both seeds and clips; the t-test compares the figures of two rows seed by seed."
        )
    fewer = [entry.row.label for entry in report.rows if 0 < len(entry.evaluated) < len(report.seeds)]
    if fewer:
        tests.append(f"Rows with fewer seeds than planned: {', '.join(fewer)}.")
    return [*report.study.notes, *rows, *tests]


def _curve_picture(report: StudyReport) -> Picture | None:
    """Return the plot of the rows over the drop probability, with intervals as bands; None: nothing was swept."""
    lines: dict[str, Line] = {
        entry.row.label: {100 * p: Point(point.mean, *(point.ci or ())) for p, point in entry.curve.items()}
        for entry in report.rows
        if entry.curve
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
    """Return a figure with two decimals (one from 1,000 on, three significant digits below 0.1); empty for None."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:,.1f}" if size >= 1000 else f"{value:.3g}" if 0 < size < 0.1 else f"{value:.2f}"
