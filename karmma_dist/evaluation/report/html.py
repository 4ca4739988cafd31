"""Render a page, or a single section, as HTML: one self-contained file from the template `page.html.j2`.

The template escapes all external text, and the page's content security policy allows only the page's own style and
script: both are inline and identified by their hashes. Injected markup would not run even if it were not escaped.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from karmma_dist.evaluation.report.model import Page, Picture, Section
from karmma_dist.evaluation.report.plots import svg

TEMPLATE = "page.html.j2"


def page(content: Page) -> str:
    """Return a report as an HTML document."""
    return _template().render(page=content)


def section(content: Section) -> str:
    """Return a section as an HTML fragment, without style or script."""
    return str(_template().module.section(content))  # type: ignore[attr-defined]  # a macro of the template


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"breakable": _breakable, "csp_hash": _csp_hash, "svg": _svg}
    return environment.from_string(files("karmma_dist.evaluation.report").joinpath(TEMPLATE).read_text("utf-8"))


def _svg(picture: Picture) -> Markup:
    """Return the drawing with escaped text; the ids of its elements begin with the first letters of its file name."""
    return Markup(svg(picture, picture.file[:3]))


def _breakable(name: str) -> Markup:
    """Return a name that a narrow column can break after slashes and underscores: runs/epic_kitchens/distill."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))


def _csp_hash(text: str) -> Markup:
    """Return the content security policy source that allows only the element with this text."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
