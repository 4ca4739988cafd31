"""Pictures and samples -> the bytes of one clip's members, and the geometry they share.

Everything runs on one thread and writes no date, so that the same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange

from karmma_dist.packing.records import MediaError
from karmma_dist.packing.spec import FlowSpec, VideoSpec

SAMPLE_RATE = 16_000
"""Of stored audio, Hz."""

MIN_SIDE = 16
"""Smallest picture that H.264 and DIS flow take, pixels."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture is scaled, then cropped to the kept region. All even, in pixels."""

    scaled_width: int
    scaled_height: int
    left: int
    top: int
    width: int
    """Of the stored picture."""
    height: int

    @classmethod
    def of(cls, width: int, height: int, spec: VideoSpec, modality: str = "video") -> Geometry:
        """Geometry for an upright source of `width` x `height`: never enlarged.

        Raises:
            MediaError: what would be stored is smaller than 16 pixels.
        """
        left, top, right, bottom = spec.region
        across, down = (right - left) * width, (bottom - top) * height
        scale = min(1.0, spec.short_side / min(across, down))
        stored_width, stored_height = _even(across * scale), _even(down * scale)
        if min(stored_width, stored_height) < MIN_SIDE:
            raise MediaError(
                modality, "cut", f"{width}x{height} leaves {stored_width}x{stored_height}, below {MIN_SIDE} pixels"
            )
        scaled_width = max(round(stored_width / (right - left)), stored_width)
        scaled_height = max(round(stored_height / (bottom - top)), stored_height)
        return cls(
            scaled_width,
            scaled_height,
            min(round(left * scaled_width), scaled_width - stored_width),
            min(round(top * scaled_height), scaled_height - stored_height),
            stored_width,
            stored_height,
        )

    def crop(self, scaled: np.ndarray) -> np.ndarray:
        """Cut the kept region out of a scaled picture (H, W) or (H, W, 3)."""
        return np.ascontiguousarray(scaled[self.top : self.top + self.height, self.left : self.left + self.width])

    def shrink(self, picture: np.ndarray) -> np.ndarray:
        """Scale and crop a decoded picture, uint8 (H, W) or (H, W, 3)."""
        size = (self.scaled_width, self.scaled_height)
        same = picture.shape[1::-1] == size
        return self.crop(picture if same else cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


class VideoEncoder:
    """Pictures -> H.264 in MP4: constant frame rate, short closed groups of pictures, no B-frames."""

    def __init__(self, width: int, height: int, fps: Fraction, crf: int, spec: VideoSpec, *, gray: bool) -> None:
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp4", options={"fflags": "+bitexact"})
        # x264's macroblock tree gives other bytes for the same pictures about once in a hundred runs (measured).
        options = {
            "mbtree": "0", "crf": str(crf), "preset": spec.preset, "tune": "fastdecode", "bf": "0", "g": str(spec.gop),
            "sc_threshold": "0", "flags": "+cgop", "threads": "1",
        }  # fmt: skip
        self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._format = "gray" if gray else "rgb24"
        # Gray values must come back as they went in: with the default limited range they are squeezed to 16..235.
        self._range = ColorRange.JPEG if gray else ColorRange.UNSPECIFIED
        if gray:
            self._stream.codec_context.color_range = ColorRange.JPEG
        self.num_frames = 0

    def add(self, picture: np.ndarray) -> None:
        """Append a picture: uint8 (H, W, 3) RGB, or (H, W) gray."""
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


class ClipPictures:
    """One clip's stored pictures as they come: encodes the video, and the flow between them when it is computed."""

    def __init__(self, fps: Fraction, video: VideoSpec, flow: FlowSpec | None) -> None:
        """`flow` None: no flow is computed."""
        self.num_frames = 0
        self._fps, self._video, self._flow = fps, video, flow
        self._encoders: dict[str, VideoEncoder] = {}
        self._previous: np.ndarray | None = None
        self._motion: np.ndarray | None = None
        self._dis: Any = None

    def add(self, picture: np.ndarray) -> None:
        """Append a stored picture, uint8 (H, W, 3) RGB; all of one size."""
        height, width = picture.shape[:2]
        if self.num_frames == 0:
            self._open(width, height)
        self.num_frames += 1
        if "video" in self._encoders:
            self._encoders["video"].add(picture)
        if self._flow is not None:
            gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
            if self._previous is not None:
                self._motion = quantise_flow(self._dis.calc(self._previous, gray, None), self._flow.bound)
                self._encoders["flow"].add(self._motion)
            self._previous = gray

    def finish(self) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
        """Payload and description per modality. The last flow is repeated: as many flow frames as video frames."""
        payloads, described = {}, {}
        if self._flow is not None and self._previous is not None:
            still = quantise_flow(np.zeros((*self._previous.shape, 2), np.float32), self._flow.bound)
            self._encoders["flow"].add(still if self._motion is None else self._motion)
        for modality, encoder in self._encoders.items():
            payloads[modality] = encoder.finish()
            described[modality] = self._description | {"fps": rounded(self._fps), "num_frames": encoder.num_frames}
        if "flow" in described and self._flow is not None:
            described["flow"] |= {"bound": self._flow.bound, "source": "computed"}
        return payloads, described

    def _open(self, width: int, height: int) -> None:
        self._description: dict[str, Any] = {"width": width, "height": height}
        if self._video.source != "none":
            self._encoders["video"] = VideoEncoder(width, height, self._fps, self._video.crf, self._video, gray=False)
        if self._flow is not None:
            self._encoders["flow"] = flow_encoder(width, height, self._fps, self._flow, self._video)
            self._dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def flow_encoder(width: int, height: int, fps: Fraction, flow: FlowSpec, video: VideoSpec) -> VideoEncoder:
    """Encoder for pictures of u above v: (2 * height, width), gray."""
    return VideoEncoder(width, 2 * height, fps, flow.crf, video, gray=True)


def quantise_flow(flow_HW2: np.ndarray, bound: float) -> np.ndarray:
    """Flow in pixels, float32 (H, W, 2) -> uint8 (2H, W), u above v: round(127.5 + 127.5 * flow / bound), clipped."""
    stacked = np.concatenate([flow_HW2[..., 0], flow_HW2[..., 1]])
    quantised: np.ndarray = np.clip(np.rint(127.5 + 127.5 / bound * stacked), 0, 255).astype(np.uint8)
    return quantised


def encode_flac(samples: np.ndarray) -> bytes:
    """Samples, int16 (N,), mono at 16 kHz -> FLAC."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def num_frames_between(start_s: float, stop_s: float, fps: Fraction) -> int:
    """Frames at start, start + 1/fps, ... that lie before stop: at least one."""
    return max(1, math.ceil((stop_s - start_s) * float(fps) - 1e-6))


def rounded(fps: Fraction) -> float | int:
    """A frame rate as it is written in metadata."""
    return int(fps) if fps.denominator == 1 else round(float(fps), 6)


def _even(value: float) -> int:
    return max(2, 2 * round(value / 2))
