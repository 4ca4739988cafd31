"""Tables of the HTML report: cells, columns, and their markup, everything from outside escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    heading: str
    html: str
    """Empty: there is nothing to show, and the section is left out."""
    short: str = ""
    """Its name in the list of contents, where the heading is too long for it."""


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str
    aside: str = ""
    """Smaller, after the text: an interval, a deviation."""
    best: bool = False
    """Shown in bold."""


@dataclass(frozen=True)
class Table:
    """A table that a reader sorts by a click on a column's name; the first cell of each line names the line."""

    label: str
    """What it shows, for those who hear the page."""
    columns: Sequence[str]
    body: Sequence[Sequence[Cell | str]]
    foot: Sequence[Sequence[Cell | str]] = ()
    """Lines that stay below the others, however these are sorted."""
    text_columns: frozenset[int] = field(default_factory=frozenset)
    """Columns besides the first that are sorted as text."""

    def to_html(self) -> str:
        """Markup, in a container of its own that scrolls sideways where the table is wider than the page."""
        head = "".join(
            f'<th scope="col"{self._class(place)}>{_breakable(name)}</th>' for place, name in enumerate(self.columns)
        )
        body = "\n".join(self._line(line) for line in self.body)
        foot = "\n".join(self._line(line) for line in self.foot)
        label = escape(self.label)
        return (
            f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table aria-label="{label}">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            + (f"<tfoot>\n{foot}\n</tfoot>\n" if foot else "")
            + "</table></div>\n"
        )

    def _line(self, line: Sequence[Cell | str]) -> str:
        first, *others = line
        cells = [f'<th scope="row">{_breakable(first) if isinstance(first, str) else _inner(first)}</th>']
        cells += [f"<td{self._class(place)}>{_inner(cell)}</td>" for place, cell in enumerate(others, 1)]
        return f"<tr>{''.join(cells)}</tr>"

    def _class(self, place: int) -> str:
        return ' class="t"' if place in self.text_columns or place == 0 else ""


def best_cells(values: Sequence[float | None], asides: Sequence[str] | None = None, lowest: bool = False) -> list[Cell]:
    """Two digits each, the best marked where there are several to choose from."""
    known = [value for value in values if value is not None]
    best = None if len(known) < 2 else number((min if lowest else max)(known))
    texts = [number(value) for value in values]
    return [
        Cell(text, aside, value is not None and text == best)
        for value, text, aside in zip(values, texts, asides or [""] * len(texts), strict=True)
    ]


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences, or nothing."""
    return "<ul>\n" + "".join(f"<li>{escape(line)}</li>\n" for line in lines) + "</ul>\n" if lines else ""


def note(text: str) -> str:
    """A paragraph under a table, or nothing."""
    return f'<p class="caption">{escape(text.strip())}</p>\n' if text else ""


def _breakable(name: str) -> str:
    """A name that a narrow column breaks where a reader would: runs/epic_kitchens/distill."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _inner(cell: Cell | str) -> str:
    if isinstance(cell, str):
        return escape(cell)
    text = f"<b>{escape(cell.text)}</b>" if cell.best else escape(cell.text)
    return f"{text} <small>{escape(cell.aside)}</small>" if cell.aside else text
