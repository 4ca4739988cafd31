"""The flow decoder: frames of stored flow -> uint8 crops of displacements."""

from __future__ import annotations

from collections.abc import Sequence

import av
import cv2
import numpy as np

from karmma_dist.modalities.contract import View
from karmma_dist.modalities.stored_frames import FramesDecoder, reformat, resized_size


class FlowDecoder(FramesDecoder):
    """A decoder to uint8 (V, F, crop, crop, 2), displacements u and v; 127.5 is no motion."""

    def __init__(self) -> None:
        super().__init__(channels=2, pixel="u and v; 127.5 is no motion", heights=2)

    def resized(self, frame: av.VideoFrame, short_side: int) -> np.ndarray:
        """Return uint8 (H, W, 2), u and v as channels, since resizing the stacked frame would mix their rows."""
        flow_HW2 = split_flow(reformat(frame, (frame.width, frame.height), "gray"))
        size = resized_size(frame.width, frame.height // 2, short_side)
        if flow_HW2.shape[1::-1] == size:
            return flow_HW2
        shrinks = size[0] < flow_HW2.shape[1]
        return cv2.resize(flow_HW2, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)

    def oriented(self, arrays: np.ndarray, views: Sequence[View]) -> np.ndarray:
        """Reverse the horizontal motion of mirrored views (V, F, H, W, 2), in place."""
        for flow_F, view in zip(arrays, views, strict=True):
            if view.flip:
                np.subtract(255, flow_F[..., 0], out=flow_F[..., 0])
        return arrays


def split_flow(stacked: np.ndarray) -> np.ndarray:
    """Split a stored gray frame (2H, W), u above v, into (H, W, 2)."""
    half = stacked.shape[0] // 2
    return np.dstack((stacked[:half], stacked[half:]))


DECODER = FlowDecoder()
