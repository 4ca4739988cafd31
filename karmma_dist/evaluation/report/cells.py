"""Cells of tables, and words about series of values, that several sections of a report share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from karmma_dist.evaluation.report.model import Cell, best_cells, interval
from karmma_dist.evaluation.report.plots import Point
from karmma_dist.evaluation.report.sentences import Models
from karmma_dist.evaluation.results import DropCurve, Interval, ResultRow, SubsetSummary
from karmma_dist.evaluation.summary import METRIC, interval_of, mean_over_seeds


def point_of(rows: Sequence[ResultRow]) -> Point:
    """Return the mean over seeds, with its interval if known."""
    value = mean_over_seeds(rows)
    low, high = (None if value is None else interval_of(rows)) or (None, None)
    return Point(value, low, high)


def cells_of(points: Sequence[Point], asides: Sequence[str] | None = None) -> list[Cell]:
    """Return cells with the best one marked; each value is followed by its aside and its interval."""
    pairs = zip(asides or [""] * len(points), points, strict=True)
    return best_cells([p.value for p in points], [f"{aside} {interval(_ends(p))}".strip() for aside, p in pairs])


def _ends(point: Point) -> Interval | None:
    return None if point.low is None or point.high is None else (point.low, point.high)


def summary_cells(
    summaries: Sequence[SubsetSummary | DropCurve | None], key: str, lower_is_better: bool = False
) -> list[Cell]:
    """Return one figure of each summary, with its interval if it has one."""
    values = [None if summary is None else getattr(summary, key)[METRIC] for summary in summaries]
    intervals = [getattr(summary, f"{key}_ci", None) or {} for summary in summaries]
    return best_cells(values, [interval(ends.get(METRIC)) for ends in intervals], lower_is_better)


def extremes(name: str, values: Mapping[str, float | None]) -> str:
    """Describe a series of a picture in words: its highest and lowest value."""
    known = {place: value for place, value in values.items() if value is not None}
    if not known:
        return f"{name}: no clip could be evaluated."
    high, low = (choose(known, key=lambda place: known[place]) for choose in (max, min))
    return f"{name}: from {known[high]:.1f} % ({high}) down to {known[low]:.1f} % ({low})."


def interval_note(models: Models) -> str:
    """Return the sentence that explains intervals, with a space before it; empty if no row has one."""
    has_intervals = any(row.intervals.get(METRIC) for results in models.values() for row in results.rows)
    return " Square brackets and whiskers show 95 % intervals." if has_intervals else ""


def capitalised(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[0].upper() + text[1:]
