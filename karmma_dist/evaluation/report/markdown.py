"""The pieces of a report in Markdown: numbers, names, tables, lists."""

from __future__ import annotations

from collections.abc import Sequence


def percent(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def interval(ends: Sequence[float] | None) -> str:
    """`[low, high]`, or a dash."""
    return "–" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def p_value(value: float) -> str:
    """`p = 0.012`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def text(name: str) -> str:
    """A name as a table cell: a bar would end it."""
    return name.replace("|", "\\|")


def list_section(heading: str, lines: Sequence[str]) -> str:
    """A heading and its points, or nothing where there are none."""
    return "\n".join([f"## {heading}\n", *(f"* {line}" for line in lines), ""]) if lines else ""


def table_section(heading: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A heading and its table, or nothing where it has no line."""
    return f"## {heading}\n\n{table(header, body)}\n" if body else ""


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose first column is set left, the others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])
