"""Sections of the HTML report with their plots: which figures of the results stand in which table.

Rows with a corrupted sensor (`corrupt` is set) stand in a section of their own and among all rows, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from karmma_dist.evaluation.report.html.svg import Point, bar_plot, legend, line_plot
from karmma_dist.evaluation.report.html.tables import Cell, Section, Table, best_cells, bullets, note, number
from karmma_dist.evaluation.report.readings import (
    Models,
    Row,
    clip_counts,
    clips_per_model,
    fullest,
    fullest_name,
    has_intervals,
    interval_text,
    mean_point,
    rows_of,
    uncorrupted,
)
from karmma_dist.evaluation.report.rows import model_ranks, subset_values
from karmma_dist.evaluation.summary import METRIC
from karmma_dist.modalities import letters

WIDE, NARROW = 720, 326
"""Widths of the two drawings of each plot, in pixels: a desk's, and that of a phone of 360."""

_NOTHING = "nothing corrupted"


def at_a_glance(models: Models) -> Section:
    """One line per model: the figures that models are compared by."""
    clean = uncorrupted(models)
    over = [results["summary"]["subsets"] for results in models.values()]
    curves = [results["summary"]["drop_curve"] for results in models.values()]
    ranks = model_ranks(clean) if len(models) > 1 else {}
    rows = [fullest(results["rows"]) for results in clean.values()]
    columns: list[tuple[str, list[Cell]]] = [(fullest_name(models), _best([mean_point("", of) for of in rows]))]
    if any(over):
        columns += [
            ("average over subsets", _figure_cells(over, "average")),
            ("relative drop (%)", _figure_cells(over, "relative_drop", lowest=True)),
        ]
        if ranks:
            columns.append(("average rank", best_cells(list(ranks.values()), lowest=True)))
    if any(curves):
        columns += [
            ("mean over drop probabilities", _figure_cells(curves, "area")),
            ("fall (points)", _figure_cells(curves, "fall", lowest=True)),
            ("fall (% of the start)", _figure_cells(curves, "relative_fall", lowest=True)),
        ]
    body: list[list[Cell | str]] = [
        [name, *(cells[place] for _, cells in columns)] for place, name in enumerate(models)
    ]
    table = Table("Action top-1 of each model", ["action top-1 (%)", *(name for name, _ in columns)], body)
    caption = "Relative drop: lost against the largest subset, averaged over the smaller subsets. The best is in bold."
    return Section("glance", "At a glance", table.to_html() + note(caption if any(over) else ""))


def what_was_measured(models: Models) -> Section:
    """Clips, chance, and what the data itself lacks, per model."""
    first = next(iter(models.values()))["summary"]
    heads = [
        [name, f"{num:,}", f"{first['chance_top1'][name]:.3g}", number(first["majority_top1"][name])]
        for name, num in first["num_classes"].items()
    ]
    head_columns = ["head", "classes", "chance (%)", "always the most frequent (%)"]
    columns, body = clips_per_model(models)
    fewest = min(results["summary"]["num_clips"] for results in models.values())
    seeds = max(len(results["summary"]["seeds"]) for results in models.values())
    lines = [
        f"Seeds of the drops: {seeds}. What a clip loses depends on seed and key alone, not on the model.",
        f"By sampling {fewest:,} clips alone, the 95 % interval of a figure is up to ±{98 / math.sqrt(fewest):.1f} "
        "points.",
        "“Without” counts clips whose modality the data itself lacks; a modality that cannot be read is damage, and "
        "its clip is unreadable.",
    ]
    damage = dict.fromkeys(line for results in models.values() for line in results["summary"]["damage"])
    html = (
        Table("Classes and chance per head", head_columns, heads).to_html()
        + Table("Clips per model", columns, body).to_html()
        + bullets(lines)
        + bullets([f"unreadable: {line}" for line in damage])
    )
    return Section("measured", "What was measured", html)


def subsets_section(models: Models) -> Section | None:
    """Every subset of the modalities, with averages, and its bars."""
    clean = uncorrupted(models)
    probability, values = subset_values(clean)
    subsets = list(dict.fromkeys(subset for of in values.values() for subset in of))
    if len(subsets) < 2:
        return None
    points: dict[str, dict[str, Point]] = {name: {} for name in models}
    body: list[list[Cell | str]] = []
    for subset in subsets:
        rows = {name: rows_of(results["rows"], subset, probability) for name, results in clean.items()}
        line = {name: mean_point(f"{name}, {letters(subset)}", of) for name, of in rows.items()}
        for name, point in line.items():
            if rows[name]:
                points[name][letters(subset)] = point
        body.append([letters(subset), *_best(list(line.values())), clip_counts(rows)])
    over = [results["summary"]["subsets"] for results in models.values()]
    foot: list[list[Cell | str]] = [
        ["average over subsets", *_figure_cells(over, "average")],
        ["average relative drop (%)", *_figure_cells(over, "relative_drop", lowest=True)],
    ]
    if len(models) > 1:
        foot.append(["average rank", *best_cells(list(model_ranks(clean).values()), lowest=True)])
    at = f" at drop probability {probability:g}" if probability else ""
    table = Table(f"Action top-1 per subset{at}", ["present", *models, "clips"], body, [[*line, ""] for line in foot])
    caption = "A clip that has none of a subset's modalities cannot be shown to a model: counted apart, as without."
    drawn = figure(
        f"Action top-1 per subset of the modalities{at}",
        legend(models, marks=False),
        lambda width: bar_plot(points, groups_label="modalities present", x_label="action top-1 (%)", width=width),
    )
    heading = f"Subsets of the modalities{at}: action top-1 (%)"
    return Section("subsets", heading, table.to_html() + note(caption + _interval_note(clean)) + drawn, "Subsets")


def missing_at_random(models: Models) -> Section | None:
    """The curve over the drop probability."""
    curves = {name: results["summary"]["drop_curve"] for name, results in models.items()}
    if not any(curves.values()):
        return None
    clean = uncorrupted(models)
    swept = {name: letters(curve["modalities"]) for name, curve in curves.items() if curve}
    same = len(set(swept.values())) == 1
    lines = {
        name if same or not curve else f"{name} ({swept[name]})": (
            _curve_points(name, curve, clean[name]["rows"]) if curve else {}
        )
        for name, curve in curves.items()
    }
    body: list[list[Cell | str]] = []
    for probability in sorted({p for curve in curves.values() if curve for p in curve["drop_prob"]}):
        body.append([f"{100 * probability:g}", *_curve_cells(curves, clean, probability)])
    ends = [("mean height (area)", "area", False), ("fall (points)", "fall", True)]
    ends.append(("fall (% of the start)", "relative_fall", True))
    foot: list[list[Cell | str]] = [
        [label, *_figure_cells(list(curves.values()), key, lowest)] for label, key, lowest in ends
    ]
    table = Table("Action top-1 per drop probability", ["drop probability (%)", *lines], body, foot)
    chance = next(iter(models.values()))["summary"]["chance_top1"]["action"]
    drawn = figure(
        "Action top-1 over the probability that a modality is missing at inference",
        legend(lines, marks=True),
        lambda width: line_plot(
            lines,
            x_label="drop probability (%)",
            y_label="action top-1 (%)",
            width=width,
            reference=("chance", chance),
        ),
    )
    several = any(curve and curve["num_seeds"] > 1 for curve in curves.values())
    deviation = " ± is the standard deviation over the seeds." if several else ""
    band = "" if has_intervals(clean) or not several else " The band is one such deviation to either side."
    of = f" of {next(iter(swept.values()))}" if same else " modality"
    caption = f"At least one{of} stays in each clip.{deviation}{band}{_interval_note(clean)}"
    heading = "Modalities missing at random: action top-1 (%)"
    return Section("sweep", heading, table.to_html() + note(caption) + drawn, "Missing at random")


def corruptions(models: Models) -> Section | None:
    """Conditions with a corrupted sensor, beside the same without."""
    conditions = dict.fromkeys(
        (row["corrupt"], tuple(row["modalities"]), row["drop_prob"])
        for results in models.values()
        for row in results["rows"]
        if row.get("corrupt")
    )
    if not conditions:
        return None
    whole = dict.fromkeys((modalities, probability) for _, modalities, probability in conditions)
    shown = [*((None, modalities, probability) for modalities, probability in whole), *conditions]
    points: dict[str, dict[str, Point]] = {name: {} for name in models}
    body: list[list[Cell | str]] = []
    for corrupt, modalities, probability in shown:
        at = f" at {100 * probability:g} %" if probability else ""
        label = (corrupt or _NOTHING) + (f", {letters(modalities)}{at}" if len(whole) > 1 else "")
        line = []
        for name, results in models.items():
            rows = rows_of(results["rows"], modalities, probability, corrupt)
            line.append(mean_point(f"{name}, {label}", rows))
            if rows:
                points[name][label] = line[-1]
        body.append([label, *_best(line)])
    table = Table("Action top-1 per corrupted sensor", ["corrupted", *models], body)
    drawn = figure(
        "Action top-1 per corrupted sensor",
        legend(models, marks=False),
        lambda width: bar_plot(points, groups_label="corrupted", x_label="action top-1 (%)", width=width),
    )
    caption = (
        "Named as sensor, kind, severity; the camera is video and flow. A corrupted sensor is there: its modality is "
        "not absent."
    )
    heading = "Corrupted sensors: action top-1 (%)"
    return Section("corrupted", heading, table.to_html() + note(caption) + drawn, "Corrupted sensors")


def _figure_cells(summaries: Sequence[dict[str, Any] | None], key: str, lowest: bool = False) -> list[Cell]:
    """A figure of the summaries with its interval, where it has one."""
    values = [None if of is None else of[key][METRIC] for of in summaries]
    intervals = [None if of is None else of.get(f"{key}_ci", {}).get(METRIC) for of in summaries]
    return best_cells(values, [interval_text(*(ends or (None, None))) for ends in intervals], lowest)


def _best(points: Sequence[Point], asides: Sequence[str] | None = None) -> list[Cell]:
    """The best marked; after each the aside, else its interval."""
    given = asides or [""] * len(points)
    shown = [f"{aside} {interval_text(p.low, p.high)}".strip() for aside, p in zip(given, points, strict=True)]
    return best_cells([point.value for point in points], shown)


def _interval_note(models: Models) -> str:
    if not has_intervals(models):
        return ""
    return " Brackets, bands and whiskers are 95 % intervals."


def _curve_point(name: str, curve: dict[str, Any] | None, rows: Sequence[Row], probability: float) -> Point:
    """Mean over seeds at one drop probability, with the curve's own interval where the summary has it."""
    if curve is None or probability not in curve["drop_prob"]:
        return Point(None)
    ends = curve.get("mean_ci", {}).get(METRIC)
    own = None if ends is None else ends[curve["drop_prob"].index(probability)]
    label = f"{name} at drop probability {100 * probability:g} %"
    return mean_point(label, rows_of(rows, curve["modalities"], probability), own)


def _curve_points(name: str, curve: dict[str, Any], rows: Sequence[Row]) -> dict[float, Point]:
    """Per drop probability in percent; bounds are the interval, else one standard deviation over several seeds."""
    points = {}
    for probability, mean, std in zip(curve["drop_prob"], curve["mean"][METRIC], curve["std"][METRIC], strict=True):
        point = _curve_point(name, curve, rows, probability)
        if point.low is None and mean is not None and std and curve["num_seeds"] > 1:
            title = f"{name} at drop probability {100 * probability:g} %: {number(mean)} ± {number(std)} %"
            point = Point(mean, mean - std, mean + std, title)
        points[100 * probability] = point
    return points


def _curve_cells(curves: Mapping[str, dict[str, Any] | None], models: Models, probability: float) -> list[Cell]:
    """One line of the table: mean, deviation over several seeds, interval."""
    points = [_curve_point(name, curve, models[name]["rows"], probability) for name, curve in curves.items()]
    return _best(points, [_spread(curve, probability) for curve in curves.values()])


def _spread(curve: dict[str, Any] | None, probability: float) -> str:
    if curve is None or curve["num_seeds"] < 2 or probability not in curve["drop_prob"]:
        return ""
    std = curve["std"][METRIC][curve["drop_prob"].index(probability)]
    return f"± {std:.2f}" if std else ""


def figure(caption: str, key: str, draw: Callable[[int], str]) -> str:
    """Return a figure with its legend `key`, drawn for a wide page and for a narrow one."""
    return (
        f"<figure>\n<figcaption>{escape(caption)}</figcaption>\n{key}\n"
        f'<div class="wide">{draw(WIDE)}</div>\n<div class="narrow">{draw(NARROW)}</div>\n</figure>\n'
    )
