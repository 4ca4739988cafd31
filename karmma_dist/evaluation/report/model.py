"""The content of a report as data, independent of its output format.

A page consists of sections, and a section of sentences, tables and pictures. `sections` builds them from results;
`markdown`, `html` and `terminal` render any section, so all three show the same content.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure

NONE = "–"
"""Text of a missing figure."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    aside: str = ""
    """Smaller text after the main text, such as an interval or a deviation."""
    is_best: bool = False
    """True if the cell is shown in bold."""


TableLine = Sequence[Cell | str]
"""A line of a table, with one cell per column; a string is a cell that has only text."""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each line names the line."""

    title: str
    """Title for screen readers, also shown above the table if a section has several tables."""
    columns: Sequence[str]
    """Column headings."""
    body: Sequence[TableLine]
    foot: Sequence[TableLine] = ()
    """Lines that stay at the bottom when the body is sorted."""
    text_columns: frozenset[int] = frozenset({0})
    """Columns that are left-aligned and sorted as text; the other columns contain figures."""
    caption: str = ""
    """Sentences below the table."""

    def cells(self, lines: Sequence[TableLine]) -> list[list[Cell]]:
        """Return the lines with every string turned into a cell."""
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in line] for line in lines]


@dataclass(frozen=True)
class Picture:
    """A plot with a description in words."""

    file: str
    """Name of the PNG next to the Markdown; its first three letters must be unique within a page."""
    title: str
    """Title of the plot."""
    description: str
    """Main figures in words, for readers who cannot see the plot."""
    draw: Callable[[], Figure]
    """Function that draws the plot."""

    @cached_property
    def figure(self) -> Figure:
        """The plot, drawn once."""
        return self.draw()

    @property
    def text(self) -> str:
        """Title and description of the plot."""
        return f"{self.title}. {self.description}"


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    anchor: str
    """Target of links to the section: lower-case letters and hyphens, unique within a page."""
    heading: str
    """Heading; empty for the section that opens the page."""
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    is_folded: bool = False
    """True if the tables are folded until the reader opens them."""
    short: str = ""
    """Short name for the table of contents; empty: the heading is used."""

    @property
    def is_empty(self) -> bool:
        """True if the section has no content, so that it is left out."""
        return not (self.sentences or self.pictures or any(table.body for table in self.tables))

    @property
    def summary(self) -> str:
        """Text shown in place of the folded tables."""
        num_lines = sum(len(table.body) for table in self.tables)
        return "1 line" if num_lines == 1 else f"{num_lines:,} lines"


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    opening: Section
    """The main result in a sentence, and the main pictures."""
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
    """Return a figure as text, or a dash if it is missing."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def interval(ends: Sequence[float] | None) -> str:
    """Return `[low, high]`, or an empty string without an interval."""
    return "" if ends is None else f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def p_value(value: float | None) -> str:
    """Return a p-value as `0.012`, or `< 0.001`, or a dash without a test."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_equals(value: float) -> str:
    """Return a p-value as `p = 0.012` or `p < 0.001`."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


def best_cells(
    values: Sequence[float | None], asides: Sequence[str] | None = None, lower_is_better: bool = False
) -> list[Cell]:
    """Return cells with two decimals; if at least two values are known, the best is marked.

    Args:
        values: Figures to compare.
        asides: Text after each figure.
        lower_is_better: True if the lowest value is the best.
    """
    known = [value for value in values if value is not None]
    best = None if len(known) < 2 else percent((min if lower_is_better else max)(known))
    texts = [percent(value) for value in values]
    return [Cell(text, aside, text == best) for text, aside in zip(texts, asides or [""] * len(texts), strict=True)]
