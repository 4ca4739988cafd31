"""Cuts one recording into its clips, each complete or failed, in one pass over its frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import av
import cv2

from karmma_dist.errors import one_line
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.numbered_frames import NumberedFrames
from karmma_dist.modalities.pictures import CutPictures, Outcome, pass_over_pictures
from karmma_dist.modalities.recording import ClipRecord, MediaError, Recording, media_error
from karmma_dist.modalities.storage import Source
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.packing.records import CutClip, Failure
from karmma_dist.packing.spec import PackingSpec


def cut_recording(recording: Recording, spec: PackingSpec) -> Iterator[CutClip | Failure]:
    """Yield each clip of a recording as soon as it is complete, or the reason why it fails.

    A clip fails if any of its existing media fails; media that do not exist are absent from its payloads.

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


def _cut_all(recording: Recording, spec: PackingSpec) -> Iterator[CutClip | Failure]:
    with ExitStack() as files:
        cutter = _Cutter(recording, spec, files)
        for clip, pictures in cutter.pictures():
            if isinstance(pictures, MediaError):
                yield _failure(clip, pictures)
                continue
            try:
                yield cutter.complete(clip, pictures)
            except MediaError as error:
                yield _failure(clip, error)


def _failure(clip: ClipRecord, error: MediaError) -> Failure:
    return Failure(clip.key, clip.split, error.modality, error.stage, error.error)


class _Cutter:
    """The open media of one recording."""

    def __init__(self, recording: Recording, spec: PackingSpec, files: ExitStack) -> None:
        self._recording, self._spec = recording, spec
        sections = spec.sections()
        file = files.enter_context(VideoFile(recording.video_file)) if recording.video_file else None
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
        if self._makers or any(MODALITIES[name].storage.needs_pictures for name in self._sources):
            if file is not None and file.video is not None:
                self._shown = file
            elif recording.frames is not None:
                self._shown = files.enter_context(NumberedFrames(recording.frames))

    def pictures(self) -> Iterator[Outcome]:
        """Yield every clip with the members made of its frames, in the order in which the clips end."""
        return pass_over_pictures(self._recording, self._spec.video, self._makers, self._shown)

    def complete(self, clip: ClipRecord, pictures: CutPictures) -> CutClip:
        """Add the members that are cut from files of single modalities to those made of a clip's frames.

        Raises:
            MediaError: a file exists but cannot be read, or the clip has no modality at all.
        """
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
        payloads = {name: data for name, (data, _) in stored.items()}
        return CutClip(clip, payloads, {name: described for name, (_, described) in stored.items()}, stop_s)
