"""Render a page, or a single section, as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from karmma_dist.evaluation.report.model import Cell, Page, Picture, Section, Table

_MARKUP = re.compile(r"[\\`*|]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])(?=\()|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Characters that would begin emphasis, code, a cell, an element, a character reference or a link."""
_BLOCK = re.compile(r"^(\d*)([#>+\-=~\[.)])")
"""Characters that would begin a heading, a list, a quotation, a fence or a link definition."""


def page(content: Page) -> str:
    """Return a report as Markdown."""
    return "\n".join([f"# {_heading(content.title)}\n", *map(section, content.parts)])


def section(content: Section) -> str:
    """Return a section as Markdown; folded tables are inside a `details` element."""
    lines = [f"## {_heading(content.heading)}\n"] if content.heading else []
    if content.heading:
        lines += [*(f"* {_paragraph(sentence)}" for sentence in content.sentences), *[""] * bool(content.sentences)]
    else:
        lines += [f"{_paragraph(sentence)}\n" for sentence in content.sentences]
    lines += [f"{picture(entry)}\n" for entry in content.pictures]
    tables = [entry for entry in content.tables if entry.body]
    if tables and content.is_folded:
        lines.append(f"<details>\n<summary>{content.summary}</summary>\n")
    lines += [_titled(entry, len(tables) > 1) for entry in tables]
    if tables and content.is_folded:
        lines.append("</details>\n")
    return "\n".join(lines)


def table(content: Table) -> str:
    """Return a table as Markdown; best cells are bold, and a cell's aside follows its text."""
    rule = ["---" if column in content.text_columns else "---:" for column in range(len(content.columns))]
    lines = [*content.cells(content.body), *content.cells(content.foot)]
    rows = [list(map(text, content.columns)), rule, *([_cell(cell) for cell in line] for line in lines)]
    return "\n".join(_row(row) for row in rows)


def picture(content: Picture) -> str:
    """Return the reference to the PNG, with the picture's text as alternative text."""
    alternative = re.sub(r"[\[\]]", "", text(content.text))
    return f"![{alternative}]({content.file})"


def text(name: str) -> str:
    """Return a text on one line, with Markdown markup escaped."""
    return _MARKUP.sub(lambda match: "\\" + match[0], " ".join(name.split()))


def _heading(name: str) -> str:
    return text(name).replace("#", r"\#")


def _paragraph(sentence: str) -> str:
    return _BLOCK.sub(lambda match: match[1] + "\\" + match[2], text(sentence))


def _titled(content: Table, has_title: bool) -> str:
    parts = [f"### {_heading(content.title)}\n"] if has_title else []
    parts.append(f"{table(content)}\n")
    return "\n".join([*parts, *([f"{_paragraph(content.caption)}\n"] if content.caption else [])])


def _cell(cell: Cell) -> str:
    shown = f"**{text(cell.text)}**" if cell.is_best else text(cell.text)
    return f"{shown} {text(cell.aside)}" if cell.aside else shown


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
