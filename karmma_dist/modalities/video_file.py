"""One untrimmed container file, read once from start to end: frames with their times, and audio.

Stretches that cannot be decoded are recorded as damage, so that only the clips that overlap one are lost.
Times are seconds from the start of the container.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.stream import Disposition

from karmma_dist.errors import one_line
from karmma_dist.modalities.encode import Geometry
from karmma_dist.modalities.recording import CUT_TOLERANCE_S, Stretches, is_of_the_machine, media_error
from karmma_dist.modalities.yuv import ToI420, cropped, turned


class VideoFile:
    """A container file, opened for one pass over its best video and audio streams.

    Raises:
        MediaError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._container = av.open(str(path))
        except (av.error.FFmpegError, OSError) as error:
            raise media_error(error, "video", "open", f"{path.name}: {reason(error)}") from None
        self._origin_s = max((self._container.start_time or 0) / av.time_base, 0.0)
        self.video: Any = self._container.streams.best("video")
        """Best video stream; None if the file has none. Cover art of a song does not count."""
        if self.video is not None and Disposition.attached_pic in self.video.disposition:
            self.video = None
        self.damage = Stretches()
        self.num_frames = 0
        """Frames decoded so far."""
        self.end_s = 0.0
        """End of the last frame decoded so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    @property
    def fps(self) -> Fraction:
        """Frame rate of the video stream, which must exist."""
        rate = self.video.average_rate or self.video.guessed_rate or Fraction(25)
        return Fraction(rate)

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield (time, frame) in order of time and record stretches that do not decode in `damage`."""
        stream = self.video
        stream.codec_context.thread_count = 1
        # By default the decoder silently conceals errors.
        stream.codec_context.options = {"err_detect": "explode"}
        period = float(1 / self.fps)
        for frame, time_s, problem in _decode(self._container, stream):
            time_s = self.end_s if time_s is None else time_s - self._origin_s
            if frame is None:
                self.damage.start(time_s, problem)
                continue
            if frame.is_corrupt:
                self.damage.start(time_s, "corrupt frame")
            elif frame.key_frame:
                self.damage.stop(time_s)
            self.num_frames += 1
            self.end_s = time_s + period
            yield time_s, frame
        declared = self._declared_end_s(stream)
        if declared is not None and self.end_s < declared - CUT_TOLERANCE_S:
            self.damage.start(self.end_s, f"ends at {self.end_s:.2f} of {declared:.2f} s")

    def audio_frames(self) -> Iterator[tuple[Any, float | None, str]]:
        """Yield (frame, time, "") of the best audio stream in a separate pass, and (None, time, problem) for damage.

        Times are seconds from the start of the file; None if the frame follows the previous one.
        """
        with av.open(str(self.path)) as container:
            stream = container.streams.best("audio")
            if stream is None:
                return
            stream.codec_context.thread_count = 1
            for frame, time_s, problem in _decode(container, stream):
                yield frame, None if time_s is None else time_s - self._origin_s, problem

    def audio_end_s(self) -> float | None:
        """Return the declared end of the best audio stream in seconds; None without audio or without declaration."""
        stream = self._container.streams.best("audio")
        return None if stream is None else self._declared_end_s(stream)

    @property
    def has_audio(self) -> bool:
        """True if the file has an audio stream."""
        return self._container.streams.best("audio") is not None

    def _declared_end_s(self, stream: Any) -> float | None:
        """Return the stream's end in seconds as its container declares it, or None."""
        if stream.duration is not None:
            return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - self._origin_s
        if len(self._container.streams) == 1 and self._container.duration is not None:
            return float(self._container.duration / av.time_base)
        return None


class Picture:
    """A decoded frame that is scaled, turned upright and cropped at most once, when a clip shows it."""

    def __init__(self, frame: av.VideoFrame, time_s: float, shrinker: Shrinker) -> None:
        self.time_s, self.colorspace = time_s, shrinker.colorspace
        self._frame, self._shrinker = frame, shrinker
        self._image: np.ndarray | None = None

    def image(self) -> np.ndarray:
        """Return the picture as it is stored, uint8 (3H/2, W) I420."""
        if self._image is None:
            self._image = self._shrinker(self._frame)
        return self._image


class Shrinker:
    """A function that scales decoded frames to a geometry, turns them upright and crops them."""

    def __init__(self, geometry: Geometry, quarter_turns: int, colorspace: int) -> None:
        self._geometry, self._turns = geometry, quarter_turns
        self._to_i420 = ToI420(colorspace)
        self.colorspace = self._to_i420.colorspace
        """Colour space of the stored pictures."""

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the frame as it is stored, uint8 (3H/2, W) I420."""
        geometry = self._geometry
        width, height = geometry.scaled_width, geometry.scaled_height
        if self._turns % 2:
            width, height = height, width
        upright = turned(self._to_i420(frame, width, height), self._turns)
        return cropped(upright, geometry.left, geometry.top, geometry.width, geometry.height)


def quarter_turns(frame: av.VideoFrame) -> int:
    """Return the number of counter-clockwise quarter turns that turn the frame upright."""
    return round(frame.rotation / 90) % 4


def _decode(container: Any, stream: Any) -> Iterator[tuple[Any, float | None, str]]:
    """Yield (frame, time, "") and, for packets that do not decode, (None, time, problem)."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as error:
            if is_of_the_machine(error):
                raise
            yield None, None, reason(error)
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            yield None, None if packet.pts is None else float(packet.pts * packet.time_base), reason(error)
            continue
        for frame in frames:
            yield frame, frame.time, ""


def reason(error: BaseException) -> str:
    """Return the first sentence of FFmpeg's error message."""
    text = getattr(error, "strerror", None) or str(error)
    return one_line(str(text).split(";")[0])
