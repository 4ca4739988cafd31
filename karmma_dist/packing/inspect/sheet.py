"""Contact sheets: clips as rows, modalities as columns, drawn from the stored members."""

from __future__ import annotations

import io
import json
import textwrap
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from karmma_dist.packing.boxes import HAND
from karmma_dist.packing.media import SAMPLE_RATE
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, DamageError

_FRAMES = 4
_STRIP_WIDTH = 1000
"""Pixels of the frames of one cell, side by side."""
_CAPTION_WIDTH = 36
_ROW_INCHES, _CAPTION_INCHES, _CELL_INCHES = 1.5, 2.8, 5.6
_HAND_COLOUR, _OBJECT_COLOUR = (255, 150, 30), (60, 190, 255)
_SPECTROGRAM_DB = 70.0
"""From the loudest to the darkest shown."""
_TITLES = {
    "video": "video",
    "flow": "flow: hue is direction as in the wheel, white is rest",
    "audio": "audio: waveform, spectrogram",
    "detections": "detections: hand orange, object blue",
}


def draw_sheet(
    folder: ShardFolder, rows: list[tuple[Clip, dict[str, Any] | None, dict[str, str | None]]], out_png: Path
) -> None:
    """Draw (clip, metadata or None when damaged, class names) rows into a PNG."""
    modalities = folder.modalities
    size = (_CAPTION_INCHES + _CELL_INCHES * len(modalities), 0.35 + _ROW_INCHES * len(rows))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [_CAPTION_INCHES, *[_CELL_INCHES] * len(modalities)]
    grid = figure.subplots(len(rows), 1 + len(modalities), squeeze=False, width_ratios=ratios)
    for place, (clip, metadata, names) in enumerate(rows):
        axes = grid[place]
        _caption(axes[0], clip, metadata, names)
        for axis, modality in zip(axes[1:], modalities, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if place == 0:
                axis.set_title(_TITLES.get(modality, modality), fontsize=10, loc="left", y=1.0)
                if modality == "flow":
                    _draw_wheel(axis)
            if not clip.has(modality):
                _hatched(axis, "absent", "0.6")
                continue
            try:
                _DRAW[modality](axis, folder, clip, metadata)
            except (DamageError, av.error.FFmpegError, ValueError, KeyError, TypeError):
                _hatched(axis, "damaged", "tab:red")
    figure.savefig(out_png, format="png")


def flow_colours(flow_HW2: np.ndarray, full: float) -> np.ndarray:
    """Flow -> uint8 RGB (H, W, 3): hue is direction, saturation is speed up to `full`, white is no motion."""
    angle = np.arctan2(flow_HW2[..., 1], flow_HW2[..., 0])
    hue = (np.degrees(angle) % 360 / 2).astype(np.uint8)
    speed = np.clip(np.hypot(flow_HW2[..., 0], flow_HW2[..., 1]) / max(full, 1e-6), 0, 1)
    hsv = np.dstack([hue, (255 * speed).astype(np.uint8), np.full_like(hue, 255)])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


def _caption(axis: Axes, clip: Clip, metadata: dict[str, Any] | None, names: dict[str, str | None]) -> None:
    axis.axis("off")
    lines = [f"{head}: {name or 'unlabelled'}" for head, name in names.items()]
    if metadata is None:
        lines.append("metadata damaged")
    else:
        start, stop = metadata["start_s"], metadata["stop_s"]
        span = f"from {start:.2f} s" if stop is None else f"{start:.2f} to {stop:.2f} s"
        lines += [
            f"{metadata['split']}, {span}",
            f"\u201c{metadata['narration']}\u201d" if metadata["narration"] else "",
        ]
    wrapped = [short for line in lines for short in textwrap.wrap(line, _CAPTION_WIDTH)]
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


def _draw_video(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    _strip(axis, _some_frames(folder.read(clip, "video"), "rgb24"))
    _times(axis, metadata["modalities"]["video"])


def _draw_flow(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    bound = metadata["modalities"]["flow"]["bound"]
    flows = []
    for gray in _some_frames(folder.read(clip, "flow"), "gray"):
        half = gray.shape[0] // 2
        flows.append((np.dstack([gray[:half], gray[half:]]).astype(np.float32) - 127.5) / 127.5 * bound)
    full = float(np.percentile(np.linalg.norm(np.stack(flows), axis=-1), 98))
    _strip(axis, [flow_colours(flow, full) for flow in flows])
    _times(axis, metadata["modalities"]["flow"], f"full colour {full:.2f} px per frame")


def _draw_wheel(axis: Axes) -> None:
    """The colours of all directions, beside the column's title: what is on the wheel's right moves right."""
    across, down = np.meshgrid(np.linspace(-1, 1, 61), np.linspace(-1, 1, 61))
    inside = np.where(np.hypot(across, down) <= 1, 255, 0).astype(np.uint8)
    wheel = axis.inset_axes((0.94, 1.02, 0.06, 0.24))
    wheel.imshow(np.dstack([flow_colours(np.dstack([across, down]), 1.0), inside]))
    wheel.axis("off")


def _draw_audio(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    del metadata
    axis.axis("off")
    with av.open(io.BytesIO(folder.read(clip, "audio")), "r") as container:
        samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    wave = samples.astype(np.float32) / 32768
    length_s = len(wave) / SAMPLE_RATE
    upper = axis.inset_axes((0.06, 0.64, 0.94, 0.36))
    lower = axis.inset_axes((0.06, 0.12, 0.94, 0.5))
    loudest = max(float(np.abs(wave).max()), 1 / 32768)
    upper.plot(np.arange(len(wave)) / SAMPLE_RATE, wave, linewidth=0.4)
    upper.set_ylim(-1.05 * loudest, 1.05 * loudest)
    upper.set_yticks([0], [f"\u00b1{loudest:.2f}"], fontsize=7)
    upper.set_xticks([])
    padded = np.pad(wave, (0, max(512 - len(wave), 0)))
    power, _, _, image = lower.specgram(padded + 1e-6, NFFT=512, Fs=SAMPLE_RATE / 1000, noverlap=384, cmap="magma")
    top_db = float(10 * np.log10(power.max() + 1e-12))
    image.set_clim(top_db - _SPECTROGRAM_DB, top_db)
    # specgram counts in milliseconds when the rate is in kHz.
    image.set_extent((0, len(padded) / SAMPLE_RATE, 0, SAMPLE_RATE / 2000))
    lower.set_yticks([0, 4], ["0", "4 kHz"], fontsize=7)
    lower.tick_params(axis="x", labelsize=7, pad=1, length=2)
    lower.xaxis.set_major_formatter("{x:g} s")
    for inset in (upper, lower):
        inset.set_xlim(0, length_s)
        inset.tick_params(axis="y", pad=1, length=2)


def _draw_detections(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    detections = json.loads(folder.read(clip, "detections"))
    frames, size = detections["frames"], (detections["width"], detections["height"])
    places = _places(len(frames))
    if clip.has("video"):
        pictures = _some_frames(folder.read(clip, "video"), "rgb24")
    else:
        pictures = [np.full((size[1], size[0], 3), 230, np.uint8)] * len(places)
    drawn = []
    for place, picture in zip(places, pictures, strict=False):
        canvas = _fitted(picture, len(places))
        for box in sorted(frames[place], key=lambda box: -box[4]):
            draw_box(canvas, box)
        drawn.append(canvas)
    _strip(axis, drawn)
    times = metadata["modalities"].get("video") or metadata["modalities"].get("flow")
    if times is not None:
        _times(axis, times)


def draw_box(canvas: np.ndarray, box: list[float]) -> None:
    """Draw a stored box (x0, y0, x1, y1 in [0, 1], category, score) into uint8 RGB (H, W, 3), with its category.

    A bright line inside a dark one: visible on light and on dark pictures.
    """
    height, width = canvas.shape[:2]
    x0, y0, x1, y1, category, _ = box
    text, colour = ("hand", _HAND_COLOUR) if category == HAND else ("object", _OBJECT_COLOUR)
    left, right = (min(max(round(x * width), 2), width - 3) for x in (x0, x1))
    top, bottom = (min(max(round(y * height), 2), height - 3) for y in (y0, y1))
    cv2.rectangle(canvas, (left, top), (right, bottom), (0, 0, 0), 4)
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, 2)
    (wide, high), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.4, 1)
    # Hands' names hang from the top of their boxes, objects' stand on the bottom: they seldom cover each other.
    at_x = min(left, width - wide - 4)
    at_y = top + high + 4 if category == HAND else max(bottom - 4, high + 4)
    cv2.rectangle(canvas, (at_x, at_y - high - 3), (at_x + wide + 3, at_y + 3), colour, cv2.FILLED)
    cv2.putText(canvas, text, (at_x + 2, at_y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)


def _fitted(picture: np.ndarray, number: int) -> np.ndarray:
    """A copy of a width with which `number` of them fill a strip; small pictures stay sharp-edged."""
    width = _STRIP_WIDTH // number
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    shrinks = width < picture.shape[1]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)


def _strip(axis: Axes, pictures: list[np.ndarray]) -> None:
    """Pictures side by side, in the same place of every cell."""
    fitted = [_fitted(picture, len(pictures)) for picture in pictures]
    gap = np.full((fitted[0].shape[0], 6, 3), 255, np.uint8)
    parts = [part for picture in fitted for part in (gap, picture)][1:]
    axis.imshow(np.hstack(parts))
    axis.set_anchor("N")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _times(axis: Axes, described: dict[str, Any], text: str = "") -> None:
    """Write under a strip when its frames are shown, in seconds from the start of the clip."""
    places = _places(described["num_frames"])
    width = _STRIP_WIDTH // len(places) + 6
    centres = [number * width + width // 2 for number in range(len(places))]
    axis.set_xticks(centres, [f"{place / described['fps']:.2f} s" for place in places], fontsize=7)
    axis.tick_params(axis="x", length=0, pad=2)
    if text:
        axis.set_xlabel(text, fontsize=7, labelpad=1, loc="right")


def _places(number: int) -> list[int]:
    """Frames in the middle of equal parts of a clip."""
    return sorted({int((part + 0.5) / _FRAMES * number) for part in range(_FRAMES)})


def _some_frames(data: bytes, pixels: str) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format=pixels) for frame in container.decode(video=0)]
    return [frames[place] for place in _places(len(frames))]


_DRAW = {"video": _draw_video, "flow": _draw_flow, "audio": _draw_audio, "detections": _draw_detections}
