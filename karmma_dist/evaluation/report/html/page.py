"""report.html: the whole report in one file that needs nothing else, from the same results as report.md.

The page loads nothing, and its policy forbids it to: style and script are inline and named there by their hashes, so
a name that smuggles in markup would not run even if it were not escaped. The figures are in the page a second time,
as JSON, for whoever is sent the page alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from karmma_dist.evaluation.report.comparison_section import comparison_tables
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.findings import findings
from karmma_dist.evaluation.report.html.rows import condition_counts, every_row, everything_present
from karmma_dist.evaluation.report.html.sections import (
    at_a_glance,
    corruptions,
    missing_at_random,
    subsets_section,
    what_was_measured,
)
from karmma_dist.evaluation.report.html.tables import Section, Table, bullets
from karmma_dist.io.files import write_whole

HTML_REPORT = "report.html"

_DIGITS = 4
"""Of the figures in the embedded JSON, after the point: a hundredth of what the tables show."""

_SAVE = '<p><button type="button" id="save" hidden>Save the figures as JSON</button></p>'


def write_html_report(folder: Path, content: ReportContent) -> Path:
    """Write `folder`/report.html, whole or not at all, and return its path. The folder is made if missing."""
    text = html_report(content)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / HTML_REPORT, text.encode())
    return folder / HTML_REPORT


def html_report(content: ReportContent) -> str:
    """The page as text. A section that the rows do not allow is left out."""
    title, models, comparison = content.title, content.models, content.comparison
    tables = [] if comparison is None else comparison_tables(comparison)
    found = [
        at_a_glance(models),
        Section("findings", "What the figures say", bullets(findings(models, comparison))),
        what_was_measured(models),
        subsets_section(models),
        missing_at_random(models),
        corruptions(models),
        *(Section(f"table-{number}", name, table.to_html()) for number, (name, table) in enumerate(tables)),
        everything_present(models),
        every_row(models),
        condition_counts(models),
        Section("notes", "Notes", bullets(content.notes)),
        _times(content.timings),
    ]
    data = {"title": title, "models": models, "notes": list(content.notes), "timings": dict(content.timings)}
    return page(title, [section for section in found if section is not None and section.html], data)


def embeddable_json(value: Any) -> str:
    """Compact JSON that can stand in a script element: it holds no `<`, `>` or `&`, and floats are rounded."""
    text = json.dumps(_rounded(value), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page(title: str, sections: Sequence[Section], data: Any) -> str:
    """Return a page that loads nothing: contents, sections, and `data` as JSON for whoever is sent the page alone."""
    links = "".join(
        f'<li><a href="#{section.anchor}">{escape(section.short or section.heading)}</a></li>' for section in sections
    )
    parts = [
        f"<header>\n<h1>{escape(title)}</h1>\n<nav><ul>{links}</ul></nav>\n</header>\n<main>\n",
        *(
            f'<section id="{section.anchor}">\n<h2>{escape(section.heading)}</h2>\n{section.html}</section>\n'
            for section in sections
        ),
        f"</main>\n<footer>\n{_SAVE}\n</footer>\n",
    ]
    style, script = _resource("report.css"), _resource("report.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{''.join(parts)}"
        f'<script type="application/json" id="results">{embeddable_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _times(timings: Mapping[str, float]) -> Section:
    body = [[name, f"{seconds:,.1f}"] for name, seconds in timings.items()]
    return Section("time", "Time", Table("Seconds per step", ["step", "seconds"], body).to_html() if body else "")


def _resource(name: str) -> str:
    return files("karmma_dist.evaluation.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A content-security source: the element with this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return round(value, _DIGITS) if math.isfinite(value) else None
    return value
