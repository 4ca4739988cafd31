"""Video in contact sheets: some frames in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from karmma_dist.modalities.contract import Drawing, Sheet
from karmma_dist.modalities.picture_strips import draw_strip, draw_times, some_frames
from karmma_dist.modalities.video import VideoDescription


class VideoDrawing(Drawing):
    """A drawing of frames and their times."""

    title = "video"

    def draw(self, axis: Axes, data: bytes, description: VideoDescription, sheet: Sheet) -> None:
        """Draw frames side by side."""
        draw_strip(axis, some_frames(data, "rgb24"))
        draw_times(axis, description.pictures)

    def pictures(self, data: bytes, places: Callable[[int], Sequence[int]]) -> list[np.ndarray]:
        """Return frames, uint8 RGB (H, W, 3)."""
        return some_frames(data, "rgb24", places)


DRAWING = VideoDrawing()
