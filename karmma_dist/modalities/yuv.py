"""Pictures in the stored pixel format: I420, 8 bit, limited range, from the decoder's planes to the encoder's.

An I420 picture of (H, W) is uint8 (3H/2, W): H rows of luma, then both chroma planes at half the size. Scaling planes
directly is faster than going through RGB and avoids two roundings, each of which darkens the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

_FULL_RANGE = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)
"""Full-range gray value of each limited-range luma value (16 to 235)."""


class ToI420:
    """A converter of frames of any format to scaled I420. It reuses one reformatter: one per frame leaks memory.

    Args:
        colorspace: Colour space of the source; BT.709, usual for cameras, is kept, any other becomes BT.601.
    """

    def __init__(self, colorspace: int = Colorspace.ITU601) -> None:
        self.colorspace = Colorspace.ITU709 if colorspace == Colorspace.ITU709 else Colorspace.ITU601
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """Return the frame scaled to I420, uint8 (3 * height / 2, width); width and height must be even."""
        scaled = self._reformatter.reformat(
            frame, width, height, "yuv420p", dst_colorspace=self.colorspace, dst_color_range=ColorRange.MPEG,
            interpolation="AREA", threads=1,
        )  # fmt: skip
        return scaled.to_ndarray()

    def of_rgb(self, picture: np.ndarray) -> np.ndarray:
        """Convert an RGB picture, uint8 (H, W, 3), to I420."""
        return self(av.VideoFrame.from_ndarray(picture, format="rgb24"), picture.shape[1], picture.shape[0])


def planes(picture: np.ndarray) -> list[np.ndarray]:
    """Return luma (H, W) and both chroma planes (H/2, W/2) of an I420 picture, as views."""
    height, width = size_of(picture)
    luma, *chroma = np.split(picture.reshape(-1), (height * width, height * width * 5 // 4))
    return [luma.reshape(height, width), *(plane.reshape(height // 2, width // 2) for plane in chroma)]


def size_of(picture: np.ndarray) -> tuple[int, int]:
    """Return height and width of an I420 picture."""
    return picture.shape[0] * 2 // 3, picture.shape[1]


@dataclass(frozen=True, slots=True)
class Orientation:
    """The orientation of a decoded picture: to show it upright, transpose it, then mirror its axes."""

    is_transposed: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False

    def of_i420(self, picture: np.ndarray) -> np.ndarray:
        """Return an I420 picture upright."""
        return picture if self == Orientation() else _joined([self._of_plane(plane) for plane in planes(picture)])

    def _of_plane(self, plane: np.ndarray) -> np.ndarray:
        plane = plane.T if self.is_transposed else plane
        return plane[:: -1 if self.mirrors_y else 1, :: -1 if self.mirrors_x else 1]


def cropped(picture: np.ndarray, left: int, top: int, width: int, height: int) -> np.ndarray:
    """Cut a region out of an I420 picture; all numbers must be even."""
    if size_of(picture) == (height, width):
        return picture
    luma, *chroma = planes(picture)
    half = np.s_[top // 2 : (top + height) // 2, left // 2 : (left + width) // 2]
    return _joined([luma[top : top + height, left : left + width], *(plane[half] for plane in chroma)])


def gray(picture: np.ndarray) -> np.ndarray:
    """Return luma of an I420 picture in full range: uint8 (H, W), black 0 and white 255."""
    return _FULL_RANGE[picture[: size_of(picture)[0]]]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    width = parts[0].shape[1]
    return np.concatenate([part.reshape(-1) for part in parts]).reshape(-1, width)
