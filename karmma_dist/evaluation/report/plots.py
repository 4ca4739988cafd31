"""The plots of a report, drawn once with Matplotlib: as PNG for the Markdown, as SVG inside the HTML page.

The colours are Okabe and Ito's palette, which colour-blind readers can distinguish. A plot is as wide as a phone, so
that its text is readable there, and scales up on a larger screen. The SVG contains classes instead of colours; the
page's style sheet colours them for light and dark mode. `f0` to `f7` fill and `s0` to `s7` stroke with the colour of a
series, `fk` and `sk` use the colour of text, and `sg` that of the grid.
"""

from __future__ import annotations

import io
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from karmma_dist.evaluation.report.model import Picture
from karmma_dist.io.files import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#010101", "#F0E442")
"""Colours of the series in turn; the black is not pure, since Matplotlib's SVG omits the colour of pure black."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

INK, GRID = "#1b1f24", "#d0d5db"

WIDTH = 4.6
"""Width of a plot in inches; on a phone of 360 pixels, a point is about a pixel."""

_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "axes.linewidth": 0.8, "font.size": 9.0, "svg.fonttype": "none",
    "svg.hashsalt": "karmma-dist", "text.color": INK, "xtick.color": INK, "ytick.color": INK, "path.simplify": False,
    "text.parse_math": False, "xtick.major.size": 0.0, "ytick.major.size": 0.0,
}  # fmt: skip
_DOTS_PER_INCH = 200
_LEGEND_CHARACTERS = 62
"""Number of characters that fit into a line of the legend, including its marks."""
_MARK_CHARACTERS = 5
_LEGEND_LINE = 0.17
"""Height of a line of a legend in inches."""


@dataclass(frozen=True)
class Point:
    """A value with its bounds, in the unit of its axis."""

    value: float | None
    """The value; None: no clip could be evaluated."""
    low: float | None = None
    high: float | None = None


Line = Mapping[float, Point]
"""Points by their x."""


def line_figure(
    lines: Mapping[str, Line], x_label: str, y_label: str, reference: tuple[str, float] | None = None
) -> Figure:
    """Draw a line with marks per series, and a band around points with bounds (as in the paper's Fig. 4).

    Args:
        lines: Points per series, in ascending x. A missing value interrupts the line.
        x_label: Label of the x axis, with its unit.
        y_label: Label of the y axis, with its unit; the axis begins at zero.
        reference: Name and height of a dotted horizontal line.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(2.8, [*lines, *(reference[:1] if reference else ())])
        axes = figure.add_subplot()
        for place, (name, line) in enumerate(lines.items()):
            _draw_line(axes, place, name, line)
        if reference is not None:
            axes.axhline(reference[1], color=INK, linewidth=1, linestyle=":", label=_wrapped(reference[0]))
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        style_axes(axes)
        _add_legend(figure, axes)
        return figure


def bar_figure(series: Mapping[str, Mapping[str, Point]], groups_label: str, x_label: str) -> Figure:
    """Draw groups of horizontal bars, with one bar per series in each group, and whiskers for points with bounds.

    Args:
        series: Points by the name of their group, per series.
        groups_label: Label of the axis of groups.
        x_label: Label of the x axis, with its unit.
    """
    groups = list(dict.fromkeys(group for points in series.values() for group in points))
    width = 1 / (len(series) + 0.7)
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(0.5 + 0.135 * len(groups) * (len(series) + 0.7), list(series))
        axes = figure.add_subplot()
        for place, (name, points) in enumerate(series.items()):
            label = _wrapped(name)
            for group, point in points.items():
                y = groups.index(group) + (place - (len(series) - 1) / 2) * width
                _draw_bar(axes, place, point, y, width, label)
                label = "_nolegend_"  # only the first bar of a series is in the legend
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(max(len(groups), 1) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        axes.set_xlabel(x_label)
        axes.set_ylabel(groups_label)
        style_axes(axes, "x")
        _add_legend(figure, axes)
        return figure


def panel_figure(
    panels: Mapping[str, Mapping[str, Line]], x_label: str, y_label: str, x_ticks: Sequence[float]
) -> Figure:
    """Draw one small panel per name with a line per series; all panels share their axes.

    Args:
        panels: Points per series, per panel.
        x_label: Label of the x axis, with its unit.
        y_label: Label of the y axis, with its unit; the axis begins at zero.
        x_ticks: Positions of the ticks on the x axis.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = _figure(0.5 + 1.25 * rows, names)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (title, lines) in zip(grid, panels.items(), strict=False):
            axes.set_title(title, fontsize=9)
            for name, line in lines.items():
                _draw_line(axes, names.index(name), name, line)
            style_axes(axes)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        grid[0].set_ylim(bottom=0)
        grid[0].set_xticks(x_ticks)
        figure.supxlabel(x_label, fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        _add_legend(figure, grid[0])
        return figure


def style_axes(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Remove the top and right spines, and draw light grid lines behind the data for the axis `grid`."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH))


def _figure(height: float, names: Sequence[str]) -> Figure:
    """Return a figure with room for the plot (`height` in inches) and for a legend of these names."""
    shown = list(map(_wrapped, names))
    lines = -(-sum(name.count("\n") + 1 for name in shown) // _legend_columns(shown)) if len(names) > 1 else 0
    return Figure(figsize=(WIDTH, height + _LEGEND_LINE * lines), layout="constrained")


def _draw_line(axes: Axes, place: int, name: str, line: Line) -> None:
    colour, again = COLOURS[place % len(COLOURS)], place >= len(COLOURS)
    x = list(line)
    y = [float("nan") if point.value is None else point.value for point in line.values()]
    axes.plot(
        x, y, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=4, markeredgewidth=0, linewidth=1.5,
        linestyle="--" if again else "-", label=_wrapped(name),
    )  # fmt: skip
    bounded = {x: (max(0.0, point.low), point.high) for x, point in line.items()
               if point.low is not None and point.high is not None}  # fmt: skip
    if len(bounded) > 1:
        low, high = zip(*bounded.values(), strict=True)
        axes.fill_between(list(bounded), low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_bar(axes: Axes, place: int, point: Point, y: float, width: float, label: str) -> None:
    """Draw a bar with its value at its end, or a dash for a missing value. The label puts the bar into the legend."""
    value = 0.0 if point.value is None else point.value
    alpha = 0.55 if place >= len(COLOURS) else None
    axes.barh(y, value, 0.86 * width, color=COLOURS[place % len(COLOURS)], alpha=alpha, label=label)
    end = value
    if point.low is not None and point.high is not None:
        axes.plot([max(0.0, point.low), point.high], [y, y], color=INK, linewidth=1)
        end = max(end, point.high)
    text = "–" if point.value is None else f"{point.value:.1f}"
    axes.annotate(text, (end, y), (2, 0), textcoords="offset points", va="center_baseline", fontsize=8.5)


def _legend_columns(names: Sequence[str]) -> int:
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    return max(1, min(len(names), _LEGEND_CHARACTERS // (longest + _MARK_CHARACTERS)))


def _wrapped(name: str) -> str:
    """Wrap a name to the width of the plot, and protect a leading underscore, which Matplotlib's legends leave out."""
    lines = "\n".join(textwrap.wrap(name, _LEGEND_CHARACTERS - _MARK_CHARACTERS)) or " "
    return f"\u200b{lines}" if lines.startswith("_") else lines


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend above the plot if it has several series or a reference line."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(
            handles, names, frameon=False, ncols=_legend_columns(names), loc="outside upper left", handlelength=1.6,
            columnspacing=1.2, borderpad=0, labelspacing=0.3,
        )  # fmt: skip


_COMMANDS = re.compile(r"([MLHVCQz])([^MLHVCQz]*)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
_SVG, _HREF = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"

_CLASSES = {colour.lower(): str(place) for place, colour in enumerate(COLOURS)} | {INK: "k", GRID: "g"}
_KEPT = {"fill-opacity": "1", "opacity": "1", "stroke-width": "1", "stroke-dasharray": "none", "text-anchor": "start",
         "font-size": "9"}  # fmt: skip
"""Properties that an element keeps unless they equal these defaults of the style sheet."""


def svg(picture: Picture, prefix: str) -> str:
    """Return a picture as a deterministic SVG element for a page, without styles, colours or external resources.

    Args:
        picture: The picture to draw.
        prefix: Prefix of the element ids, unique for each picture of a page.
    """
    figure, target = picture.figure, io.StringIO()
    FigureCanvasSVG(figure)
    with matplotlib.rc_context(_SETTINGS):
        none = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(target, format="svg", transparent=True, metadata=none)
    root = ElementTree.fromstring(target.getvalue())
    shapes = {element.get("id", ""): element for element in root.iter(f"{_SVG}path") if element.get("id")}
    names: dict[str, str] = {}
    elements = [_element(element, shapes, names, prefix) for element in _drawn(root)]
    parts = _merged(sorted(elements, key=_layer))
    marks = "".join(f'<path id="{name}" d="{_path(shapes[shape].get("d", ""))}"/>' for shape, name in names.items())
    _, _, width, height = map(float, root.get("viewBox", "0 0 1 1").split())
    return (
        f'<svg class="plot" role="img" aria-labelledby="{prefix}t {prefix}d" viewBox="0 0 {width:g} {height:g}">'
        f'<title id="{prefix}t">{escape(picture.title)}</title><desc id="{prefix}d">{escape(picture.description)}'
        f"</desc><defs>{marks}</defs>{''.join(parts)}</svg>"
    )


def _drawn(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Yield the elements that draw something, in document order."""
    for child in element:
        if child.tag == f"{_SVG}g":
            yield from _drawn(child)
        elif child.tag == f"{_SVG}text" or child.get("style", "fill: none") not in ("", "fill: none"):
            yield child


def _layer(element: tuple[str, str, str]) -> tuple[int, str]:
    """Return the sort key of an element: grid, then areas, lines, marks and text; equal attributes are adjacent."""
    kind, attributes, _ = element
    if kind == "path":
        return next(n for n, name in enumerate(("sg", "f", "s")) if f'class="{name}' in attributes), attributes
    return (3 if kind == "use" else 4), attributes


def _element(
    element: ElementTree.Element, shapes: Mapping[str, ElementTree.Element], names: dict[str, str], prefix: str
) -> tuple[str, str, str]:
    """Return tag, attributes and content of an element without style; shapes used several times are put in `names`."""
    style = dict(part.split(": ", 1) for part in element.get("style", "").split("; ") if part)
    attributes = _attributes(style)
    if element.tag == f"{_SVG}path":
        return "path", attributes, _path(element.get("d", ""))
    x, y = float(element.get("x", 0)), float(element.get("y", 0))
    if element.tag == f"{_SVG}text":
        transform = element.get("transform", "")
        if moved := re.search(r"translate\(([-\d.]+) ([-\d.]+)", transform):
            x, y = float(moved[1]), float(moved[2])
        turned = re.search(r"rotate\((-?[1-9][\d.]*)", transform)
        rotation = f' transform="rotate({turned[1]} {_short(x)} {_short(y)})"' if turned else ""
        return "text", attributes, f'x="{_short(x)}" y="{_short(y)}"{rotation}>{escape(element.text or "")}'
    shape = element.get(_HREF, "").removeprefix("#")
    if abs(x) < 1e-6:  # a band, which Matplotlib only shifts vertically
        return "path", attributes, _path(shapes[shape].get("d", ""), y)
    name = names.setdefault(shape, f"{prefix}{len(names)}")
    return "use", attributes, f'href="#{name}" x="{_short(x)}" y="{_short(y)}"'


def _attributes(style: Mapping[str, str]) -> str:
    fill, stroke = _CLASSES.get(style.get("fill", ""), ""), _CLASSES.get(style.get("stroke", ""), "")
    classes = [f"f{fill}"] * bool(fill) + [f"s{stroke}"] * (bool(stroke) and not fill)
    kept = [(name, style[name].removesuffix("px")) for name in _KEPT if name in style]
    text = "".join(f' {name}="{value}"' for name, value in kept if value != _KEPT[name])
    return (f' class="{classes[0]}"' if classes else "") + text


def _merged(elements: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Merge neighbours with equal tag and attributes into one path or one group."""
    waiting: list[str] = []
    before: tuple[str, str] | None = None
    for kind, attributes, content in [*elements, ("", "", "")]:
        if before is not None and (kind, attributes) != before:
            yield _group(*before, waiting)
            waiting = []
        before = kind, attributes
        waiting.append(content)


def _group(kind: str, attributes: str, contents: Sequence[str]) -> str:
    if kind == "path":
        return f'<path{attributes} d="{"".join(contents)}"/>'
    end = {"use": "/>", "text": "</text>"}[kind]
    return f"<g{attributes}>{''.join(f'<{kind} {content}{end}' for content in contents)}</g>"


def _path(description: str, down: float = 0.0) -> str:
    """Return path data rounded to tenths of a point, shifted down by `down`."""
    parts, before = [], ("", "")
    for command, text in _COMMANDS.findall(description):
        numbers = [float(number) for number in _NUMBER.findall(text)]
        numbers[1::2] = [y + down for y in numbers[1::2]]
        shown = list(map(_short, numbers))
        if command == "L" and shown[1] == before[1]:
            parts.append(f"H{shown[0]}")
        elif command == "L" and shown[0] == before[0]:
            parts.append(f"V{shown[1]}")
        elif command == "L" and parts[-1][0] in "ML ":  # further points imply the command L
            parts.append(" " + " ".join(shown))
        else:
            parts.append(command + " ".join(shown))
        if shown:
            before = shown[-2], shown[-1]
    return "".join(parts)


def _short(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
