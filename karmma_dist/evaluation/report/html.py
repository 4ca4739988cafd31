"""A page, or any section of one, as HTML: one file that loads nothing, by the template `page.html.j2`.

The template escapes everything that comes from outside, and the page's policy forbids what the page did not bring:
style and script are inline and named there by their hashes, so a name that smuggles in markup would not run even if it
were not escaped.
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
    """Return a whole report."""
    return _template().render(page=content)


def section(content: Section) -> str:
    """Return a section alone, without style or script."""
    return str(_template().module.section(content))  # type: ignore[attr-defined]  # a macro of the template


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"breakable": _breakable, "csp_hash": _csp_hash, "svg": _svg}
    return environment.from_string(files("karmma_dist.evaluation.report").joinpath(TEMPLATE).read_text("utf-8"))


def _svg(picture: Picture) -> Markup:
    """The drawing, whose texts are escaped; names of its elements begin as that of its file."""
    return Markup(svg(picture, picture.file[:3]))


def _breakable(name: str) -> Markup:
    """A name that a narrow column breaks where a reader would: runs/epic_kitchens/distill."""
    return Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name))))


def _csp_hash(text: str) -> Markup:
    """A content-security source: the element with this text and no other."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
