"""The encoder of stored pictures, and the geometry that video and flow share.

Encoding runs on one thread and writes no date, so that the same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from karmma_dist.modalities.recording import MediaError
from karmma_dist.modalities.video import VideoSpec

MIN_SIDE = 16
"""Smallest side in pixels that H.264 and DIS flow accept."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size to which a picture is scaled, and the region to which it is then cropped. All even, in pixels."""

    scaled_width: int
    scaled_height: int
    left: int
    top: int
    width: int
    """Width of the stored picture."""
    height: int
    """Height of the stored picture."""

    @classmethod
    def of(cls, width: float, height: float, spec: VideoSpec, modality: str = "video") -> Geometry:
        """Compute the geometry for an upright source of `width` x `height`, which is never enlarged.

        Raises:
            MediaError: the stored picture would be smaller than 16 pixels.
        """
        left, top, right, bottom = spec.region
        across, down = (right - left) * width, (bottom - top) * height
        scale = min(1.0, spec.short_side / min(across, down))
        stored_width, stored_height = _even(across * scale), _even(down * scale)
        if min(stored_width, stored_height) < MIN_SIDE:
            raise MediaError(
                modality, "cut", f"{width:g}x{height:g} leaves {stored_width}x{stored_height}, below {MIN_SIDE} pixels"
            )
        scaled_width = max(_even(stored_width / (right - left)), stored_width)
        scaled_height = max(_even(stored_height / (bottom - top)), stored_height)
        return cls(
            scaled_width,
            scaled_height,
            min(2 * round(left * scaled_width / 2), scaled_width - stored_width),
            min(2 * round(top * scaled_height / 2), scaled_height - stored_height),
            stored_width,
            stored_height,
        )

    def crop(self, scaled: np.ndarray) -> np.ndarray:
        """Cut the kept region out of a scaled picture (H, W) or (H, W, 3)."""
        return np.ascontiguousarray(scaled[self.top : self.top + self.height, self.left : self.left + self.width])

    def shrink(self, picture: np.ndarray) -> np.ndarray:
        """Scale and crop a decoded picture, uint8 (H, W) or (H, W, 3)."""
        size = (self.scaled_width, self.scaled_height)
        is_scaled = picture.shape[1::-1] == size
        return self.crop(picture if is_scaled else cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def x264_options(crf: int, spec: VideoSpec) -> dict[str, str]:
    """Return FFmpeg's libx264 options for all stored video."""
    # x264's macroblock tree gives other bytes for the same pictures about once in a hundred runs (measured).
    return {
        "mbtree": "0", "crf": str(crf), "preset": spec.preset, "tune": "fastdecode", "bf": "0", "g": str(spec.gop),
        "sc_threshold": "0", "flags": "+cgop", "threads": "1",
    }  # fmt: skip


class VideoEncoder:
    """An encoder of pictures to H.264 in MP4: constant frame rate, short closed groups of pictures, no B-frames.

    Gray pictures have the colour space None.
    """

    def __init__(
        self, width: int, height: int, fps: Fraction, crf: int, spec: VideoSpec, colorspace: Colorspace | None
    ) -> None:
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4", options={"fflags": "+bitexact"})
        self._stream = self._container.add_stream("libx264", rate=fps, options=x264_options(crf, spec))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._format = "gray" if colorspace is None else "yuv420p"
        # Gray values must survive a round trip: the limited range would squeeze them to 16..235.
        self._range = ColorRange.JPEG if colorspace is None else ColorRange.MPEG
        self._stream.codec_context.color_range = self._range
        if colorspace is not None:
            self._stream.codec_context.colorspace = colorspace
        self.num_frames = 0

    def add(self, picture: np.ndarray) -> None:
        """Append a picture: uint8 (3H/2, W) I420, or (H, W) gray."""
        frame = av.VideoFrame.from_ndarray(picture, format=self._format)
        frame.color_range = self._range
        frame.pts = self.num_frames
        self.num_frames += 1
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def finish(self) -> bytes:
        """Close the file and return its bytes."""
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()
        return self._file.getvalue()


def num_frames_between(start_s: float, stop_s: float, fps: Fraction) -> int:
    """Count the frames at start, start + 1/fps, ... before stop; at least one."""
    return max(1, math.ceil((stop_s - start_s) * float(fps) - 1e-6))


def rounded(fps: Fraction) -> float | int:
    """Return a frame rate as metadata store it: an int if whole, else rounded to six digits."""
    return int(fps) if fps.denominator == 1 else round(float(fps), 6)


def _even(value: float) -> int:
    return max(2, 2 * round(value / 2))
