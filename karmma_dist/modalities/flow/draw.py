"""Flow in contact sheets: hue is direction, saturation is speed."""

from __future__ import annotations

import cv2
import numpy as np
from matplotlib.axes import Axes

from karmma_dist.modalities.contract import Drawing, Sheet
from karmma_dist.modalities.flow import FlowDescription
from karmma_dist.modalities.flow.decode import split_flow
from karmma_dist.modalities.picture_strips import draw_strip, draw_times, some_frames


class FlowDrawing(Drawing):
    """A drawing of flow frames in the colours of a wheel."""

    title = "flow: hue is direction as in the wheel, white is rest"

    def draw(self, axis: Axes, data: bytes, description: FlowDescription, sheet: Sheet) -> None:
        """Draw frames side by side, the fastest motion in full colour."""
        flows = [
            (split_flow(gray).astype(np.float32) - 127.5) / 127.5 * description.bound
            for gray in some_frames(data, "gray")
        ]
        full = float(np.percentile(np.linalg.norm(np.stack(flows), axis=-1), 98))
        draw_strip(axis, [flow_colours(flow, full) for flow in flows])
        draw_times(axis, description.pictures, f"full colour {full:.2f} px per frame")

    def draw_legend(self, axis: Axes) -> None:
        """Draw the colour wheel: the colour at its right edge means motion to the right."""
        across, down = np.meshgrid(np.linspace(-1, 1, 61), np.linspace(-1, 1, 61))
        inside = np.where(np.hypot(across, down) <= 1, 255, 0).astype(np.uint8)
        wheel = axis.inset_axes((0.94, 1.02, 0.06, 0.24))
        wheel.imshow(np.dstack([flow_colours(np.dstack([across, down]), 1.0), inside]))
        wheel.axis("off")


def flow_colours(flow_HW2: np.ndarray, full: float) -> np.ndarray:
    """Return flow as uint8 RGB (H, W, 3): hue is direction, saturation is speed up to `full`, white is no motion."""
    angle = np.arctan2(flow_HW2[..., 1], flow_HW2[..., 0])
    hue = (np.degrees(angle) % 360 / 2).astype(np.uint8)
    speed = np.clip(np.hypot(flow_HW2[..., 0], flow_HW2[..., 1]) / max(full, 1e-6), 0, 1)
    hsv = np.dstack([hue, (255 * speed).astype(np.uint8), np.full_like(hue, 255)])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))


DRAWING = FlowDrawing()
