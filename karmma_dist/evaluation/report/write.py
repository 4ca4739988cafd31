"""Write what was measured: results.json, report.md with its plots, and a table for the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from karmma_dist.evaluation.metrics import ACTION, find_figure
from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.report.comparison_section import comparison_section
from karmma_dist.evaluation.report.content import ReportContent, condense, kept_rows
from karmma_dist.evaluation.report.corruption_section import corruption_section
from karmma_dist.evaluation.report.findings import findings
from karmma_dist.evaluation.report.html.page import write_html_report
from karmma_dist.evaluation.report.plots import Curve, drop_curves, subset_bars
from karmma_dist.evaluation.report.readings import Models, clips_per_model
from karmma_dist.evaluation.report.rows import error_names, metric_names, model_ranks, subset_values, whole_sensors
from karmma_dist.evaluation.results import Results
from karmma_dist.evaluation.summary import METRIC
from karmma_dist.io.files import write_json, write_whole
from karmma_dist.modalities import letters

RESULTS = "results.json"
REPORT = "report.md"
CURVE_PLOT = "drop_curve.png"
SUBSET_PLOT = "subsets.png"


def write_results(results: Results, folder: Path) -> Path:
    """Write `folder`/results.json, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, results.to_dict())
    return folder / RESULTS


def write_report(folder: Path, content: ReportContent) -> Path:
    """Write `folder`/report.md and the plots it shows, and report.html beside it; return the path of report.md.

    A section that the rows do not allow (no subsets, no sweep) is left out, and so is its plot. The folder is made if
    missing.
    """
    content = condense(content)
    folder.mkdir(parents=True, exist_ok=True)
    models, comparison = content.models, content.comparison
    sections = [
        f"# {content.title}\n",
        _measured(models),
        markdown.list_section("What the figures say", findings(models, comparison)),
        _subset_section(folder, models),
        _sweep_section(folder, models),
        corruption_section(folder, models),
        "" if comparison is None else comparison_section(comparison),
        _rows_section(models),
        markdown.list_section("Notes", content.notes),
        markdown.table_section("Time", ["step", "seconds"], _times(content.timings)),
    ]
    path = folder / REPORT
    write_whole(path, "\n".join(section for section in sections if section).encode())
    write_html_report(folder, content)
    return path


def results_table(results: Results, title: str | None = None) -> Table:
    """The rows as a table that fits a terminal of 80 columns: percentages, one line per condition."""
    content = results.to_dict()
    rows, summary = kept_rows(content), content["summary"]
    names = [name for name in metric_names(rows) if _is_brief(name)]
    left_out = {"unlabelled": summary["num_unlabelled"], "left out by noun": summary["num_pruned"]}
    caption = [f"percent of {summary['num_clips']:,} clips", *(f"{n:,} {why}" for why, n in left_out.items() if n)]
    # What is the same throughout is left out, so that the rest has room.
    says = [any(row["drop_prob"] for row in rows), any(row["seed"] for row in rows), True,
            any(row["num_without"] for row in rows)]  # fmt: skip
    if len(rows) < len(results.rows):
        caption.append(f"{len(results.rows) - len(rows):,} more rows with broken sensors: results.json")
    if says[-1]:
        caption.append("without: has none of these")
    table = Table(
        title=title, caption="; ".join(caption), box=SIMPLE_HEAD, show_edge=False, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    table.add_column("modalities", no_wrap=True)
    conditions = list(itertools.compress(("drop %", "seed", "clips", "without"), says))
    for heading in (*conditions, *(_heading(name) for name in names)):
        table.add_column(heading, justify="right")
    for row in rows:
        name, *counts = _row_cells(row)
        figures = [markdown.percent(row[of], digits=1) for of in names]
        cells = [name, *itertools.compress(counts, says), *figures]
        table.add_row(*map(Text, cells))  # as it is: of audio:mute:3 markup would make an emoji
    return table


def _is_brief(name: str) -> bool:
    figure = find_figure(name)
    return figure.metric.terminal == "all" or (figure.metric.terminal == "action" and figure.scored == ACTION)


def _times(timings: Mapping[str, float]) -> list[list[str]]:
    return [[markdown.text(step), f"{seconds:.1f}"] for step, seconds in timings.items()]


def _measured(models: Models) -> str:
    """What the figures rest on: clips, chance, seeds, and what the data itself lacks."""
    first = next(iter(models.values()))["summary"]
    lines = ["## What was measured\n"]
    for name, num in first["num_classes"].items():
        majority = first["majority_top1"][name]
        lines.append(
            f"* {name}: {num:,} classes, chance {first['chance_top1'][name]:.3g} % top-1; naming the most frequent one "
            f"each time {markdown.percent(majority)} %."
        )
    seeds = max(len(results["summary"]["seeds"]) for results in models.values())
    lines.append(f"* Seeds of the drops: {seeds}. What a clip loses depends on seed and key alone, not on the model.")
    fewest = min(results["summary"]["num_clips"] for results in models.values())
    lines.append(
        f"* {fewest:,} clips: by sampling alone, the 95 % interval of a figure is up to "
        f"±{98 / math.sqrt(fewest):.1f} points."
    )
    header, clips = clips_per_model(models)
    table = [[markdown.text(name), *cells] for name, *cells in clips]
    damage = [f"* unreadable: {line}" for line in first["damage"]]
    return "\n".join([*lines, *damage, "", markdown.table(header, table), ""])


def _subset_section(folder: Path, models: Models) -> str:
    probability, values = subset_values(models)
    subsets = list(dict.fromkeys(subset for of in values.values() for subset in of))
    if len(subsets) < 2:
        return ""
    table = [
        [letters(subset), _clips(models, subset, probability), *_best([of.get(subset) for of in values.values()])]
        for subset in subsets
    ]
    over = {name: results["summary"]["subsets"] for name, results in models.items()}
    table.append(["average over subsets", "", *_best([_figure(of, "average") for of in over.values()])])
    table += _interval_line([_ends(of, "average_ci") for of in over.values()], blank=1)
    drops = [_figure(of, "relative_drop") for of in over.values()]
    table.append(["average relative drop (%)", "", *_best(drops, lowest=True)])
    if len(models) > 1:
        table.append(["average rank", "", *_best(list(model_ranks(models).values()), lowest=True)])
    bars = {name: {letters(subset): value for subset, value in of.items()} for name, of in values.items()}
    subset_bars(folder / SUBSET_PLOT, bars, "action top-1 (%)")
    at = f" at drop probability {probability:g}" if probability else ""
    lines = [
        f"## Subsets of the modalities{at}: action top-1 (%)\n",
        markdown.table(["present", "clips", *map(markdown.text, models)], table),
        "\nA clip that has none of a subset's modalities cannot be shown to a model: counted apart, as *without*.",
        f"\n![action top-1 per subset]({SUBSET_PLOT})\n",
    ]
    return "\n".join(lines)


def _figure(summary: dict[str, Any] | None, key: str) -> float | None:
    return None if summary is None else summary[key][METRIC]


def _ends(summary: dict[str, Any] | None, key: str) -> list[float] | None:
    """The interval of a figure, where there is one."""
    ends: list[float] | None = None if summary is None else summary.get(key, {}).get(METRIC)
    return ends


def _interval_line(intervals: Sequence[list[float] | None], blank: int = 0) -> list[list[str]]:
    """A line of 95 % intervals, unless no model has one."""
    if all(ends is None for ends in intervals):
        return []
    return [["95 % interval", *[""] * blank, *map(markdown.interval, intervals)]]


def _clips(models: Models, subset: tuple[str, ...], probability: float) -> str:
    """Clips behind a line of the subset table; both numbers where models differ."""
    counts = dict.fromkeys(
        f"{row['num_clips']:,}" + (f" ({row['num_without']:,} without)" if row["num_without"] else "")
        for results in models.values()
        for row in whole_sensors(results["rows"])
        if tuple(row["modalities"]) == subset and row["drop_prob"] == probability
    )
    return " / ".join(counts)


def _sweep_section(folder: Path, models: Models) -> str:
    curves = {name: results["summary"]["drop_curve"] for name, results in models.items()}
    curves = {name: curve for name, curve in curves.items() if curve is not None}
    if not curves:
        return ""
    probabilities = sorted({p for curve in curves.values() for p in curve["drop_prob"]})
    places = [{p: k for k, p in enumerate(curve["drop_prob"])} for curve in curves.values()]
    table = []
    for probability in probabilities:
        at = [place.get(probability) for place in places]
        mean = [None if k is None else c["mean"][METRIC][k] for k, c in zip(at, curves.values(), strict=True)]
        std = [None if k is None else c["std"][METRIC][k] for k, c in zip(at, curves.values(), strict=True)]
        spread = [f" ± {s:.2f}" if s and c["num_seeds"] > 1 else "" for s, c in zip(std, curves.values(), strict=True)]
        table.append([f"{100 * probability:g}", *(m + s for m, s in zip(_best(mean), spread, strict=True))])
    table.append(["mean height (area)", *_best([curve["area"][METRIC] for curve in curves.values()])])
    table += _interval_line([_ends(curve, "area_ci") for curve in curves.values()])
    table.append(["fall (points)", *_best([curve["fall"][METRIC] for curve in curves.values()], lowest=True)])
    falls = [curve["relative_fall"][METRIC] for curve in curves.values()]
    table.append(["fall (% of the start)", *_best(falls, lowest=True)])
    lines = {n: Curve(c["drop_prob"], c["mean"][METRIC], c["std"][METRIC]) for n, c in curves.items()}
    chance = next(iter(models.values()))["summary"]["chance_top1"]["action"]
    drop_curves(folder / CURVE_PLOT, lines, "action top-1 (%)", ("chance", chance))
    columns = [f"{markdown.text(name)} ({letters(curve['modalities'])})" for name, curve in curves.items()]
    return "\n".join(
        [
            "## Modalities missing at random: action top-1 (%)\n",
            markdown.table(["drop probability (%)", *columns], table),
            "\nAt least one modality of each clip stays. ± is the standard deviation over the seeds.",
            f"\n![action top-1 over drop probability]({CURVE_PLOT})\n",
        ]
    )


def _rows_section(models: Models) -> str:
    lines = ["## All rows (%)\n"]
    for name, results in models.items():
        names = _columns(results["rows"])
        header = ["modalities", "drop %", "seed", "clips", "without", *map(_heading, names)]
        body = [[*_row_cells(row), *(_cell(row, key) for key in names)] for row in results["rows"]]
        lines += [f"### {markdown.text(name)}\n", markdown.table(header, body), ""]
    return "\n".join(lines)


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of the figures of a row, each accuracy followed by its interval where there is one."""
    shown = {*metric_names(rows), *error_names(rows)}
    return [key for key in (rows[0] if rows else {}) if key in shown or key.removesuffix("_ci") in shown]


def _cell(row: dict[str, Any], key: str) -> str:
    return markdown.interval(row[key]) if key.endswith("_ci") else markdown.percent(row[key])


def _row_cells(row: dict[str, Any]) -> list[str]:
    """Condition and counts of a row, as text."""
    counts = [f"{row['seed']}", f"{row['num_clips']:,}", f"{row['num_without']:,}"]
    broken = f" {row['corrupt']}" if row.get("corrupt") else ""
    return [letters(row["modalities"]) + broken, f"{100 * row['drop_prob']:g}", *counts]


def _heading(name: str) -> str:
    """`action_top1` -> `action top-1`."""
    if name.endswith("_ci"):
        return "95 %"
    head, _, figure = name.partition("_")
    figures = {"top1": "top-1", "top5": "top-5", "mean_class": "per class", "ece": "ECE"}
    groups = {f"top1_{group}": f"top-1 {group}" for group in ("tail", "unseen")}
    return f"{head} {(figures | groups).get(figure, figure)}"


def _best(values: Sequence[float | None], lowest: bool = False) -> list[str]:
    """Two digits each, the best in bold where there are several to choose from."""
    known = [value for value in values if value is not None]
    best = None if len(known) < 2 else markdown.percent((min if lowest else max)(known))
    shown = [markdown.percent(value) for value in values]
    return [f"**{best}**" if text == best else text for text in shown]
