"""Plots as SVG to stand inside an HTML page, whose style sheet gives the colours: `.s0` to `.s7`, one per series.

A plot is drawn for one width; a page that is read on a phone too holds a narrow one beside the wide one.
Coordinates and sizes are in CSS pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

NUM_SERIES = 8
"""Colours and marks; a ninth series takes the first again, with a dashed line."""

_MARKS = (
    "M4,0A4,4 0 1 1 -4,0A4,4 0 1 1 4,0Z",
    "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "M0,-4.8L4.4,3.2H-4.4Z",
    "M0,-5L5,0L0,5L-5,0Z",
    "M0,4.8L4.4,-3.2H-4.4Z",
    "M-1.6,-4.8H1.6V-1.6H4.8V1.6H1.6V4.8H-1.6V1.6H-4.8V-1.6H-1.6Z",
    "M-4.5,-2.3L-2.3,-4.5L0,-2.2L2.3,-4.5L4.5,-2.3L2.2,0L4.5,2.3L2.3,4.5L0,2.2L-2.3,4.5L-4.5,2.3L-2.2,0Z",
    "M0,-5.4L1.4,-1.7L5.2,-1.6L2.2,0.8L3.2,4.5L0,2.4L-3.2,4.5L-2.2,0.8L-5.2,-1.6L-1.4,-1.7Z",
)
_CHARACTER = 8.5
"""Width of a wide character of the axes' text."""
_BAR = 14
_LINE_HEIGHT = 18


@dataclass(frozen=True)
class Point:
    """One value of a series."""

    value: float | None
    """None: nothing could be evaluated."""
    low: float | None = None
    high: float | None = None
    title: str = ""
    """Shown where a pointer rests on it."""


def line_plot(
    lines: Mapping[str, Mapping[float, Point]],
    *,
    x_label: str,
    y_label: str,
    width: int,
    height: int = 340,
    reference: tuple[str, float] | None = None,
) -> str:
    """Lines over a common axis from zero upwards, with bands where the points have bounds.

    Args:
        lines: Points by their x, per series.
        x_label: What runs to the right, with its unit.
        y_label: What runs upwards, with its unit.
        width: Of the whole plot.
        height: Of the whole plot.
        reference: Name and height of a dotted horizontal line.
    """
    points = [point for line in lines.values() for point in line.values()]
    y_ticks = _ticks(0.0, _highest(points, reference), (height - 80) / 50)
    places = [x for line in lines.values() for x in line]
    left, right, top, bottom = 44.0, width - 14.0, 24.0, height - 46.0
    x_scale = _Scale(min(places, default=0.0), max(places, default=1.0), left + 8, right)
    y_scale = _Scale(0.0, y_ticks[-1], bottom, top)
    parts = [_text(2, 13, y_label)]
    for tick in y_ticks:
        y = y_scale(tick)
        parts.append(f'<path class="grid" d="M{left:.1f},{y:.1f}H{right:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}", "end"))
    for tick in _ticks(x_scale.low, x_scale.high, (right - left) / 55):
        if x_scale.low <= tick <= x_scale.high:
            parts.append(_text(x_scale(tick), bottom + 18, f"{tick:g}", "middle"))
    parts.append(f'<path class="axis" d="M{left:.1f},{bottom:.1f}H{right:.1f}"/>')
    parts.append(_text((left + right) / 2, height - 6, x_label, "middle"))
    if reference is not None:
        name, level = reference
        y = y_scale(level)
        parts.append(f'<path class="reference" d="M{left:.1f},{y:.1f}H{right:.1f}"/>')
        parts.append(_text(left + 4, y - 5, f"{name} ({level:.2g} %)", extra=' class="faint"'))
    for place, line in enumerate(lines.values()):
        parts.append(_series(place, line, x_scale, y_scale))
    return _svg(parts, width, height, f"{y_label} over {x_label}: {', '.join(lines)}")


def bar_plot(series: Mapping[str, Mapping[str, Point]], *, groups_label: str, x_label: str, width: int) -> str:
    """Bars to the right, one group per name and one bar per series in it; a whisker where a point has bounds.

    Args:
        series: Points by the name of their group, per series.
        groups_label: What the groups are.
        x_label: What runs to the right, with its unit.
        width: Of the whole plot.
    """
    groups = list(dict.fromkeys(name for of in series.values() for name in of))
    longest = _CHARACTER * max(map(len, groups), default=0)
    beside = longest <= 0.25 * width
    left, right = (longest + 12 if beside else 4.0), width - 44.0
    ticks = _ticks(0.0, _highest(point for of in series.values() for point in of.values()), (right - left) / 60)
    scale = _Scale(0.0, ticks[-1], left, right)
    head = 0 if beside else _LINE_HEIGHT
    step = head + len(series) * _BAR + 12
    start, bottom = 26, 26 + step * len(groups)
    parts = [_text(0, 13, groups_label)]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{scale(tick):.1f},{start}V{bottom}"/>')
        parts.append(_text(scale(tick), bottom + 16, f"{tick:g}", "middle"))
    for number, group in enumerate(groups):
        y = start + number * step
        middle = y + 6 + len(series) * _BAR / 2 + 4
        parts.append(_text(left - 8, middle, group, "end") if beside else _text(left, y + 15, group))
        for place, of in enumerate(series.values()):
            if group in of:
                parts.append(_bar(place, of[group], y + 6 + head + place * _BAR, scale))
    parts.append(f'<path class="axis" d="M{left:.1f},{start}V{bottom}"/>')
    parts.append(_text((left + right) / 2, bottom + 36, x_label, "middle"))
    return _svg(parts, width, bottom + 44, f"{x_label} per {groups_label}: {', '.join(series)}")


def legend(names: Iterable[str], marks: bool) -> str:
    """A list of the series with their mark (or a square, for bars), outside the plot so that long names wrap."""
    lines = [
        f'<li><svg class="{_class(place)}" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path fill="currentColor" d="{_MARKS[place % NUM_SERIES] if marks else "M-6,-6H6V6H-6Z"}"/></svg> '
        f"{escape(name)}</li>"
        for place, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(lines)}</ul>'


@dataclass(frozen=True)
class _Scale:
    """From [low, high] to the pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + ((value - self.low) / span if span else 0.5) * (self.end - self.start)


def _series(place: int, line: Mapping[float, Point], x_scale: _Scale, y_scale: _Scale) -> str:
    """Band, line and marks; a value that is missing interrupts the line."""
    parts = []
    for run in _runs(line):
        upper = [(x, p.high) for x, p in run if p.low is not None and p.high is not None]
        lower = [(x, p.low) for x, p in run if p.low is not None and p.high is not None]
        edge = [f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in [*upper, *reversed(lower)] if y is not None]
        if len(upper) > 1:
            parts.append(f'<path class="band" d="M{"L".join(edge)}Z"/>')
        path = "L".join(f"{x_scale(x):.1f},{y_scale(p.value):.1f}" for x, p in run if p.value is not None)
        parts.append(f'<path class="line" d="M{path}"/>')
    for x, point in line.items():
        if point.value is not None:
            parts.append(
                f'<g transform="translate({x_scale(x):.1f},{y_scale(point.value):.1f})">'
                f'<title>{escape(point.title)}</title><circle class="target" r="10"/>'
                f'<path class="mark" d="{_MARKS[place % NUM_SERIES]}"/></g>'
            )
    return f'<g class="{_class(place)}">{"".join(parts)}</g>'


def _runs(line: Mapping[float, Point]) -> list[list[tuple[float, Point]]]:
    """Neighbours that have values."""
    runs: list[list[tuple[float, Point]]] = [[]]
    for x, point in sorted(line.items(), key=lambda pair: pair[0]):
        if point.value is None:
            runs.append([])
        else:
            runs[-1].append((x, point))
    return [run for run in runs if run]


def _bar(place: int, point: Point, y: float, scale: _Scale) -> str:
    if point.value is None:
        return _text(scale.start + 4, y + _BAR - 3, "–")
    end = scale(point.value)
    parts = [
        f'<g class="{_class(place)}"><title>{escape(point.title)}</title>'
        f'<rect class="bar" x="{scale.start:.1f}" y="{y:.1f}" width="{end - scale.start:.1f}" height="{_BAR - 2}"/>'
    ]
    if point.low is not None and point.high is not None:
        middle = y + (_BAR - 2) / 2
        parts.append(f'<path class="whisker" d="M{scale(point.low):.1f},{middle:.1f}H{scale(point.high):.1f}"/>')
        end = max(end, scale(point.high))
    return "".join([*parts, "</g>", _text(end + 4, y + _BAR - 3, f"{point.value:.1f}", extra=' class="value"')])


def _highest(points: Iterable[Point], reference: tuple[str, float] | None = None) -> float:
    heights = [h for point in points for h in (point.value, point.high) if h is not None and math.isfinite(h)]
    return max([*heights, 0.0 if reference is None else reference[1]], default=0.0) or 1.0


def _ticks(low: float, high: float, wanted: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, at most about `wanted` of them."""
    raw = (high - low) / max(1.0, wanted) or 1.0
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 10) for k in range(first, max(last, first + 1) + 1)]


def _class(place: int) -> str:
    return f"s{place % NUM_SERIES}" + (" again" if place >= NUM_SERIES else "")


def _text(x: float, y: float, text: str, anchor: str = "", extra: str = "") -> str:
    where = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{where}{extra}>{escape(text)}</text>'


def _svg(parts: Sequence[str], width: float, height: float, label: str) -> str:
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label)}" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">{"".join(parts)}</svg>'
    )
