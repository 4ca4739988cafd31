"""The report's two figures, drawn without a display. Colours are Okabe and Ito's, told apart by the colour-blind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from karmma_dist.io.files import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_GRAY = "#666666"
_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class Curve:
    """One model's line."""

    drop_probs: Sequence[float]
    mean: Sequence[float | None]
    """Percent; None where nothing could be evaluated."""
    std: Sequence[float | None]
    """Over seeds, in points."""


def drop_curves(path: Path, curves: Mapping[str, Curve], y_label: str, reference: tuple[str, float] | None) -> None:
    """Accuracy over drop probability, one line per model, named at its end (the form of the paper's Fig. 4).

    Args:
        path: PNG to write.
        curves: One line each.
        y_label: What is measured, in percent.
        reference: Name and height of a dotted horizontal line.
    """
    figure, axes = _axes(7.0, 4.6)
    ends = []
    for place, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        points = [
            (100 * p, mean, std or 0.0)
            for p, mean, std in zip(curve.drop_probs, curve.mean, curve.std, strict=True)
            if mean is not None
        ]
        if not points:
            continue
        x, y, spread = zip(*points, strict=True)
        axes.plot(x, y, color=colour, marker=MARKERS[place % len(MARKERS)], markersize=5, linewidth=1.8, label=name)
        low = [value - s for value, s in zip(y, spread, strict=True)]
        high = [value + s for value, s in zip(y, spread, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((y[-1], name, colour))
    last = max((100 * p for curve in curves.values() for p in curve.drop_probs), default=90.0)
    if reference is not None:
        name, height = reference
        axes.axhline(height, color=_GRAY, linewidth=1, linestyle=":", label=f"{name} ({height:.2g} %)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.03 * last, 1.03 * last)
    axes.set_xticks(sorted({round(100 * p, 6) for curve in curves.values() for p in curve.drop_probs}))
    axes.set_xlabel("probability that a modality is missing at inference (%)")
    axes.set_ylabel(y_label)
    heights = _spread([end[0] for end in ends], 0.045 * axes.get_ylim()[1])
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axes.text(1.05 * last, height, name, color=colour, va="center", fontsize=9, clip_on=False)
    axes.legend(frameon=False, fontsize=8, loc="best")
    save_figure(figure, path)


def subset_bars(path: Path, values: Mapping[str, Mapping[str, float | None]], y_label: str) -> None:
    """Accuracy per subset of modalities, one group per subset and one bar per model.

    Args:
        path: PNG to write.
        values: Percent per subset name, per model.
        y_label: What is measured, in percent.
    """
    subsets = list(dict.fromkeys(subset for of in values.values() for subset in of))
    figure, axes = _axes(max(5.0, 1.5 + 0.32 * len(subsets) * (len(values) + 1)), 4.2)
    width = 0.8 / len(values)
    for place, (name, of) in enumerate(values.items()):
        x = [group + (place - (len(values) - 1) / 2) * width for group in range(len(subsets))]
        heights = [of.get(subset) for subset in subsets]
        bars = axes.bar(x, [h or 0.0 for h in heights], 0.92 * width, color=COLOURS[place % len(COLOURS)], label=name)
        texts = ["–" if h is None else f"{h:.1f}" for h in heights]
        axes.bar_label(bars, texts, fontsize=7, padding=2, rotation=90 if len(values) > 2 else 0)
    axes.set_xticks(range(len(subsets)), subsets)
    axes.margins(y=0.15)
    axes.set_xlabel("modalities present at inference")
    axes.set_ylabel(y_label)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=min(len(values), 4), loc="lower left", bbox_to_anchor=(0, 1.0))
    save_figure(figure, path)


def severity_curves(path: Path, panels: Mapping[str, Mapping[str, Mapping[int, float | None]]], y_label: str) -> None:
    """Accuracy over the severity of a failure, one panel per failure and one line per model.

    Args:
        path: PNG to write.
        panels: Percent per severity (0: nothing is broken), per model, per failure.
        y_label: What is measured, in percent.
    """
    models = list(dict.fromkeys(model for of in panels.values() for model in of))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(2.4 * columns, 4.2), 2.1 * lines + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (failure, curves) in zip(grid, panels.items(), strict=False):
        style_axes(axes)
        axes.set_title(failure, fontsize=9)
        for model, values in curves.items():
            place = models.index(model)
            points = [(severity, value) for severity, value in sorted(values.items()) if value is not None]
            axes.plot(
                [severity for severity, _ in points], [value for _, value in points],
                color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)], markersize=4, label=model,
            )  # fmt: skip
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylim(bottom=0)
    grid[0].set_xticks(range(6))
    figure.supxlabel("severity (0: whole)", fontsize=9)
    figure.supylabel(y_label, fontsize=9)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, ncols=min(len(models), 4), loc="outside upper center")
    save_figure(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Leave the frame open, with light horizontal lines behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move labels apart until neighbours are `gap` from each other, keeping their order and their common centre."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    groups: list[list[float]] = []  # [sum of wished heights less each one's offset in the group, number of labels]
    for place in order:
        groups.append([heights[place], 1])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > groups[-1][0] / groups[-1][1]:
            total, num = groups.pop()
            groups[-1][0] += total - num * groups[-1][1] * gap
            groups[-1][1] += num
    placed = [total / num + k * gap for total, num in groups for k in range(int(num))]
    return [height for _, height in sorted(zip(order, placed, strict=True))]


def _top(group: Sequence[float], gap: float) -> float:
    return group[0] / group[1] + (group[1] - 1) * gap


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=_DOTS_PER_INCH))
