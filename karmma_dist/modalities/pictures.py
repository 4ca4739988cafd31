"""The pass over a recording's pictures: each is decoded once and stored for every clip that shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from av.video.reformatter import Colorspace

from karmma_dist.modalities.encode import Geometry, num_frames_between
from karmma_dist.modalities.numbered_frames import NumberedFrames, numbers_shown
from karmma_dist.modalities.recording import ClipRecord, MediaError, Recording
from karmma_dist.modalities.storage import PictureSink, SinkMaker, Stored
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.modalities.video_file import Picture, Shrinker, VideoFile, orientation_of, pixel_aspect
from karmma_dist.modalities.yuv import ToI420, size_of

EARLY_S = 2e-3
"""Delay in seconds up to which a frame counts as shown at a stored frame's moment: containers round to milliseconds."""

_SQUARE = Fraction(1)


class ClipPictures:
    """The pictures of one clip, handed one by one to the sinks of all modalities that are made from pictures.

    Args:
        fps: Rate of the stored pictures.
        makers: Maker of the sink, by modality.
        aspect: Width over height of the source's pixels. Stored pixels are square; if the source's are not, entries in
            KEY.json state it: `"pixel_aspect": "4/3"`.
    """

    def __init__(self, fps: Fraction, makers: Mapping[str, SinkMaker], aspect: Fraction = _SQUARE) -> None:
        self.num_frames = 0
        self._fps, self._makers, self._aspect = fps, makers, aspect
        self._sinks: dict[str, PictureSink] = {}

    def add(self, picture: np.ndarray, colorspace: Colorspace) -> None:
        """Append a stored picture, uint8 (3H/2, W) I420; all pictures have one size and colour space."""
        if self.num_frames == 0:
            height, width = size_of(picture)
            self._sinks = {name: make(width, height, self._fps, colorspace) for name, make in self._makers.items()}
        self.num_frames += 1
        for sink in self._sinks.values():
            sink.add(picture)

    def finish(self) -> dict[str, Stored]:
        """Return the finished members, by modality."""
        stored = {name: sink.finish() for name, sink in self._sinks.items()}
        if self._aspect == _SQUARE:
            return stored
        return {name: (data, {**entry, "pixel_aspect": str(self._aspect)}) for name, (data, entry) in stored.items()}


@dataclass(slots=True)
class CutPictures:
    """The result of the pass for one clip."""

    stored: dict[str, Stored] = field(default_factory=dict)
    """Members made from the pictures, by modality."""
    source_size: tuple[int, int] | None = None
    """Width and height of the upright source; None if the clip has no pictures."""
    num_source_frames: int = 0
    stop_s: float | None = None
    """End of the last picture."""


Outcome = tuple[ClipRecord, CutPictures | MediaError]


def pass_over_pictures(
    recording: Recording, video: VideoSpec, makers: Mapping[str, SinkMaker], source: VideoFile | NumberedFrames | None
) -> Iterator[Outcome]:
    """Yield every clip of a recording with its pictures, in the order in which the clips end.

    Args:
        recording: The clips.
        video: Rate and geometry of what is stored.
        makers: Maker of the sink, by modality, for modalities that are made from pictures.
        source: Source of the pictures; None if the recording has none or nothing needs them.
    """
    if isinstance(source, VideoFile):
        yield from _pass_over_video(recording, video, makers, source)
    elif source is not None:
        for clip in recording.clips:
            try:
                yield clip, _pictures_of_frames(clip, recording.nominal_fps, video, makers, source)
            except MediaError as error:
                yield clip, error
    else:
        yield from ((clip, CutPictures()) for clip in recording.clips)


def _pass_over_video(
    recording: Recording, video: VideoSpec, makers: Mapping[str, SinkMaker], file: VideoFile
) -> Iterator[Outcome]:
    shrinker, size, decoded_size = None, None, (0, 0)
    max_fps = Fraction(video.max_fps).limit_denominator(1001)
    aspect = _SQUARE
    waiting = sorted(recording.clips, key=lambda clip: (clip.start_s, clip.key), reverse=True)
    active: list[_ActiveClip] = []
    shown: Picture | None = None
    for time_s, frame in file.frames():
        if shown is not None:
            while waiting and waiting[-1].start_s < time_s - EARLY_S:
                active.append(_ActiveClip(waiting.pop(), min(file.fps, max_fps), makers, aspect))
            yield from _show_to_all(active, shown, time_s, file, size)
            if not waiting and not active:
                return
        elif file.blank.spans:
            yield from _before_first(waiting, time_s, file)
        if shrinker is None or (frame.width, frame.height) != decoded_size:
            orientation, decoded_size = orientation_of(frame), (frame.width, frame.height)
            aspect = pixel_aspect(file.video)
            seen = (float(frame.width * aspect), float(frame.height))
            size = decoded_size[::-1] if orientation.is_transposed else decoded_size
            try:
                geometry = Geometry.of(*(seen[::-1] if orientation.is_transposed else seen), video)
                shrinker = Shrinker(geometry, orientation, frame.colorspace)
            except MediaError as error:
                yield from ((clip, error) for clip in [*waiting, *(cut.clip for cut in active)])
                return
        shown = Picture(frame, time_s, shrinker)
    active += [_ActiveClip(clip, min(file.fps, max_fps), makers, aspect) for clip in reversed(waiting)]
    if shown is not None:
        yield from _show_to_all(active, shown, file.end_s, file, size)
    yield from ((cut.clip, cut.finish(file, size)) for cut in active)


def _before_first(waiting: list[ClipRecord], first_s: float, file: VideoFile) -> Iterator[Outcome]:
    """Yield and remove the clips that end before the first picture; they have no pictures."""
    for clip in list(waiting):
        if clip.stop_s is not None and clip.stop_s <= first_s:
            waiting.remove(clip)
            try:
                file.damage.check("video", clip.start_s, clip.stop_s)
                yield clip, CutPictures()
            except MediaError as error:
                yield clip, error


def _pictures_of_frames(
    clip: ClipRecord, nominal_fps: int, video: VideoSpec, makers: Mapping[str, SinkMaker], frames: NumberedFrames
) -> CutPictures:
    nominal = Fraction(nominal_fps)
    fps = min(nominal, Fraction(video.max_fps).limit_denominator(1001))
    pictures = ClipPictures(fps, makers)
    size, geometry, to_i420 = None, None, ToI420()
    numbers = numbers_shown(clip, frames, clip.start_frame, clip.stop_frame, nominal, fps)
    for number in numbers:
        picture = frames.read(number)
        if geometry is None:
            size = (picture.shape[1], picture.shape[0])
            geometry = Geometry.of(*size, video)
        elif size != (picture.shape[1], picture.shape[0]):
            raise MediaError("video", "decode", f"{frames.path.name}: frames of the clip differ in size")
        pictures.add(to_i420.of_rgb(geometry.shrink(picture)), to_i420.colorspace)
    return CutPictures(pictures.finish(), size, len(numbers))


class _ActiveClip:
    """A clip that the pass is currently storing: it chooses the picture for each moment of the clip."""

    def __init__(self, clip: ClipRecord, fps: Fraction, makers: Mapping[str, SinkMaker], aspect: Fraction) -> None:
        self.clip, self._fps = clip, float(fps)
        self._stored = ClipPictures(fps, makers, aspect)
        self._wanted = None if clip.stop_s is None else num_frames_between(clip.start_s, clip.stop_s, fps)
        self._first_s = clip.start_s
        self._size: tuple[int, ...] | None = None
        self._problem: MediaError | None = None

    def show(self, picture: Picture, until_s: float) -> None:
        """Store `picture`, which is shown until `until_s`, for every remaining moment of the clip before that."""
        while not self.done and self.clip.start_s + self._stored.num_frames / self._fps < until_s - EARLY_S:
            image = picture.image()
            if self._stored.num_frames == 0:
                self._first_s, self._size = min(picture.time_s, self.clip.start_s), image.shape
            elif image.shape != self._size:
                self._problem = MediaError("video", "decode", f"picture size changes at {picture.time_s:.2f} s")
                return
            self._stored.add(image, picture.colorspace)

    @property
    def done(self) -> bool:
        """True if the clip needs no further picture."""
        return self._problem is not None or self._stored.num_frames == self._wanted

    def finish(self, file: VideoFile, size: tuple[int, int] | None) -> CutPictures | MediaError:
        """Return the clip's pictures, or the error if they cannot be stored."""
        try:
            if self._problem is not None:
                raise self._problem
            file.damage.check("video", *self._span(file))
            file.blank.check("video", *self._span(file))
            if self._stored.num_frames == 0:
                text = f"starts at {self.clip.start_s:.2f} s, the video ends at {file.end_s:.2f} s"
                raise MediaError("video", "cut", text)
        except MediaError as error:
            return error
        stop_s = self.clip.start_s + self._stored.num_frames / self._fps
        return CutPictures(self._stored.finish(), size, file.num_frames, round(stop_s, 6))

    def _span(self, file: VideoFile) -> tuple[float, float]:
        """Return the time from the first shown picture to the last stored moment, or to the clip's end.

        It reaches to the clip's end if the file ends before the clip.
        """
        if self.done:
            return self._first_s, self.clip.start_s + (self._stored.num_frames - 1) / self._fps
        return self._first_s, max(file.end_s, self.clip.stop_s or 0.0)


def _show_to_all(
    active: list[_ActiveClip], picture: Picture, until_s: float, file: VideoFile, size: tuple[int, int] | None
) -> Iterator[Outcome]:
    """Show a picture to all active clips; yield and remove those that are done."""
    for cut in list(active):
        cut.show(picture, until_s)
        if cut.done:
            active.remove(cut)
            yield cut.clip, cut.finish(file, size)
