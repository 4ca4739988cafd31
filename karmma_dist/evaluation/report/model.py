"""A written report as data: what stands in it, whatever it is written as.

A page is sections, a section is sentences, tables and pictures. `sections` makes them of results; `markdown`, `html`
and `terminal` each render any of them, so that all three say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure

NONE = "–"
"""The text of a figure that does not exist."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    aside: str = ""
    """What is smaller beside the text, such as an interval or a deviation."""
    is_best: bool = False
    """True if it is shown in bold."""


TableLine = Sequence[Cell | str]
"""A line of a table, with a cell per column; a string is a cell without more."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each line names the line."""

    title: str
    """What the table shows, for those who hear it, and above it where a section has several."""
    columns: Sequence[str]
    """Headings."""
    body: Sequence[TableLine]
    foot: Sequence[TableLine] = ()
    """Lines that stay below the others, however these are sorted."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns that are set left and sorted as text; the others hold figures."""
    caption: str = ""
    """Sentences below the table."""

    def cells(self, lines: Sequence[TableLine]) -> list[list[Cell]]:
        """Return some of its lines with nothing but cells."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in line] for line in lines]


@dataclass(frozen=True)
class Picture:
    """A drawing that says in words what it shows."""

    file: str
    """Name of the PNG beside the Markdown; its first three letters are its own in a page."""
    title: str
    """What is drawn."""
    description: str
    """The figures worth knowing to those who cannot see it."""
    draw: Callable[[], Figure]
    """Draws it."""

    @cached_property
    def figure(self) -> Figure:
        """The drawing, made once."""
        return self.draw()

    @property
    def text(self) -> str:
        """Title and description."""
        return f"{self.title}. {self.description}"


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    anchor: str
    """Where links to it point: small letters and hyphens, once in a page."""
    heading: str
    """Empty: it opens the page and has none."""
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    is_folded: bool = False
    """True if a reader unfolds its tables first."""
    short: str = ""
    """Its name in the list of contents where the heading is too long for it."""

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to show, so that it is left out."""
        return not (self.sentences or self.pictures or any(table.body for table in self.tables))

    @property
    def summary(self) -> str:
        """What is said in place of its tables while they are folded."""
        num_lines = sum(len(table.body) for table in self.tables)
        return "1 line" if num_lines == 1 else f"{num_lines:,} lines"


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    opening: Section
    """What came out: a sentence, and the pictures worth a look."""
    sections: Sequence[Section]

    @property
    def parts(self) -> list[Section]:
        """The opening and the sections that are not empty."""
        return [section for section in (self.opening, *self.sections) if not section.is_empty]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in their order."""
        return [picture for section in self.parts for picture in section.pictures]


def percent(value: float | None, digits: int = 2) -> str:
    """Return a figure, or a dash where it does not exist."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(ends: Sequence[float] | None) -> str:
    """Return `[low, high]`, or nothing where there is no interval."""
    return "" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def p_value(value: float | None) -> str:
    """Return `0.012`; below 0.001 the bound; a dash where there was no test."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    """Return `p = 0.012`; below 0.001 the bound."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


def best_cells(
    values: Sequence[float | None], asides: Sequence[str] | None = None, lower_is_better: bool = False
) -> list[Cell]:
    """Return cells of two digits each, the best marked where there are several to choose from.

    Args:
        values: Figures that compete.
        asides: What stands beside each.
        lower_is_better: True if the lowest is the best.
    """
    known = [value for value in values if value is not None]
    best = None if len(known) < 2 else percent((min if lower_is_better else max)(known))
    texts = [percent(value) for value in values]
    return [Cell(text, aside, text == best) for text, aside in zip(texts, asides or [""] * len(texts), strict=True)]
