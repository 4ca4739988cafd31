"""Reports of a profile: tables for a terminal of 80 columns, and bars in the form of the paper's Fig. 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from karmma_dist.evaluation.report import terminal
from karmma_dist.evaluation.report.model import Section, Table, TableLine
from karmma_dist.evaluation.report.plots import COLOURS, save_figure, style_axes
from karmma_dist.modalities import letters
from karmma_dist.profiling.costs import Cost, Profile
from karmma_dist.terminal import console


@dataclass(frozen=True)
class _Figure:
    """A column, shown once per model."""

    heading: str
    value: Callable[[Cost], float | None]
    """Function from a row to its figure; None if the row has no such figure."""
    digits: int
    compared: bool = False
    """True if the ratio of two models is shown for this figure."""

    def shown(self, row: Cost | None) -> str:
        """Return the cell of a row; None stands for a model without these modalities."""
        value = None if row is None else self.value(row)
        return "-" if value is None else f"{value:,.{self.digits}f}"

    def ratio(self, rows: list[Cost | None]) -> str:
        """Return the cell that compares the second row with the first."""
        first, second = (None if row is None else self.value(row) for row in rows)
        return f"{second / first:.2f}" if first and second is not None else "-"


_Tables = dict[str, tuple[_Figure, ...]]
"""Columns by table title; titles hold placeholders for the batch and the precision."""

_COUNTED: _Tables = {
    "GFLOPs of one clip": (
        _Figure("alone", lambda row: row.gflops, 3, compared=True),
        _Figure("whole", lambda row: row.gflops_whole_model, 3),
    ),
    "Parameters (million)": (
        _Figure("total", lambda row: row.params_total / 1e6, 2, compared=True),
        _Figure("trainable", lambda row: row.params_trainable / 1e6, 2),
    ),
    "Weights (MB of 1e6 bytes)": (
        _Figure("fp32", lambda row: row.weights_bytes_fp32 / 1e6, 1, compared=True),
        _Figure("bf16", lambda row: row.weights_bytes_bf16 / 1e6, 1),
    ),
}
_MEMORY: dict[str, _Tables] = {
    "model": {
        "Peak memory of {clips} (MB of 1e6 bytes, {precision})": (
            _Figure("inference", lambda row: row.inference_bytes / 1e6, 1, compared=True),
            _Figure("training", lambda row: row.training_bytes / 1e6, 1),
        ),
    },
    "fusion": {
        "Peak memory of {clips}, inference (MB, {precision})": (
            _Figure("fused", lambda row: row.activations_bytes / 1e6, 1, compared=True),
            _Figure("unfused", lambda row: _megabytes(row.unfused_activations_bytes), 1),
        ),
        "Peak memory of {clips}, training (MB, {precision})": (
            _Figure("fused", lambda row: row.training_bytes / 1e6, 1, compared=True),
            _Figure("unfused", lambda row: _megabytes(row.unfused_training_bytes), 1),
        ),
    },
}
_ALLOCATOR: _Tables = {
    "Alone, weights included: counted in {precision}, and by CUDA's allocator (MB)": (
        _Figure("counted", lambda row: row.inference_bytes / 1e6, 1),
        _Figure("allocated", lambda row: _megabytes(row.peak_allocated_bytes), 1, compared=True),
        _Figure("reserved", lambda row: _megabytes(row.peak_reserved_bytes), 1),
    ),
}
_MEASURED: dict[str, _Tables] = {
    "model": {
        "Measured, whole model, {clips}": (
            _Figure("ms", lambda row: row.latency_ms, 1, compared=True),
            _Figure("activations\nMB", lambda row: _megabytes(row.measured_activations_bytes), 1),
        ),
        **_ALLOCATOR,
    },
    "fusion": {
        "Measured, fusion block of the whole model, {clips}": (
            _Figure("ms", lambda row: row.latency_ms, 1, compared=True),
            _Figure("activations\nMB", lambda row: _megabytes(row.measured_activations_bytes), 1),
        ),
        **_ALLOCATOR,
        "The same with unfused attention": (
            _Figure("counted", lambda row: _megabytes(row.unfused_inference_bytes), 1),
            _Figure("allocated", lambda row: _megabytes(row.unfused_peak_allocated_bytes), 1, compared=True),
            _Figure("reserved", lambda row: _megabytes(row.unfused_peak_reserved_bytes), 1),
        ),
    },
}
_EXPLAINED = {
    "model": (
        "alone: a model that holds only these modalities, as published; whole: the recipe's model on a clip without "
        "the other modalities. Peak memory: inference counts weights, inputs and activations; training counts inputs, "
        "activations and gradients, but neither weights nor optimizer state."
    ),
    "fusion": (
        "All figures are of the fusion block alone, on tokens after tau-average and projection. alone: only the "
        "tokens of these modalities; whole: all tokens in the recipe's model, including its stand-in tokens if it has "
        "any. Peak memory counts tokens and activations, in training also gradients, but no weights; unfused attention "
        "makes its matrix of weights, always in fp32."
    ),
}


def print_profile(profile: Profile, out: Console | None = None) -> None:
    """Print all rows as tables, with the models in adjacent columns."""
    terminal.print_section(profile_section(profile), out or console())


def profile_section(profile: Profile) -> Section:
    """Return the tables of all rows, with the models in adjacent columns, and sentences that explain the figures."""
    load = profile.workload
    placeholders = {"clips": load.clips, "precision": load.precision}
    figures, sentences = {**_COUNTED, **_MEMORY[load.part]}, [_EXPLAINED[load.part]]
    if profile.measured is not None:
        settings = profile.measured
        figures |= _MEASURED[load.part]
        sentences.append(
            f"Measured on {settings['device']} in {settings['precision']}, {settings['threads']} threads, median of "
            f"{settings['repeats']} passes."
        )
    tables = [_table(profile, title.format(**placeholders), columns) for title, columns in figures.items()]
    sentences += [f"note: {note}" for note in profile.notes]
    return Section("profile", f"{profile.recipe}: {_models(profile)}", sentences, tables)


def _models(profile: Profile) -> str:
    """Return the run and the tokens of each model, in one line."""
    last = {row.model: row for row in profile.rows}
    shown = []
    for model, row in last.items():
        tokens = ", ".join(f"{modality} {num}" for modality, num in row.tokens.items())
        shown.append(f"{model} {row.run} (tokens: {tokens})")
    return "; ".join(shown)


def _table(profile: Profile, title: str, figures: tuple[_Figure, ...]) -> Table:
    models = list(dict.fromkeys(row.model for row in profile.rows))
    columns = ["", *(f"{model}\n{figure.heading}" for model in models for figure in figures)]
    compared = next(figure for figure in figures if figure.compared)
    if len(models) == 2:
        columns.append(f"ratio\n{compared.heading}")
    by_model = {(row.modalities, row.model): row for row in profile.rows}
    body: list[TableLine] = []
    for subset in dict.fromkeys(row.modalities for row in profile.rows):
        rows = [by_model.get((subset, model)) for model in models]
        cells = [figure.shown(row) for row in rows for figure in figures]
        if len(models) == 2:
            cells.append(compared.ratio(rows))
        body.append([letters(subset), *cells])
    return Table(title, columns, body)


def _megabytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


_GROUP = 0.8
"""Width of a group of bars; adjacent groups are 1 apart."""


def cost_bars(path: Path, profile: Profile) -> None:
    """Draw one group of bars per subset and one bar per model: GFLOPs on the left, memory on the right.

    Args:
        path: PNG file to write.
        profile: Profile to draw.
    """
    num_subsets = len({row.modalities for row in profile.rows})
    num_models = len({row.model for row in profile.rows})
    figure = Figure(figsize=(2 * max(3.2, 1.2 + 0.36 * num_subsets * (num_models + 0.5)), 4.0), layout="constrained")
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
    for index, model in enumerate(models):
        rows = [row for row in profile.rows if row.model == model]
        x = [subsets.index(row.modalities) + (index - (len(models) - 1) / 2) * width for row in rows]
        heights = [value(row) for row in rows]
        bars = axes.bar(x, heights, 0.92 * width, color=COLOURS[index], label=model)
        axes.bar_label(bars, [f"{height:,.0f}" for height in heights], fontsize=7, padding=2)
    axes.set_xticks(range(len(subsets)), [letters(subset) for subset in subsets])
    axes.margins(y=0.1)
    axes.set_xlabel("modalities")
    axes.set_ylabel(y_label)
