"""One untrimmed container file, read once from start to end: frames with their times, and audio.

Stretches that cannot be decoded are recorded as damage, so that only the clips that overlap one are lost.
Times are seconds from the start of the container, which may lie below zero on its own clock.
"""

from __future__ import annotations

import re
import statistics
from collections import deque
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
from karmma_dist.modalities.file_type import unusable_type
from karmma_dist.modalities.recording import (
    CUT_TOLERANCE_S,
    GAP_S,
    MOST_PIXELS,
    MediaError,
    Stretches,
    is_of_the_machine,
    media_error,
)
from karmma_dist.modalities.yuv import Orientation, ToI420, cropped

INTERLEAVING_S = 1.0
"""Streams of a file that was cut end within this time of each other."""

_CHECKED = {"err_detect": "crccheck+explode"}
"""Options of decoders: without them, checksums are not compared and errors are silently concealed."""

_ESTIMATED_LENGTH = {"aac", "ac3", "amr", "eac3", "h264", "hevc", "loas", "m4v", "mpegvideo"}
"""Formats whose length FFmpeg only estimates from the bit rate, because they have no header that declares it."""

FILLED_S = 0.1
"""Longest time in seconds before the first frame for which that frame is shown, if two frames are shorter."""

_NUM_INTERVALS = 15
"""Number of frames from which the local frame rate is determined."""


def open_media(path: Path) -> Any:
    """Open a container file for reading; neither its name nor its content can make FFmpeg open another file.

    Raises:
        MediaError: the file cannot be opened as a container.
    """
    try:
        if problem := unusable_type(path):
            raise MediaError("video", "open", f"{path.name}: {problem}")
        return _open_container(path)
    except (av.error.FFmpegError, OSError) as error:
        raise media_error(error, "video", "open", f"{path.name}: {reason(error)}") from None


def _open_container(path: Path) -> Any:
    # FFmpeg would take a name such as `concat:a.mp4` for a protocol.
    return av.open(f"file:{path.absolute()}", options={"protocol_whitelist": "file"})


class VideoFile:
    """A container file, opened for one pass over its best video and audio streams.

    Raises:
        MediaError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = open_media(path)
        self._origin_s = (self._container.start_time or 0) / av.time_base
        self.video: Any = self._container.streams.best("video")
        """Best video stream; None if the file has none. Cover art of a song does not count."""
        if self.video is not None and Disposition.attached_pic in self.video.disposition:
            self.video = None
        if self.video is not None and self.video.width * self.video.height > MOST_PIXELS:
            size = f"{self.video.width}x{self.video.height}"
            raise MediaError("video", "open", f"{path.name}: declares {size} pixels: too large")
        self.damage = Stretches()
        """Stretches of the video that do not decode."""
        self.blank = Stretches()
        """Stretches without any frame in the file."""
        self._intervals: deque[float] = deque(maxlen=_NUM_INTERVALS)
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
        """Frame rate around the frame that was decoded last; the file must have video.

        It is the mean rate of the stream unless the frames around here follow each other at another rate: no part of a
        recording with a pause has its mean rate.
        """
        average, guessed = self.video.average_rate, self.video.guessed_rate
        if not average or not self._intervals:
            return Fraction(average or guessed or 25)
        interval_s = statistics.median(self._intervals)
        if len(self._intervals) < 5 and max(self._intervals) - min(self._intervals) > 0.1 * interval_s:
            return Fraction(average)  # the first frames alone tell nothing if they disagree
        for rate in (average, guessed):
            if rate and abs(float(rate) * interval_s - 1) < 0.25:
                return Fraction(rate)
        return Fraction(1 / interval_s).limit_denominator(1001)

    def frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield (time, frame) in order of time; record stretches that do not decode in `damage`, gaps in `blank`.

        The iteration ends if the clock jumps back, as in concatenated files, because later times are unknown.
        """
        stream = self.video
        stream.codec_context.thread_count = 1
        stream.codec_context.options = _CHECKED
        ends = _Ends()
        time_s = 0.0
        for frame, stamp_s, problem in _decode(self._container, stream, ends):
            former_s, time_s = time_s, self.end_s if stamp_s is None else stamp_s - self._origin_s
            if frame is None:
                self.damage.start(time_s, problem)
                continue
            if self.num_frames and time_s < former_s - CUT_TOLERANCE_S:
                self.damage.end_all(self.end_s, f"the clock jumps back to {time_s:.2f} s")
                return
            if frame.is_corrupt:
                self.damage.start(time_s, "corrupt frame")
            elif frame.key_frame:
                self.damage.stop(time_s)
            self._note_frame(frame, time_s)
            yield time_s, frame
        self._check_end(stream, self.end_s, ends, self.damage)

    def _note_frame(self, frame: av.VideoFrame, time_s: float) -> None:
        """Count a frame, record a gap before it, and set its end."""
        base = frame.time_base
        own_s = (frame.duration or 0) * base.numerator / base.denominator if base else 0.0
        if own_s > 0:
            self._intervals.append(own_s)
        period_s = own_s if own_s > 0 else float(1 / self.fps)
        if self.num_frames == 0:
            if time_s > max(2 * period_s, FILLED_S):
                self.blank.spans.append((0.0, time_s, f"no picture before {time_s:.2f} s"))
        elif time_s > self.end_s + CUT_TOLERANCE_S:
            self.blank.spans.append((self.end_s, time_s, f"no picture until {time_s:.2f} s"))
        self.num_frames += 1
        self.end_s = time_s + period_s

    def audio_frames(self, damage: Stretches) -> Iterator[tuple[Any, float, str]]:
        """Yield (frame, time, "") of the best audio stream in a separate pass, and (None, time, problem) for damage.

        Times are seconds from the start of the file; a frame without a time follows the previous one.

        Args:
            damage: Receives the end of the stream if the stream was cut.
        """
        with _open_container(self.path) as container:
            stream = container.streams.best("audio")
            if stream is None:
                return
            stream.codec_context.thread_count = 1
            stream.codec_context.options = _CHECKED
            ends, end_s = _Ends(), 0.0
            for frame, stamp_s, problem in _decode(container, stream, ends):
                time_s = end_s if stamp_s is None else stamp_s - self._origin_s
                yield frame, time_s, problem
                if frame is not None:
                    end_s = time_s + frame.samples / frame.sample_rate
            self._check_end(stream, end_s, ends, damage)

    @property
    def duration_s(self) -> float | None:
        """Declared length of the file in seconds; None without declaration."""
        return None if self._container.duration is None else float(self._container.duration / av.time_base)

    @property
    def numbers_samples(self) -> bool:
        """True if the audio codec numbers its samples, so that any gap is lost audio."""
        stream = self._container.streams.best("audio")
        return stream is not None and stream.codec_context.name == "flac"

    @property
    def has_audio(self) -> bool:
        """True if the file has an audio stream."""
        return self._container.streams.best("audio") is not None

    def _check_end(self, stream: Any, end_s: float, ends: _Ends, damage: Stretches) -> None:
        """Record damage if a stream ends before its declared end; times are seconds from the start of the file."""
        declared_s = self._declared_end_s(stream)
        if declared_s is None and (file_end_s := self._declared_file_end_s()) is not None:
            last_s = max(ends.last_s - self._origin_s, end_s)
            # A stream that ends well before the others was not cut.
            if last_s < file_end_s - CUT_TOLERANCE_S and end_s > last_s - INTERLEAVING_S:
                declared_s = file_end_s
        if declared_s is not None and self.numbers_samples and stream.type == "audio" and end_s < declared_s - GAP_S:
            # The remaining frames are numbered anew, so the place of the lost ones is unknown.
            damage.end_all(0.0, f"{declared_s - end_s:.2f} of {declared_s:.2f} s are lost")
        elif declared_s is not None and end_s < declared_s - CUT_TOLERANCE_S:
            damage.start(end_s, f"ends at {end_s:.2f} of {declared_s:.2f} s")

    def _declared_end_s(self, stream: Any) -> float | None:
        """Return the declared end of the stream in seconds from the start of the file, or None."""
        if self._container.format.name in _ESTIMATED_LENGTH:
            return None
        if stream.duration is not None:
            return float((stream.duration + (stream.start_time or 0)) * stream.time_base) - self._origin_s
        tagged_s, file_end_s = _seconds_of_tag(stream.metadata.get("DURATION", "")), self._declared_file_end_s()
        if tagged_s is None or file_end_s is None:
            return None
        end_s = tagged_s - max(self._origin_s, 0.0)
        # A tag that was copied from a longer file is wrong here.
        return end_s if end_s < file_end_s + CUT_TOLERANCE_S else None

    def _declared_file_end_s(self) -> float | None:
        """Return the end of the file that its header declares, in seconds from its start, or None."""
        if self._container.duration is None or self._container.format.name in _ESTIMATED_LENGTH:
            return None
        # Some muxers count the duration from zero, others from the start: use the smaller value.
        return float(self._container.duration / av.time_base) - max(self._origin_s, 0.0)


class _Ends:
    """The end of the packets read so far, of all streams."""

    def __init__(self) -> None:
        self.last_s = 0.0
        """Latest end of a packet on the container's clock, in seconds."""

    def add(self, packet: Any) -> None:
        """Note a packet."""
        if packet.pts is not None:
            base = packet.time_base
            self.last_s = max(self.last_s, (packet.pts + (packet.duration or 0)) * base.numerator / base.denominator)


def _seconds_of_tag(text: str) -> float | None:
    """Return the seconds of a tag such as `00:00:04.021000000`, or None if the text is not a time."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", text.strip("\0 "))
    return None if match is None else 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])


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
    """A function that scales decoded frames to a geometry, sets them upright and crops them."""

    def __init__(self, geometry: Geometry, orientation: Orientation, colorspace: int) -> None:
        self._geometry, self._orientation = geometry, orientation
        self._to_i420 = ToI420(colorspace)
        self.colorspace = self._to_i420.colorspace
        """Colour space of the stored pictures."""

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Return the frame as it is stored, uint8 (3H/2, W) I420."""
        geometry = self._geometry
        width, height = geometry.scaled_width, geometry.scaled_height
        if self._orientation.is_transposed:
            width, height = height, width
        upright = self._orientation.of_i420(self._to_i420(frame, width, height))
        return cropped(upright, geometry.left, geometry.top, geometry.width, geometry.height)


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Return the orientation that its display matrix gives a frame."""
    side_data: Any = frame.side_data
    matrix = next((data for data in side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32)[:5].tolist()
    # The matrix maps (x, y) to (a x + c y, b x + d y).
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


def pixel_aspect(stream: Any) -> Fraction:
    """Return the ratio of width to height at which the pixels of a video stream are shown; 1 if it is not declared."""
    aspect = stream.sample_aspect_ratio
    return Fraction(aspect) if aspect and aspect > 0 else Fraction(1)


def _decode(container: Any, stream: Any, ends: _Ends) -> Iterator[tuple[Any, float | None, str]]:
    """Yield (frame, time, "") and, for packets that do not decode, (None, time, problem); times of the container."""
    has_duration = stream.duration is not None  # if not, the ends of all streams tell whether the file was cut
    packets = container.demux(stream) if has_duration else container.demux()
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
        if not has_duration:
            ends.add(packet)
            if packet.stream.index != stream.index:
                continue
        if packet.is_corrupt:
            yield None, None if packet.pts is None else float(packet.pts * packet.time_base), "corrupt packet"
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
