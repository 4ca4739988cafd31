"""Print sections and tables of a report in a terminal, with rich."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from karmma_dist.evaluation.report.model import Cell, Section, Table
from karmma_dist.terminal import harmless_lines, rich_text


def print_section(content: Section, console: Console) -> None:
    """Print a section; rich markup in its text is not interpreted."""
    if content.heading:
        console.print(rich_text(content.heading, "bold"), "")
    for sentence in content.sentences:
        console.print(rich_text(sentence))
    for picture in content.pictures:
        console.print(rich_text(f"{picture.text} ({picture.file})"))
    if content.sentences or content.pictures:
        console.print()
    for table in content.tables:
        if table.body:
            print_table(table, console)


def print_table(content: Table, console: Console, has_asides: bool = True) -> None:
    """Print a table with its title and caption.

    Args:
        content: Table to print; rich markup in its text is not interpreted.
        console: Console to print to.
        has_asides: False to leave out intervals and deviations, which take much room.
    """
    console.print(rich_text(content.title, "bold"), _drawn(content, has_asides))
    console.print(*([rich_text(content.caption, "dim")] if content.caption else []), "")


def _drawn(content: Table, has_asides: bool) -> RichTable:
    """Return the table for rich; columns of figures are right-aligned."""
    drawn = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for place, heading in enumerate(content.columns):
        is_text = place in content.text_columns
        drawn.add_column(
            Text(harmless_lines(heading)), justify="left" if is_text else "right", overflow="fold",
            no_wrap=place == 0 and is_text,
        )  # fmt: skip
    lines = content.cells(content.body)
    for number, line in enumerate([*lines, *content.cells(content.foot)], 1):
        ends_body = number == len(lines) and bool(content.foot)
        drawn.add_row(*(_text(cell, has_asides) for cell in line), end_section=ends_body)
    return drawn


def _text(cell: Cell, has_asides: bool) -> Text:
    shown = rich_text(cell.text, "bold" if cell.is_best else "")
    return shown.append(rich_text(f" {cell.aside}", "dim not bold")) if cell.aside and has_asides else shown
