"""The tables of rows: every figure of every condition, the clips behind it, and what a terminal has room for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.metrics import ACTION, Figure, find_figure
from karmma_dist.evaluation.report.content import condition_of, kept_rows
from karmma_dist.evaluation.report.model import NONE, Cell, Section, Table, TableLine, best_cells, interval, percent
from karmma_dist.evaluation.report.sentences import Models, fullest_name
from karmma_dist.evaluation.results import ResultRow, Results
from karmma_dist.evaluation.summary import fullest
from karmma_dist.modalities import letters

_ROW_COLUMNS = ("modalities", "drop %", "seed", "clips", "without")


def every_figure(models: Models) -> Section:
    """Return all figures of the condition that drops least, a column per model."""
    rows = [next(iter(fullest(results.rows)), None) for results in models.values()]
    names = dict.fromkeys(name for row in rows if row is not None for name in row.figures)
    body: list[TableLine] = []
    for figure in map(find_figure, names):
        values = [None if row is None else row.figures.get(figure.name) for row in rows]
        asides = ["" if row is None else interval(row.intervals.get(figure.name)) for row in rows]
        body.append([figure.heading, *best_cells(values, asides, figure.metric.lower_is_better)])
    shown = [NONE if row is None else condition_name(row.modalities, row.drop_prob) for row in rows]
    same = len(set(shown)) == 1
    columns = ["figure", *(name if same else f"{name} ({at})" for name, at in zip(models, shown, strict=True))]
    name = f"Every figure with {fullest_name(models)} (%)" + (f": {shown[0]}" if same else "")
    return Section("figures", name, tables=[Table(name, columns, body)], short="Every figure")


def every_row(models: Models, is_shown: Callable[[Figure], bool] = lambda figure: True) -> Section:  # noqa: ARG005
    """Return each condition of each model, a table per model.

    Args:
        models: Results per model name.
        is_shown: True of the figures that have a column.
    """
    tables = [
        _rows_table(name, results.rows, list(filter(is_shown, results.figures))) for name, results in models.items()
    ]
    return Section("rows", "All rows (%)", tables=tables, is_folded=True)


def clips_behind(models: Models) -> Section:
    """Return per condition and modality the clips used, dropped on purpose, and lacking in the data."""
    modalities = list(dict.fromkeys(m for results in models.values() for m in results.summary.modalities))
    agreeing: dict[tuple[str, ...], list[str]] = {}
    for name, results in models.items():
        for row in results.rows:
            counts = [count for modality in modalities for count in _used_dropped_lacking(row, modality)]
            line = (*condition_cells(condition_of(row)), f"{row.num_clips:,}", *counts)
            agreeing.setdefault(line, []).append(name)
    body = [
        [*line, "all models" if 1 < len(models) == len(names) else ", ".join(names)] for line, names in agreeing.items()
    ]
    per = [f"{modality} {kind}" for modality in modalities for kind in ("used", "dropped", "lacking")]
    columns = ["present", "drop %", "seed", "clips", *per, "models"]
    caption = (
        "Dropped: the clip has it and the condition takes it away at random. Lacking: the data has none. A dash: the "
        "condition switches it off for all."
    )
    table = Table("Counts", columns, body, text_columns=frozenset({0, len(columns) - 1}), caption=caption)
    return Section("counts", "Clips behind each row", tables=[table], is_folded=True)


def terminal_rows(results: Results, title: str) -> Table:
    """Return the rows as a table for a terminal of 80 columns; what is the same in all of them has no column.

    Args:
        results: Of one model.
        title: Line above the table.
    """
    rows, summary = kept_rows(results), results.summary
    figures = [figure for figure in results.figures if _is_for_terminal(figure)]
    left_out = {"unlabelled": summary.num_unlabelled, "left out by noun": summary.num_pruned}
    caption = [f"percent of {summary.num_clips:,} clips", *(f"{n:,} {reason}" for reason, n in left_out.items() if n)]
    if len(rows) < len(results.rows):
        caption.append(f"{len(results.rows) - len(rows):,} more rows with broken sensors: results.json")
    # The rest has more room where a column would tell nothing.
    tells = [True, any(row.drop_prob for row in rows), any(row.seed for row in rows), True,
             any(row.num_without for row in rows)]  # fmt: skip
    if tells[-1]:
        caption.append("without: has none of these")
    body = [
        [*itertools.compress(_row_cells(row), tells), *(percent(row.figures[figure.name], 1) for figure in figures)]
        for row in rows
    ]
    columns = [*itertools.compress(_ROW_COLUMNS, tells), *(figure.heading for figure in figures)]
    return Table(title, columns, body, caption="; ".join(caption))


def _is_for_terminal(figure: Figure) -> bool:
    return figure.metric.terminal == "all" or (figure.metric.terminal == "action" and figure.scored == ACTION)


def _row_cells(row: ResultRow) -> list[str]:
    """Condition and counts of a row, in the order of `_ROW_COLUMNS`."""
    return [*condition_cells(condition_of(row)), f"{row.num_clips:,}", f"{row.num_without:,}"]


def _rows_table(name: str, rows: Sequence[ResultRow], figures: Sequence[Figure]) -> Table:
    body: list[TableLine] = [
        [*_row_cells(row), *(_figure_cell(row, figure.name) for figure in figures)] for row in rows
    ]
    return Table(name, [*_ROW_COLUMNS, *(figure.heading for figure in figures)], body)


def _figure_cell(row: ResultRow, name: str) -> Cell:
    return Cell(percent(row.figures[name]), interval(row.intervals.get(name)))


def condition_cells(condition: Condition) -> list[str]:
    """Return a line's condition: modalities with the broken sensor, drop probability in percent, seed."""
    broken = "" if condition.corrupt is None else f" {condition.corrupt}"
    return [letters(condition.modalities) + broken, f"{100 * condition.drop_prob:g}", f"{condition.seed}"]


def condition_name(modalities: Sequence[str], drop_prob: float) -> str:
    """Return modalities and drop probability in one: `V+F, drop 10 %`."""
    return letters(modalities) + (f", drop {100 * drop_prob:g} %" if drop_prob else "")


def _used_dropped_lacking(row: ResultRow, modality: str) -> list[str]:
    if modality not in row.modalities:
        return [NONE] * 3
    present, kept = row.num_present[modality], row.num_kept[modality]
    return [f"{kept:,}", f"{present - kept:,}", f"{row.num_clips - present:,}"]
