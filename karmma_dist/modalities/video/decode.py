"""The video decoder: stored frames -> uint8 RGB crops."""

from __future__ import annotations

import av
import numpy as np

from karmma_dist.modalities.stored_frames import FramesDecoder, reformat, resized_size


class VideoDecoder(FramesDecoder):
    """A decoder to uint8 (V, F, crop, crop, 3), RGB."""

    def __init__(self) -> None:
        super().__init__(channels=3, pixel="RGB")

    def resized(self, frame: av.VideoFrame, short_side: int) -> np.ndarray:
        """Return uint8 (H, W, 3)."""
        return reformat(frame, resized_size(frame.width, frame.height, short_side), "rgb24")


DECODER = VideoDecoder()
