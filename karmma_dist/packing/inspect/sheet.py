"""Contact sheets: clips as rows, modalities as columns, drawn from the stored members."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from karmma_dist.io.files import write_whole
from karmma_dist.modalities import MODALITIES, DecodeError, Pictures, Sheet
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError
from karmma_dist.terminal import harmless

_CAPTION_WIDTH = 36
_ROW_INCHES, _CAPTION_INCHES, _CELL_INCHES = 1.5, 2.8, 5.6


class _ClipSheet(Sheet):
    """A clip as its drawings see it."""

    def __init__(self, folder: ShardFolder, clip: Clip, metadata: ClipMetadata) -> None:
        self._folder, self._clip, self._metadata = folder, clip, metadata

    def pictures(self, places: Callable[[int], Sequence[int]]) -> list[np.ndarray] | None:
        """Return the clip's frames at some places, or None if it has no visual modality."""
        for name in self._folder.modalities:
            if self._clip.has(name) and self._metadata.description(name).pictures is not None:
                pictures = MODALITIES[name].drawing.pictures(self._folder.read(self._clip, name), places)
                if pictures is not None:
                    return pictures
        return None

    def clock(self) -> Pictures | None:
        """Return the pictures by which the clip's times are counted, if any."""
        return self._metadata.pictures


def draw_sheet(
    folder: ShardFolder, rows: list[tuple[Clip, ClipMetadata | None, dict[str, str | None]]], out_png: Path
) -> None:
    """Draw rows of (clip, metadata or None if damaged, class names) into a PNG."""
    modalities = folder.modalities
    size = (_CAPTION_INCHES + _CELL_INCHES * len(modalities), 0.35 + _ROW_INCHES * len(rows))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [_CAPTION_INCHES, *[_CELL_INCHES] * len(modalities)]
    grid = figure.subplots(len(rows), 1 + len(modalities), squeeze=False, width_ratios=ratios)
    for axis, modality in zip(grid[0][1:], modalities, strict=True):
        drawing = MODALITIES[modality].drawing
        axis.set_title(drawing.title, fontsize=10, loc="left", y=1.0)
        drawing.draw_legend(axis)
    for axes, (clip, metadata, names) in zip(grid, rows, strict=True):
        _caption(axes[0], clip, metadata, names)
        for axis, modality in zip(axes[1:], modalities, strict=True):
            _draw_cell(axis, folder, clip, metadata, modality)
    write_whole(out_png, lambda temporary: figure.savefig(temporary, format="png"))


def _draw_cell(axis: Axes, folder: ShardFolder, clip: Clip, metadata: ClipMetadata | None, modality: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    if not clip.has(modality):
        _hatched(axis, "absent", "0.6")
        return
    if metadata is None:
        _hatched(axis, "damaged", "tab:red")
        return
    try:
        data = folder.read(clip, modality)
        sheet = _ClipSheet(folder, clip, metadata)
        MODALITIES[modality].drawing.draw(axis, data, metadata.description(modality), sheet)
    except (DamageError, DecodeError):
        _hatched(axis, "damaged", "tab:red")


def _caption(axis: Axes, clip: Clip, metadata: ClipMetadata | None, names: dict[str, str | None]) -> None:
    axis.axis("off")
    lines = [f"{head}: {name or 'unlabelled'}" for head, name in names.items()]
    if metadata is None:
        lines.append("metadata damaged")
    else:
        start, stop = metadata.start_s, metadata.stop_s
        span = f"from {start:.2f} s" if stop is None else f"{start:.2f} to {stop:.2f} s"
        lines += [
            f"{metadata.split}, {span}",
            f"\u201c{metadata.narration}\u201d" if metadata.narration else "",
        ]
    wrapped = [short for line in lines for short in textwrap.wrap(harmless(line), _CAPTION_WIDTH)]
    # Dollar signs would start a formula.
    text = "\n".join(wrapped).replace("$", r"\$")
    axis.text(0, 1, clip.key, fontsize=10, va="top", weight="bold", transform=axis.transAxes)
    axis.text(0, 0.84, text, fontsize=8.5, va="top", linespacing=1.15, transform=axis.transAxes)


def _hatched(axis: Axes, text: str, colour: str) -> None:
    axis.set_facecolor("white")
    axis.fill_between([0, 1], 0, 1, facecolor="none", edgecolor=colour, hatch="////", linewidth=0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none"})
