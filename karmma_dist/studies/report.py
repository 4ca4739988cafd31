"""What came of a study: results.json for scripts, report.md and report.html for people, a table for the terminal.

    OUT/results.json   report.md   report.html   drop_curve.png
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.report.html.page import page
from karmma_dist.evaluation.report.html.sections import figure
from karmma_dist.evaluation.report.html.svg import Point, legend, line_plot
from karmma_dist.evaluation.report.html.tables import Cell, Section, Table, bullets, note
from karmma_dist.evaluation.report.plots import Curve, drop_curves
from karmma_dist.io.files import write_json, write_whole
from karmma_dist.studies.statistics import Summary, Test
from karmma_dist.studies.study import Column, Row, Study

RESULTS, REPORT, HTML_REPORT, CURVE_PLOT = "results.json", "report.md", "report.html", "drop_curve.png"


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
    content = report.to_dict()
    write_json(folder / RESULTS, content)
    curves = {one.row.label: one.curve for one in report.rows if one.curve}
    if curves:
        drop_curves(folder / CURVE_PLOT, {label: _png_curve(of) for label, of in curves.items()}, "action top-1 (%)",
                    None)  # fmt: skip
    write_whole(folder / REPORT, _markdown(report, bool(curves)).encode())
    write_whole(folder / HTML_REPORT, page(report.study.title, _sections(report), content).encode())
    return folder / REPORT


def terminal_table(report: StudyReport) -> RichTable:
    """Return the table for a terminal."""
    header, body = _grid(report, lambda cell: Cell(_short(cell)))
    table = RichTable(title=report.study.title, caption=_caption(report), box=SIMPLE_HEAD, show_edge=False,
                      pad_edge=False)  # fmt: skip
    table.add_column(header[0])
    for name in header[1:]:
        table.add_column(name, justify="right")
    for line in body:
        table.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in line))
    return table


def _markdown(report: StudyReport, has_curve: bool) -> str:
    header, body = _grid(report, lambda cell: Cell(_short(cell), _ends(cell)))
    shown = [[_bold(cell) + (f" {cell.aside}" if cell.aside else "") for cell in line] for line in body]
    plot = f"![action top-1 over the probability that a modality is missing]({CURVE_PLOT})\n"
    parts = [
        f"# {markdown.text(report.study.title)}\n",
        f"{report.study.caption}\n" if report.study.caption else "",
        markdown.table([markdown.text(name) for name in header], shown) + "\n",
        _caption(report) + "\n",
        plot if has_curve else "",
        markdown.table_section("Tests", _TEST_COLUMNS, [_test_line(test) for test in report.tests]),
        markdown.table_section("Every seed", *_seed_table(report)),
        markdown.list_section("Not in the table", [f"{name}: {why}" for name, why in report.missing.items()]),
        markdown.list_section("Notes", _notes(report)),
    ]
    return "\n".join(part for part in parts if part)


def _sections(report: StudyReport) -> list[Section]:
    study = report.study
    header, body = _grid(report, lambda cell: Cell(_short(cell), _ends(cell)))
    tests = Table("Tests", _TEST_COLUMNS, [_test_line(test) for test in report.tests], text_columns=frozenset({1, 2}))
    seed_header, seed_body = _seed_table(report)
    found = [
        Section("table", "The table", Table(study.title, header, body).to_html() + note(_caption(report)), "Table"),
        Section("sweep", "Modalities missing at random: action top-1 (%)", _curve_html(report), "Missing at random"),
        Section("tests", "Tests between rows", tests.to_html() if report.tests else "", "Tests"),
        Section("seeds", "Every seed", Table("Every seed", seed_header, seed_body).to_html() if seed_body else ""),
        Section("missing", "Not in the table", bullets([f"{name}: {why}" for name, why in report.missing.items()])),
        Section("notes", "Notes", bullets([*([study.caption] if study.caption else []), *_notes(report)])),
    ]
    return [section for section in found if section.html]


def _grid(report: StudyReport, show: Callable[[Summary], Cell]) -> tuple[list[str], list[list[Cell]]]:
    """Header and lines: a line per row of the study, or per column where these are more; published beside ours."""
    columns = report.study.columns
    ours = [[show(one.cells[column.name]) for column in columns] for one in report.rows]
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
    body = [
        [
            Cell(label),
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
            ours[line][place] = Cell(cell.text, cell.aside, best=True)


def _seed_table(report: StudyReport) -> tuple[list[str], list[list[str]]]:
    """Each seed's own figures, where there are several seeds."""
    columns = [column for column in report.study.columns if not column.is_cost]
    if len(report.seeds) < 2 or not columns:
        return [""], []
    body = [
        [f"{one.row.label}, seed {seed}", *(_number(one.cells[c.name].per_seed.get(seed)) or "–" for c in columns)]
        for one in report.rows
        for seed in one.evaluated
    ]
    return ["", *(column.name for column in columns)], body


_TEST_COLUMNS = ["column", "row", "against", "difference", "95 % interval", "p (bootstrap)", "Holm", "p (paired t)",
                 "Holm"]  # fmt: skip


def _test_line(test: Test) -> list[str]:
    difference = "–" if test.difference is None else f"{test.difference:+.2f}"
    p_values = [_p(value) for value in (test.p, test.p_holm, test.t_p, test.t_p_holm)]
    return [test.column, test.second, test.first, difference, markdown.interval(test.ci), *p_values]


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


def _curve_html(report: StudyReport) -> str:
    lines: dict[str, Mapping[float, Point]] = {
        one.row.label: {
            100 * p: _point(one.row.label, point) for p, point in one.curve.items()
        }
        for one in report.rows
        if one.curve
    }
    if not lines:
        return ""
    plot = figure(
        "Action top-1 over the probability that a modality is missing at inference",
        legend(lines, marks=True),
        lambda width: line_plot(lines, x_label="drop probability (%)", y_label="action top-1 (%)", width=width),
    )
    return plot + note("Bands are 95 % intervals.")


def _point(label: str, figure: Summary) -> Point:
    low, high = figure.ci or (None, None)
    return Point(figure.mean, low, high, f"{label}: {_number(figure.mean)} %")


def _png_curve(curve: Mapping[float, Summary]) -> Curve:
    return Curve(list(curve), [point.mean for point in curve.values()], [point.sd for point in curve.values()])


def _short(cell: Summary) -> str:
    spread = "" if cell.sd is None else f" ± {cell.sd:.2f}"
    return (_number(cell.mean) or "–") + spread


def _ends(cell: Summary) -> str:
    return "" if cell.ci is None else markdown.interval(cell.ci)


def _bold(cell: Cell) -> str:
    text = markdown.text(cell.text)
    return f"**{text}**" if cell.best else text


def _number(value: float | None) -> str:
    """Two digits after the point, of large and small figures as many as tell something; empty where there is none."""
    if value is None:
        return ""
    size = abs(value)
    return f"{value:,.1f}" if size >= 1000 else f"{value:.3g}" if 0 < size < 0.1 else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
