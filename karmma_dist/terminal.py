"""Tables for the terminal, all of one look: text as it is, whatever brackets and colons are in it, and nothing cut off.

    print_table(["split", "clips"], [["train", "67,217"]], right=["clips"], title="shards/epic: packed")
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

WIDTH = 80
"""Columns where the output is not a terminal."""


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    title: str = "",
    footer: Iterable[str] = (),
    width: int = WIDTH,
) -> None:
    """Print a table on stdout.

    Args:
        headings: of the columns.
        rows: cells of each line, as many as there are headings; one that does not fit goes on in the next line.
        right: headings of the columns of numbers, which are set to the right and not broken.
        title: line above it; empty: none. Like the footer it is not broken, so that paths in it can be copied.
        footer: lines below it.
        width: columns where stdout is not a terminal.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        is_number = heading in right
        table.add_column(
            Text(heading), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for cells in rows:
        table.add_row(*map(Text, cells))
    console = Console(width=None if sys.stdout.isatty() else width)
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)
    for line in footer:
        print(line)
    sys.stdout.flush()
