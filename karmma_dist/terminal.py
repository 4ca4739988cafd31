"""Text and tables for the terminal: text is shown literally, brackets and colons included, and never cut off.

    print_table(["split", "clips"], [["train", "67,217"]], right=["clips"], title="shards/epic: packed")

Names of classes, clips, runs and files come from others. Whatever is printed goes through `harmless`, so that nothing
in it acts on the terminal; rich gets it as `rich_text`, which has no markup.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

WIDTH = 80
"""Width in characters if the output is not a terminal."""

_ACTING = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0 (bell, backspace, tab, line breaks, escape), delete and C1
    "\u2028\u2029"  # line breaks
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what follows is shown in another order
    "\ud800-\udfff"  # halves of characters, as in names of files that are not UTF-8: they cannot be written
    "]"
)


def harmless(text: object) -> str:
    r"""Return text as one line that may be sent to a terminal: what acts on it is escaped, `\x1b`, `\x0a`, `\u202e`."""
    return _ACTING.sub(lambda match: _escaped(ord(match[0])), str(text))


def harmless_lines(text: str) -> str:
    """Return text whose line breaks are meant, such as YAML, each line `harmless`."""
    return "\n".join(map(harmless, text.split("\n")))


def encodable(text: str) -> bool:
    """Return True if stdout can hold the text, which depends on the locale."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def rich_text(text: object, style: str = "") -> Text:
    """Return `harmless` text for rich, which then looks for no markup in it."""
    from rich.text import Text

    return Text(harmless(text), style=style)


def print_line(text: object, *, err: bool = False) -> None:
    """Print text that may hold data of others as one line on stdout, or on stderr."""
    print(harmless(text), file=sys.stderr if err else sys.stdout, flush=True)


class _HarmlessFormatter(logging.Formatter):
    """Formats log messages as `harmless_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless_lines(super().format(record))


def keep_warnings_harmless() -> None:
    """Let warnings, and messages of loggers that nobody has configured, which go to stderr too, be `harmless_lines`."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_HarmlessFormatter())
    warnings.formatwarning = _harmless_warning


_format_warning = warnings.formatwarning


def _harmless_warning(*arguments: Any, **named: Any) -> str:
    return harmless_lines(_format_warning(*arguments, **named))


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


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

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        is_number = heading in right
        table.add_column(
            rich_text(heading), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    for cells in rows:
        table.add_row(*map(rich_text, cells))
    console = Console(width=None if sys.stdout.isatty() else width)
    if title:
        console.print(rich_text(title, "bold"), soft_wrap=True)
    console.print(table)
    for line in footer:
        print_line(line)
    sys.stdout.flush()
