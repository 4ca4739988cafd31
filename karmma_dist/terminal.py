"""Tables for the terminal in one style: text is shown literally, brackets and colons included, and never cut off.

    print_table(["split", "clips"], [["train", "67,217"]], right=["clips"], title="shards/epic: packed")
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence

WIDTH = 80
"""Width in characters if the output is not a terminal."""


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
        headings: Headings of the columns.
        rows: Cells of each row, one per heading; a cell that does not fit is wrapped.
        right: Headings of the columns of numbers, which are right-aligned and not wrapped.
        title: Line above the table, or empty. Like the footer it is not wrapped, so that its paths can be copied.
        footer: Lines below the table.
        width: Width in characters if stdout is not a terminal.
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
