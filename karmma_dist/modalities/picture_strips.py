"""Cells of contact sheets that show pictures in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes

from karmma_dist.modalities.contract import Pictures
from karmma_dist.modalities.stored_frames import decoding_video, open_video

NUM_SHOWN = 4
"""Number of pictures in a cell."""
_STRIP_WIDTH = 1000
"""Total width in pixels of a cell's frames, side by side."""


def shown_places(num_frames: int) -> list[int]:
    """Return the frames in the middle of equal parts of a clip."""
    return sorted({int((part + 0.5) / NUM_SHOWN * num_frames) for part in range(NUM_SHOWN)})


def some_frames(data: bytes, pixels: str, places: Callable[[int], Sequence[int]] = shown_places) -> list[np.ndarray]:
    """Decode a whole video and return the frames at some places, in an FFmpeg pixel format.

    Raises:
        DecodeError: the video cannot be decoded.
    """
    with decoding_video(), open_video(data) as (container, stream, _):
        frames = [frame.to_ndarray(format=pixels) for frame in container.decode(stream)]
    return [frames[place] for place in places(len(frames))]


def fit_picture(picture: np.ndarray, number: int) -> np.ndarray:
    """Return a resized copy such that `number` copies fill a strip; enlarged pixels keep sharp edges."""
    width = _STRIP_WIDTH // number
    height = max(round(picture.shape[0] * width / picture.shape[1]), 1)
    shrinks = width < picture.shape[1]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)


def draw_strip(axis: Axes, pictures: list[np.ndarray]) -> None:
    """Draw pictures side by side, at the same position in every cell."""
    fitted = [fit_picture(picture, len(pictures)) for picture in pictures]
    gap = np.full((fitted[0].shape[0], 6, 3), 255, np.uint8)
    parts = [part for picture in fitted for part in (gap, picture)][1:]
    axis.imshow(np.hstack(parts))
    axis.set_anchor("N")
    for spine in axis.spines.values():
        spine.set_visible(False)


def draw_times(axis: Axes, shown: Pictures, text: str = "") -> None:
    """Write the times of a strip's frames under it, in seconds from the start of the clip."""
    places = shown_places(shown.num_frames)
    width = _STRIP_WIDTH // len(places) + 6
    centres = [number * width + width // 2 for number in range(len(places))]
    axis.set_xticks(centres, [f"{place / shown.fps:.2f} s" for place in places], fontsize=7)
    axis.tick_params(axis="x", length=0, pad=2)
    if text:
        axis.set_xlabel(text, fontsize=7, labelpad=1, loc="right")
