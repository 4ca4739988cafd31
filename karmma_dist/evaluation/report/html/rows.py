"""The long tables of the HTML report: every figure of every row, and the clips behind it."""

from __future__ import annotations

from karmma_dist.evaluation.report.html.tables import Cell, Section, Table, best_cells, note, number
from karmma_dist.evaluation.report.readings import (
    Models,
    Row,
    fullest,
    fullest_name,
    heading,
    lower_is_better,
    metric_columns,
    row_interval,
    uncorrupted,
)
from karmma_dist.modalities import letters

_FEW = 12
"""Lines that a table may have to be unfolded from the start."""


def everything_present(models: Models) -> Section:
    """All figures of the condition that drops least, one column per model."""
    rows = [(fullest(results["rows"]) or [{}])[0] for results in uncorrupted(models).values()]
    body: list[list[Cell | str]] = []
    for name in metric_columns([row for row in rows if row]):
        asides = [row_interval(row, name) for row in rows]
        body.append([heading(name), *best_cells([row.get(name) for row in rows], asides, lower_is_better(name))])
    shown = [_condition_name(row) for row in rows]
    same = len(set(shown)) == 1
    columns = ["figure", *(name if same else f"{name} ({of})" for name, of in zip(models, shown, strict=True))]
    name = f"Every figure with {fullest_name(models)} (%)" + (f": {shown[0]}" if same else "")
    return Section("figures", name, Table(name, columns, body).to_html(), "Every figure")


def every_row(models: Models) -> Section:
    """Each condition of each model."""
    all_rows = [row for results in models.values() for row in results["rows"]]
    names = metric_columns(all_rows)
    corrupted = any(row.get("corrupt") for row in all_rows)
    kinds = ["corrupted"] if corrupted else []
    body: list[list[Cell | str]] = [
        [
            name,
            *_condition_cells(row, corrupted),
            f"{row['num_clips']:,}",
            f"{row['num_without']:,}",
            *(Cell(number(row.get(key)), row_interval(row, key)) for key in names),
        ]
        for name, results in models.items()
        for row in results["rows"]
    ]
    columns = ["model", "modalities", "drop %", "seed", *kinds, "clips", "without", *map(heading, names)]
    table = Table("All rows", columns, body, text_columns=frozenset({1, 4} if corrupted else {1}))
    return Section("rows", "All rows (%)", _folded(table))


def condition_counts(models: Models) -> Section:
    """Per condition and modality: used, dropped on purpose, and lacking in the data; models that agree share a line."""
    modalities = list(dict.fromkeys(m for results in models.values() for m in results["summary"]["modalities"]))
    corrupted = any(row.get("corrupt") for results in models.values() for row in results["rows"])
    agreeing: dict[tuple[str, ...], list[str]] = {}
    for name, results in models.items():
        for row in results["rows"]:
            counts = [count for modality in modalities for count in _used_dropped_lacking(row, modality)]
            line = (*_condition_cells(row, corrupted), f"{row['num_clips']:,}", *counts)
            agreeing.setdefault(line, []).append(name)
    body = [
        ["all models" if 1 < len(models) == len(names) else ", ".join(names), *line] for line, names in agreeing.items()
    ]
    kinds = ["corrupted"] if corrupted else []
    per = [f"{modality} {what}" for modality in modalities for what in ("used", "dropped", "lacking")]
    columns = ["models", "modalities", "drop %", "seed", *kinds, "clips", *per]
    table = Table("Counts", columns, body, text_columns=frozenset({1, 4} if corrupted else {1}))
    caption = (
        "Dropped: the clip has it and the condition takes it away at random. Lacking: the data has none. A dash: the "
        "condition switches it off for all."
    )
    return Section("counts", "Clips behind each row", note(caption) + _folded(table))


def _condition_cells(row: Row, corrupted: bool) -> list[str]:
    cells = [letters(row["modalities"]), f"{100 * row['drop_prob']:g}", f"{row['seed']}"]
    return [*cells, row.get("corrupt") or "–"] if corrupted else cells


def _condition_name(row: Row) -> str:
    if not row:
        return "–"
    return letters(row["modalities"]) + (f", drop {100 * row['drop_prob']:g} %" if row["drop_prob"] else "")


def _used_dropped_lacking(row: Row, modality: str) -> list[str]:
    if modality not in row["modalities"]:
        return ["–"] * 3
    present, kept = row["num_present"][modality], row["num_kept"][modality]
    return [f"{kept:,}", f"{present - kept:,}", f"{row['num_clips'] - present:,}"]


def _folded(table: Table) -> str:
    """Closed where it is long."""
    num = len(table.body)
    lines = "1 line" if num == 1 else f"{num:,} lines"
    opened = " open" if num <= _FEW else ""
    return f"<details{opened}>\n<summary>{lines}</summary>\n{table.to_html()}</details>\n"
