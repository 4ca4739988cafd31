"""What subsets of modalities cost, as bars (the form of the paper's Fig. 6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from karmma_dist.evaluation.report.plots import COLOURS, save_figure, style_axes
from karmma_dist.modality import letters
from karmma_dist.profiling.costs import Cost, Profile

_GROUP = 0.8
"""Width of a group of bars, of the 1 from one group to the next."""


def cost_bars(path: Path, profile: Profile) -> None:
    """Draw one group of bars per subset and one bar per model: GFLOPs on the left, memory on the right.

    Args:
        path: PNG to write.
        profile: Rows.
    """
    num_subsets = len({row.modalities for row in profile.rows})
    num_models = len({row.model for row in profile.rows})
    figure = Figure(figsize=(2 * max(3.2, 1.2 + 0.36 * num_subsets * (num_models + 0.5)), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    load = profile.workload
    part = "" if load.part == "model" else "fusion block, "
    memory = f"{part}memory, {load.clips} at inference, {load.precision} (MB)"
    _bars(left, profile, lambda row: row.gflops, f"{part}GFLOPs per clip")
    _bars(right, profile, lambda row: row.inference_bytes / 1e6, memory)
    if num_models > 1:
        figure.legend(*left.get_legend_handles_labels(), frameon=False, ncols=num_models, loc="outside upper center")
    save_figure(figure, path)


def _bars(axes: Axes, profile: Profile, value: Callable[[Cost], float], y_label: str) -> None:
    style_axes(axes)
    subsets = list(dict.fromkeys(row.modalities for row in profile.rows))
    models = list(dict.fromkeys(row.model for row in profile.rows))
    width = _GROUP / len(models)
    for place, model in enumerate(models):
        rows = [row for row in profile.rows if row.model == model]
        x = [subsets.index(row.modalities) + (place - (len(models) - 1) / 2) * width for row in rows]
        heights = [value(row) for row in rows]
        bars = axes.bar(x, heights, 0.92 * width, color=COLOURS[place], label=model)
        axes.bar_label(bars, [f"{height:,.0f}" for height in heights], fontsize=7, padding=2)
    axes.set_xticks(range(len(subsets)), [letters(subset) for subset in subsets])
    axes.margins(y=0.1)
    axes.set_xlabel("modalities")
    axes.set_ylabel(y_label)
