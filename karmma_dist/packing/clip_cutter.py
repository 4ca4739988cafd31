"""Cuts one recording into its clips, each complete or failed, in one pass over its frames."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import av
import cv2

from karmma_dist.errors import one_line
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.numbered_frames import NumberedFrames
from karmma_dist.modalities.pictures import CutPictures, Outcome, pass_over_pictures
from karmma_dist.modalities.recording import (
    LONGEST_S,
    ClipRecord,
    MediaError,
    Recording,
    is_of_the_machine,
    media_error,
)
from karmma_dist.modalities.storage import Source
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.packing.records import UNEXPECTED, CutClip, Failure
from karmma_dist.packing.spec import PackingSpec

MOST_LATE_S = 10.0
"""Seconds by which a clip may end after everything that its recording has; it is cut shorter or filled with silence."""
_FOREVER_S = 1e9


def cut_recording(recording: Recording, spec: PackingSpec) -> Iterator[CutClip | Failure]:
    """Yield each clip of a recording as soon as it is complete, or the reason why it fails.

    A clip fails if any of its existing media fails; media that do not exist are absent from its payloads. Any other
    error than those of decoders and parsers fails all clips that are left, in a stage of its own: it is perhaps a bug.

    Raises:
        OSError: the machine fails, not a media file: see `modalities.recording.is_of_the_machine`.
    """
    left = {clip.key: clip for clip in recording.clips}
    try:
        for cut in _cut_all(recording, spec):
            del left[cut.key if isinstance(cut, Failure) else cut.record.key]
            yield cut
    except MediaError as error:
        yield from (_failure(clip, error) for clip in left.values())
    except (av.error.FFmpegError, cv2.error) as error:
        # Media that break their decoder in an unforeseen way fail their own recording, not the run.
        unforeseen = media_error(error, spec.modalities[0], "cut", one_line(error, 200))
        yield from (_failure(clip, unforeseen) for clip in left.values())
    except Exception as error:
        yield from (unexpected_failure(clip, error, recording, spec) for clip in left.values())


def _cut_all(recording: Recording, spec: PackingSpec) -> Iterator[CutClip | Failure]:
    with ExitStack() as files:
        cutter = _Cutter(recording, spec, files)
        clips = {clip.key: clip for clip in recording.clips}
        for shown, pictures in cutter.pictures():
            clip = clips[shown.key]
            if isinstance(pictures, MediaError):
                late = cutter.late_clip(clip) if pictures.stage == "cut" else None
                yield _failure(clip, late or pictures)
                continue
            try:
                yield cutter.complete(clip, pictures)
            except MediaError as error:
                yield _failure(clip, error)


def _failure(clip: ClipRecord, error: MediaError) -> Failure:
    return Failure(clip.key, clip.split, error.modality, error.stage, error.error)


def unexpected_failure(clip: ClipRecord, error: Exception, recording: Recording, spec: PackingSpec) -> Failure:
    """Return the failure of a clip by an error that no decoder or parser raised.

    Raises:
        OSError: `error` comes from the machine, so no clip is to blame.
    """
    if is_of_the_machine(error):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    place = f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = f"{type(error).__name__}: {one_line(error, 200)}".removesuffix(": ")
    return Failure(clip.key, clip.split, spec.modalities[0], UNEXPECTED, f"{_name(recording)}: {text}{place}")


def _bounded(clip: ClipRecord) -> ClipRecord:
    """Return a clip whose stop is small enough to compute with; one that is not fails as `late_clip` after the pass."""
    far = clip.stop_s is not None and clip.stop_s > _FOREVER_S
    return replace(clip, stop_s=_FOREVER_S) if far else clip


def _name(recording: Recording) -> str:
    """Return the file name of a recording's first medium, or else its name."""
    paths = [recording.video_file, recording.frames, *(file.path for file in recording.media.values())]
    return next((path.name for path in paths if path is not None), recording.name)


class _Cutter:
    """The open media of one recording."""

    def __init__(self, recording: Recording, spec: PackingSpec, files: ExitStack) -> None:
        self._recording, self._spec = recording, spec
        sections = spec.sections()
        first, file = spec.modalities[0], None
        if recording.video_file is not None:
            file = files.enter_context(VideoFile(recording.usable(recording.video_file, first)))
        self._file = file
        self._sources: dict[str, Source] = {}
        self._makers = {}
        for name in spec.modalities:
            storage = MODALITIES[name].storage
            source = storage.open(recording, sections, files, file)
            if source is not None:
                self._sources[name] = source
            maker = storage.sink_maker(source, sections)
            if maker is not None:
                self._makers[name] = maker
        self._shown: VideoFile | NumberedFrames | None = None
        if self._makers or any(MODALITIES[name].storage.reads_pictures(sections[name]) for name in self._sources):
            if file is not None and file.video is not None:
                self._shown = file
            elif recording.frames is not None:
                self._shown = files.enter_context(NumberedFrames(recording.usable(recording.frames, first)))

    def pictures(self) -> Iterator[Outcome]:
        """Yield every clip with the members made of its frames, in the order in which the clips end."""
        recording = replace(self._recording, clips=tuple(_bounded(clip) for clip in self._recording.clips))
        if isinstance(self._shown, NumberedFrames):
            # The files of a clip are listed before the first is read: a wrong stop would make that list endless.
            late = [(clip, error) for clip in recording.clips if (error := self.late_clip(clip)) is not None]
            yield from late
            late_keys = {clip.key for clip, _ in late}
            recording = replace(recording, clips=tuple(c for c in recording.clips if c.key not in late_keys))
        yield from pass_over_pictures(recording, self._spec.video, self._makers, self._shown)

    def late_clip(self, clip: ClipRecord) -> MediaError | None:
        """Return the error of a clip that ends long after everything its recording has; None for any other clip.

        The end of a video file's pictures is known only after the pass.
        """
        end_s = self._end_s()
        name, moment_s = ("start", clip.start_s) if clip.stop_s is None else ("stop", clip.stop_s)
        if end_s is None or moment_s <= end_s + MOST_LATE_S:
            return None
        text = f"{name} {moment_s:.12g} s is after the end of {_name(self._recording)} at {end_s:.2f} s"
        fits = clip.start_s / 1000 < end_s and moment_s / 1000 <= end_s + MOST_LATE_S
        hint = ": are these milliseconds?" if fits else ""
        return MediaError(self._spec.modalities[0], "cut", text + hint)

    def _end_s(self) -> float | None:
        """Return the end of everything that the recording has, in seconds; None if no medium tells."""
        ends = [source.reach_s for source in self._sources.values()]
        if isinstance(self._shown, VideoFile):
            ends.append(self._shown.end_s)
        elif self._shown is not None:
            ends.append(min(self._shown.last / self._recording.nominal_fps, LONGEST_S))
        elif self._file is not None and self._file.video is not None and self._file.video.duration is not None:
            ends.append(min(float(self._file.video.duration * self._file.video.time_base), LONGEST_S))
        return max((end_s for end_s in ends if end_s is not None), default=None)

    def complete(self, clip: ClipRecord, pictures: CutPictures) -> CutClip:
        """Add the members that are cut from files of single modalities to those made of a clip's frames.

        Raises:
            MediaError: a file exists but cannot be read, or the clip has no modality at all.
        """
        if (late := self.late_clip(clip)) is not None:
            near_s = max(clip.start_s, self._end_s() or 0.0) + MOST_LATE_S
            for source in self._sources.values():  # damage, if that is why they end, says more
                source.cut(replace(clip, stop_s=near_s), near_s, pictures)
            raise late
        stored = dict(pictures.stored)
        stop_s = clip.stop_s if clip.stop_s is not None else pictures.stop_s
        if stop_s is None:
            ends = (source.end_s for source in self._sources.values())
            stop_s = next((end_s for end_s in ends if end_s is not None), None)
        for name, source in self._sources.items():
            member = source.cut(clip, stop_s, pictures)
            if member is not None:
                stored[name] = member
        if not stored:
            first = self._spec.modalities[0]
            raise MediaError(first, "cut", f"no modality at {clip.start_s:.2f} s: nothing to store")
        for name, (_, described) in stored.items():
            try:
                MODALITIES[name].description.parse(described)
            except ValueError as error:  # a bug of the modality: nobody could read what it writes
                raise TypeError(f"modality '{name}': its storage describes a member by a wrong {error}") from None
        payloads = {name: data for name, (data, _) in stored.items()}
        return CutClip(clip, payloads, {name: described for name, (_, described) in stored.items()}, stop_s)
