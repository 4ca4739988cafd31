"""A profile as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from karmma_dist.modality import letters
from karmma_dist.profiling.costs import Cost, Profile


@dataclass(frozen=True)
class _Figure:
    """A column that every model has."""

    heading: str
    value: Callable[[Cost], float]
    digits: int
    compared: bool = False
    """Whether the ratio of two models is shown."""


_TABLES = {
    "GFLOPs of one clip": (
        _Figure("alone", lambda row: row.gflops, 3, compared=True),
        _Figure("whole", lambda row: row.gflops_whole_model, 3),
    ),
    "Parameters (million)": (
        _Figure("total", lambda row: row.params_total / 1e6, 2, compared=True),
        _Figure("trainable", lambda row: row.params_trainable / 1e6, 2),
    ),
    "Memory of one clip (MB of 1e6 bytes)": (
        _Figure("weights\nfp32", lambda row: row.weights_bytes_fp32 / 1e6, 0),
        _Figure("weights\nbf16", lambda row: row.weights_bytes_bf16 / 1e6, 0),
        _Figure("inference\nbf16", lambda row: row.inference_bytes / 1e6, 0, compared=True),
        _Figure("training\nbf16", lambda row: row.training_bytes / 1e6, 0),
    ),
}
_MEASURED = (
    _Figure("ms", lambda row: row.latency_ms or 0.0, 1, compared=True),
    _Figure("activations\nMB", lambda row: (row.measured_activations_bytes or 0) / 1e6, 0),
)
_EXPLAINED = (
    "alone: a model that holds these modalities only, as published; whole: the recipe's model on a clip that lacks the "
    "others. Inference: weights and peak activations. Training: peak activations and gradients, to which weights and "
    "optimizer state come."
)


def print_profile(profile: Profile, console: Console | None = None) -> None:
    """Print every row, models side by side."""
    console = console or Console(highlight=False)
    console.print(f"{profile.recipe}: {_models(profile)}")
    for title, figures in _TABLES.items():
        console.print(_table(profile, title, figures))
    if profile.measured is not None:
        settings = profile.measured
        console.print(_table(profile, "Measured, whole model, one clip", _MEASURED))
        console.print(
            f"Measured on {settings['device']} in {settings['precision']}, {settings['threads']} threads, median of "
            f"{settings['repeats']} passes."
        )
    console.print(_EXPLAINED)
    for note in profile.notes:
        console.print(f"note: {note}")


def _models(profile: Profile) -> str:
    """Which run each model is of, and its tokens."""
    last = {row.model: row for row in profile.rows}
    shown = []
    for model, row in last.items():
        tokens = ", ".join(f"{modality} {num}" for modality, num in row.tokens.items())
        shown.append(f"{model} {row.run} (tokens: {tokens})")
    return "; ".join(shown)


def _table(profile: Profile, title: str, figures: tuple[_Figure, ...]) -> Table:
    models = list(dict.fromkeys(row.model for row in profile.rows))
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("")
    for model in models:
        for figure in figures:
            table.add_column(f"{model}\n{figure.heading}", justify="right", no_wrap=True)
    compared = next(figure for figure in figures if figure.compared)
    if len(models) == 2:
        table.add_column(f"ratio\n{compared.heading}", justify="right", no_wrap=True)
    of_model = {(row.modalities, row.model): row for row in profile.rows}
    for subset in dict.fromkeys(row.modalities for row in profile.rows):
        rows = [of_model[subset, model] for model in models]
        cells = [f"{figure.value(row):,.{figure.digits}f}" for row in rows for figure in figures]
        if len(models) == 2:
            cells.append(f"{compared.value(rows[1]) / compared.value(rows[0]):.2f}")
        table.add_row(letters(subset), *cells)
    return table
