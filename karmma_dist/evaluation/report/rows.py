"""The tables of rows: all figures of every condition, its clip counts, and a table that fits a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.metrics import ACTION, Figure, find_figure
from karmma_dist.evaluation.report.content import kept_rows
from karmma_dist.evaluation.report.model import NONE, Cell, Section, Table, TableLine, best_cells, interval, percent
from karmma_dist.evaluation.report.sentences import Models, fullest_name
from karmma_dist.evaluation.results import ResultRow, Results
from karmma_dist.evaluation.summary import fullest
from karmma_dist.modalities import letters

_ROW_COLUMNS = ("modalities", "drop %", "seed", "clips", "without")


def every_figure(models: Models) -> Section:
    """Return all figures under the condition with the fewest modalities missing, one column per model."""
    rows = [next(iter(fullest(results.rows)), None) for results in models.values()]
    names = dict.fromkeys(name for row in rows if row is not None for name in row.figures)
    body: list[TableLine] = []
    for figure in map(find_figure, names):
        values = [None if row is None else row.figures.get(figure.name) for row in rows]
        asides = ["" if row is None else interval(row.intervals.get(figure.name)) for row in rows]
        body.append([figure.heading, *best_cells(values, asides, figure.metric.lower_is_better)])
    conditions = [NONE if row is None else condition_name(row.modalities, row.drop_prob) for row in rows]
    is_same = len(set(conditions)) == 1
    columns = [
        "figure",
        *(name if is_same else f"{name} ({text})" for name, text in zip(models, conditions, strict=True)),
    ]
    title = f"All figures with {fullest_name(models)} (%)" + (f": {conditions[0]}" if is_same else "")
    return Section("figures", title, tables=[Table(title, columns, body)], short="All figures")


def every_row(models: Models, is_shown: Callable[[Figure], bool] = lambda figure: True) -> Section:  # noqa: ARG005
    """Return every row of each model, one table per model.

    Args:
        models: Results per model name.
        is_shown: Function that returns True for the figures to show.
    """
    tables = [
        _rows_table(name, results.rows, list(filter(is_shown, results.figures))) for name, results in models.items()
    ]
    return Section("rows", "All rows (%)", tables=tables, is_folded=True)


def clips_behind(models: Models) -> Section:
    """Return the clips used, dropped by the condition, and lacking in the dataset, per condition and modality."""
    modalities = list(dict.fromkeys(m for results in models.values() for m in results.summary.modalities))
    models_by_line: dict[tuple[str, ...], list[str]] = {}
    for name, results in models.items():
        for row in results.rows:
            counts = [count for modality in modalities for count in _used_dropped_lacking(row, modality)]
            line = (*condition_cells(row.condition), f"{row.num_clips:,}", *counts)
            models_by_line.setdefault(line, []).append(name)
    body = [
        [*line, "all models" if 1 < len(models) == len(names) else ", ".join(names)]
        for line, names in models_by_line.items()
    ]
    counted = [f"{modality} {count}" for modality in modalities for count in ("used", "dropped", "lacking")]
    columns = ["present", "drop %", "seed", "clips", *counted, "models"]
    caption = (
        "Dropped: the clip has the modality, but the condition drops it at random. Lacking: the dataset does not have "
        "the modality for the clip. A dash: the condition excludes the modality for all clips."
    )
    table = Table("Counts", columns, body, text_columns=frozenset({0, len(columns) - 1}), caption=caption)
    return Section("counts", "Clip counts of all rows", tables=[table], is_folded=True)


def terminal_rows(results: Results, title: str) -> Table:
    """Return the rows as a table for a terminal of 80 columns; columns in which all rows are 0 are left out.

    Args:
        results: Results of one model.
        title: Line above the table.
    """
    rows, summary = kept_rows(results), results.summary
    figures = [figure for figure in results.figures if _is_for_terminal(figure)]
    excluded = {"unlabelled": summary.num_unlabelled, "excluded by noun": summary.num_pruned}
    caption = [f"percent of {summary.num_clips:,} clips", *(f"{n:,} {reason}" for reason, n in excluded.items() if n)]
    if len(rows) < len(results.rows):
        caption.append(f"{len(results.rows) - len(rows):,} more rows with broken sensors: see results.json")
    has_column = [True, any(row.drop_prob for row in rows), any(row.seed for row in rows), True,
                  any(row.num_without for row in rows)]  # fmt: skip
    if has_column[-1]:
        caption.append("without: clips that have none of the modalities")
    body = [
        [
            *itertools.compress(_row_cells(row), has_column),
            *(percent(row.figures[figure.name], 1) for figure in figures),
        ]
        for row in rows
    ]
    columns = [*itertools.compress(_ROW_COLUMNS, has_column), *(figure.heading for figure in figures)]
    return Table(title, columns, body, caption="; ".join(caption))


def _is_for_terminal(figure: Figure) -> bool:
    return figure.metric.terminal == "all" or (figure.metric.terminal == "action" and figure.scored == ACTION)


def _row_cells(row: ResultRow) -> list[str]:
    """Return condition and counts of a row, in the order of `_ROW_COLUMNS`."""
    return [*condition_cells(row.condition), f"{row.num_clips:,}", f"{row.num_without:,}"]


def _rows_table(name: str, rows: Sequence[ResultRow], figures: Sequence[Figure]) -> Table:
    body: list[TableLine] = [
        [*_row_cells(row), *(_figure_cell(row, figure.name) for figure in figures)] for row in rows
    ]
    return Table(name, [*_ROW_COLUMNS, *(figure.heading for figure in figures)], body)


def _figure_cell(row: ResultRow, name: str) -> Cell:
    return Cell(percent(row.figures[name]), interval(row.intervals.get(name)))


def condition_cells(condition: Condition) -> list[str]:
    """Return the cells of a condition: modalities and what fails, drop probability in percent, seed."""
    failing = "" if condition.corrupt is None else f" {condition.corrupt}"
    if condition.missing is not None:
        failing = f" missing {condition.missing}"
    return [letters(condition.modalities) + failing, f"{100 * condition.drop_prob:g}", f"{condition.seed}"]


def condition_name(modalities: Sequence[str], drop_prob: float) -> str:
    """Return modalities and drop probability as text: `V+F, drop 10 %`."""
    return letters(modalities) + (f", drop {100 * drop_prob:g} %" if drop_prob else "")


def _used_dropped_lacking(row: ResultRow, modality: str) -> list[str]:
    if modality not in row.modalities:
        return [NONE] * 3
    present, kept = row.num_present[modality], row.num_kept[modality]
    return [f"{kept:,}", f"{present - kept:,}", f"{row.num_clips - present:,}"]
