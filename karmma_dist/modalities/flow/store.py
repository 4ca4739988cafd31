"""A clip's optical flow: computed between stored frames or taken from files, stored as one gray video, u above v.

Either way the stored unit is the specification's: `bound` pixels (of the stored size, per flow frame) become 0 and 255,
no motion is 127.5.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.modalities.encode import VideoEncoder, rounded
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.modalities.yuv import gray

_MOST_COMPARED = 16
"""Frames of a clip whose stored flow is compared with its source, at most."""


def check_method(flow: FlowSpec) -> None:
    """Say now rather than in the first worker that a method is not installed.

    Raises:
        UserError: TV-L1 is asked for and OpenCV has it not.
    """
    if flow.method == "tvl1" and flow.source in ("auto", "compute") and not hasattr(cv2, "optflow"):
        raise UserError(
            "flow.method tvl1: this OpenCV is without it: pip uninstall opencv-python-headless, then "
            "pip install 'karmma-dist[tvl1]' (or choose flow.method=dis)"
        )


def flow_between(method: str) -> Any:
    """An object whose `calc(previous_HW, next_HW, None)` gives the flow of gray pictures as float32 (H, W, 2), pixels.

    `dis`: dense inverse search [Kroeger et al. 2016]; `tvl1`: total variation with L1 norm [Zach et al. 2007].
    """
    if method == "tvl1":
        return cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def flow_of_files(gray_HW2: np.ndarray, bound: float) -> np.ndarray:
    """Published flow, uint8 (H, W, 2), whose 0 and 255 are -bound and bound -> pixels, float32 (H, W, 2)."""
    pixels: np.ndarray = (gray_HW2.astype(np.float32) - 127.5) * np.float32(bound / 127.5)
    return pixels


def quantise_flow(flow_HW2: np.ndarray, bound: float) -> np.ndarray:
    """Flow in pixels, float32 (H, W, 2) -> uint8 (2H, W), u above v: round(127.5 + 127.5 * flow / bound), clipped."""
    stacked = np.concatenate([flow_HW2[..., 0], flow_HW2[..., 1]])
    quantised: np.ndarray = np.clip(np.rint(127.5 + 127.5 / bound * stacked), 0, 255).astype(np.uint8)
    return quantised


def stored_flow(picture_2HW: np.ndarray, bound: float) -> np.ndarray:
    """A stored picture, uint8 (2H, W), u above v -> flow in pixels, float32 (H, W, 2)."""
    half = picture_2HW.shape[0] // 2
    return flow_of_files(np.dstack([picture_2HW[:half], picture_2HW[half:]]), bound)


class FlowEncoder:
    """One clip's flow -> its member, and how far what is stored is from what came in."""

    def __init__(self, width: int, height: int, fps: Fraction, flow: FlowSpec, video: VideoSpec) -> None:
        self._encoder = VideoEncoder(width, 2 * height, fps, flow.crf, video, colorspace=None)
        self._described: dict[str, Any] = {"width": width, "height": height, "fps": rounded(fps)}
        self._bound = flow.bound
        self._sources: dict[int, np.ndarray] = {}
        self._stride = 1

    def add(self, flow_HW2: np.ndarray) -> None:
        """Append a flow frame in pixels of the stored size, float32 (H, W, 2)."""
        number = self._encoder.num_frames
        if number % self._stride == 0:
            if len(self._sources) == _MOST_COMPARED:
                self._stride *= 2
                self._sources = {n: flow for n, flow in self._sources.items() if n % self._stride == 0}
            if number % self._stride == 0:
                self._sources[number] = flow_HW2
        self._encoder.add(quantise_flow(flow_HW2, self._bound))

    def finish(self) -> tuple[bytes, dict[str, Any]]:
        """Return the member's bytes and its description.

        Over up to 16 evenly spread frames, `error_px` is the mean absolute difference between the flow that was added
        and the flow that is stored (rounding, clipping and compression), `clipped` the share of values beyond the
        bound.
        """
        data = self._encoder.finish()
        errors, clipped = [], []
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if (source := self._sources.get(number)) is None:
                    continue
                stored = stored_flow(frame.to_ndarray(format="gray"), self._bound)
                errors.append(float(np.abs(stored - source).mean()))
                clipped.append(float((np.abs(source) > self._bound).mean()))
        return data, self._described | {
            "num_frames": self._encoder.num_frames, "bound": self._bound,
            "error_px": round(float(np.mean(errors)), 4), "clipped": round(float(np.mean(clipped)), 4),
        }  # fmt: skip


class ComputedFlow:
    """Flow between one clip's stored pictures as they come."""

    def __init__(self, width: int, height: int, fps: Fraction, flow: FlowSpec, video: VideoSpec) -> None:
        self._encoder = FlowEncoder(width, height, fps, flow, video)
        self._method, self._between = flow.method, flow_between(flow.method)
        self._previous: np.ndarray | None = None
        self._motion = np.zeros((height, width, 2), np.float32)

    def add(self, picture: np.ndarray) -> None:
        """Append a stored picture, uint8 (3H/2, W) I420."""
        current = gray(picture)
        if self._previous is not None:
            self._motion = self._between.calc(self._previous, current, None)
            self._encoder.add(self._motion)
        self._previous = current

    def finish(self) -> tuple[bytes, dict[str, Any]]:
        """Bytes and description. The last flow is repeated: as many flow frames as pictures."""
        self._encoder.add(self._motion)
        data, described = self._encoder.finish()
        return data, described | {"source": "computed", "method": self._method}
