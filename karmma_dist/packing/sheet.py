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
from karmma_dist.shards import Clip, DamageError, ShardFolder

_FRAMES = 5
_STRIP_HEIGHT = 90
_CAPTION_WIDTH = 34


def draw_sheet(
    folder: ShardFolder, rows: list[tuple[Clip, dict[str, Any] | None, dict[str, str | None]]], out_png: Path
) -> None:
    """Draw (clip, metadata or None when damaged, class names) rows into a PNG."""
    modalities = folder.modalities
    figure = Figure(figsize=(2.2 + 5.2 * len(modalities), 0.5 + 1.25 * len(rows)), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(rows), 1 + len(modalities), squeeze=False, width_ratios=[1.0, *[2.6] * len(modalities)])
    for place, (clip, metadata, names) in enumerate(rows):
        axes = grid[place]
        _caption(axes[0], clip, metadata, names)
        for axis, modality in zip(axes[1:], modalities, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if place == 0:
                axis.set_title(modality, fontsize=9)
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
    lines = [clip.key, *(f"{head}: {name or 'unlabelled'}" for head, name in names.items())]
    if metadata is None:
        lines.append("metadata damaged")
    else:
        start, stop = metadata["start_s"], metadata["stop_s"]
        lines += [f"{metadata['split']}, {start:.2f} to {stop:.2f} s", f"'{metadata['narration']}'"]
    wrapped = [short for line in lines for short in textwrap.wrap(line, _CAPTION_WIDTH)]
    axis.text(0, 0.5, "\n".join(wrapped), fontsize=7, va="center", family="monospace")


def _hatched(axis: Axes, text: str, colour: str) -> None:
    axis.set_facecolor("white")
    axis.fill_between([0, 1], 0, 1, facecolor="none", edgecolor=colour, hatch="////", linewidth=0)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none"})


def _draw_video(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    del metadata
    _strip(axis, _some_frames(folder.read(clip, "video"), "rgb24"))


def _draw_flow(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    bound = metadata["modalities"]["flow"]["bound"]
    flows = []
    for gray in _some_frames(folder.read(clip, "flow"), "gray"):
        half = gray.shape[0] // 2
        flows.append((np.dstack([gray[:half], gray[half:]]).astype(np.float32) - 127.5) / 127.5 * bound)
    full = float(np.percentile(np.abs(np.stack(flows)), 99.5))
    _strip(axis, [flow_colours(flow, full) for flow in flows])
    axis.set_xlabel(f"full colour: {full:.2f} px", fontsize=6, labelpad=1)


def _draw_audio(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    del metadata
    with av.open(io.BytesIO(folder.read(clip, "audio")), "r") as container:
        samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    wave = samples.astype(np.float32) / 32768
    upper = axis.inset_axes((0, 0.55, 1, 0.45))
    lower = axis.inset_axes((0, 0, 1, 0.53))
    upper.plot(wave, linewidth=0.4)
    upper.set_xlim(0, len(wave))
    padded = np.pad(wave, (0, max(512 - len(wave), 0)))
    power, _, _, image = lower.specgram(padded + 1e-6, NFFT=512, Fs=SAMPLE_RATE, noverlap=256)
    image.set_clim(*np.percentile(10 * np.log10(power + 1e-12), (10, 99.8)))
    for inset in (upper, lower):
        inset.set_xticks([])
        inset.set_yticks([])


def _draw_detections(axis: Axes, folder: ShardFolder, clip: Clip, metadata: Any) -> None:
    del metadata
    detections = json.loads(folder.read(clip, "detections"))
    frames, size = detections["frames"], (detections["width"], detections["height"])
    places = _places(len(frames))
    if clip.has("video"):
        pictures = _some_frames(folder.read(clip, "video"), "rgb24")
    else:
        pictures = [np.full((size[1], size[0], 3), 230, np.uint8)] * len(places)
    drawn = []
    for place, picture in zip(places, pictures, strict=False):
        canvas = np.ascontiguousarray(picture)
        height, width = canvas.shape[:2]
        for x0, y0, x1, y1, category, _ in frames[place]:
            colour = (255, 140, 0) if category == HAND else (0, 160, 255)
            corners = (round(x0 * width), round(y0 * height)), (round(x1 * width), round(y1 * height))
            cv2.rectangle(canvas, *corners, colour, max(height // 80, 1))
        drawn.append(canvas)
    _strip(axis, drawn)


def _strip(axis: Axes, pictures: list[np.ndarray]) -> None:
    """Pictures side by side, all of one height."""
    scaled = []
    for picture in pictures:
        width = max(round(picture.shape[1] * _STRIP_HEIGHT / picture.shape[0]), 1)
        scaled.append(cv2.resize(picture, (width, _STRIP_HEIGHT), interpolation=cv2.INTER_AREA))
    axis.imshow(np.hstack(scaled))


def _places(number: int) -> list[int]:
    """Frames in the middle of equal parts of a clip."""
    return sorted({int((part + 0.5) / _FRAMES * number) for part in range(_FRAMES)})


def _some_frames(data: bytes, pixels: str) -> list[np.ndarray]:
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_ndarray(format=pixels) for frame in container.decode(video=0)]
    return [frames[place] for place in _places(len(frames))]


_DRAW = {"video": _draw_video, "flow": _draw_flow, "audio": _draw_audio, "detections": _draw_detections}
