"""Text and tables for the terminal: text is shown literally, brackets and colons included, and never cut off.

    print_table(["split", "clips"], [["train", "67,217"]], right=["clips"], title="shards/epic: packed")

Names of classes, clips, runs and files come from others. Whatever is printed goes through `harmless`, so that nothing
in it acts on the terminal; rich gets it as `rich_text`, which has no markup. `prepare_streams` lets stdout and stderr
take any text, whatever their encoding, and lets nothing else get the number of a stream that is closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_UNBOUNDED = 1_000_000
"""Width in characters if the output is not a terminal: a line of a table is one line, for `grep` and `cut`."""
_NARROWEST = 20
"""Smallest width that a table gets, whatever COLUMNS says."""
_IO_ENCODING = "PYTHONIOENCODING"
"""Environment variable from which Python takes `ENCODING:ERRORS` of the standard streams."""

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


def rich_text(text: object, style: str = "") -> Text:
    """Return `harmless` text for rich, which then looks for no markup in it."""
    from rich.text import Text

    return Text(harmless(text), style=style)


def prepare_streams() -> None:
    """Let stdout and stderr of this process, and of every Python process that it starts, take any text.

    What the encoding of a stream lacks is shown escaped. A standard stream that is closed becomes /dev/null: otherwise
    the next file that is opened would get its number, and messages.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            silence(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # one that a program has put in its place may take any text, or not
            stream.reconfigure(errors="backslashreplace")
    os.environ[_IO_ENCODING] = f"{os.environ.get(_IO_ENCODING, '').partition(':')[0]}:backslashreplace"


def silence(descriptor: int) -> None:
    """Let what is written to a standard stream from now on go nowhere."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(opened, descriptor)
        os.close(opened)


def can_show(text: str) -> bool:
    """Return True if stdout gets a text, line breaks included, in UTF-8 as it is, so that it can be read again."""
    is_utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"
    return harmless_lines(text) == text and (is_utf8 or text.isascii())


def print_line(text: object, *, err: bool = False) -> None:
    """Print text that may hold data of others as one line on stdout, or on stderr.

    A message that stderr does not take, since its disk is full or its terminal gone, is lost: work goes on.

    Raises:
        OSError: stdout does not take it, or the reader of either has gone.
    """
    if not err:
        print(harmless(text), flush=True)
        return
    try:
        print(harmless(text), file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        with contextlib.suppress(OSError):
            silence(sys.stderr.fileno())


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


def is_terminal(*, err: bool = False) -> bool:
    """Return True if stdout, or stderr, is a terminal that can move its cursor."""
    stream = sys.stderr if err else sys.stdout
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def console(*, err: bool = False) -> Console:
    """Return a console of rich for stdout, or stderr: as wide as its terminal, otherwise as wide as any line."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    if not stream.isatty():
        return Console(stderr=err, width=_UNBOUNDED, height=100, highlight=False)
    if not {"COLUMNS", "LINES"} & os.environ.keys():
        return Console(stderr=err, highlight=False)  # follows the size of the window
    size = shutil.get_terminal_size()
    return Console(stderr=err, width=max(size.columns, _NARROWEST), height=max(size.lines, 10), highlight=False)


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    title: str = "",
    footer: Iterable[str] = (),
) -> None:
    """Print a table on stdout.

    Args:
        headings: Headings of the columns.
        rows: Cells of each row, one per heading; a cell that does not fit into a terminal is wrapped.
        right: Headings of the columns of numbers, which are right-aligned and not wrapped.
        title: Line above the table, or empty. Like the footer it is not wrapped, so that its paths can be copied.
        footer: Lines below the table.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for heading in headings:
        is_number = heading in right
        table.add_column(
            rich_text(heading), justify="right" if is_number else "left", no_wrap=is_number, overflow="fold",
            min_width=1,
        )
    for cells in rows:
        table.add_row(*map(rich_text, cells))
    out = console()
    if title:
        out.print(rich_text(title, "bold"), soft_wrap=True)
    out.print(table)
    for line in footer:
        print_line(line)
    sys.stdout.flush()
