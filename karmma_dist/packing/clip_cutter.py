"""One recording -> its clips, each complete or failed. One pass over the pictures feeds every clip that shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np

from karmma_dist.errors import one_line
from karmma_dist.packing.boxes import detections_json, read_boxes
from karmma_dist.packing.flow import FlowEncoder, flow_of_files
from karmma_dist.packing.hdf5_sound import read_sound
from karmma_dist.packing.media import SAMPLE_RATE, Geometry, encode_flac, num_frames_between
from karmma_dist.packing.movie import Movie, Picture, Shrinker, quarter_turns
from karmma_dist.packing.movie_clip import EARLY_S, MovieClip, show_to_all
from karmma_dist.packing.numbered_frames import NumberedFrames
from karmma_dist.packing.pictures import ClipPictures, CutPictures
from karmma_dist.packing.records import ClipRecord, CutClip, Failure, MediaError, Recording, media_error
from karmma_dist.packing.sound import Sound
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.yuv import ToI420


def cut_recording(recording: Recording, spec: PackingSpec) -> Iterator[CutClip | Failure]:
    """Yield each clip of a recording as soon as it is complete, or the reason why it cannot be.

    A clip fails when any of its existing media does; what does not exist is absent from its payloads.

    Raises:
        OSError: the machine fails, and no medium: see `records.is_of_the_machine`.
    """
    left = {clip.key: clip for clip in recording.clips}
    try:
        for cut in _cut_all(recording, spec):
            del left[cut.key if isinstance(cut, Failure) else cut.record.key]
            yield cut
    except MediaError as error:
        yield from (_failure(clip, error) for clip in left.values())
    except (av.error.FFmpegError, cv2.error) as error:
        # Media that break their decoder in an unforeseen way cost their own recording, not the run.
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
        self.recording, self.spec = recording, spec
        self.movie = files.enter_context(Movie(recording.movie)) if recording.movie else None
        self.flow_frames = None
        if recording.flow_frames and spec.flow.source in ("auto", "files"):
            self.flow_frames = files.enter_context(NumberedFrames(recording.flow_frames, "flow"))
        computes = spec.flow.source == "compute" or (spec.flow.source == "auto" and self.flow_frames is None)
        self.computed_flow = spec.flow if computes else None
        has_movie_video = self.movie is not None and self.movie.video is not None
        wants_pictures = spec.video.source != "none" or computes or recording.boxes is not None
        self.from_movie = has_movie_video and wants_pictures
        self.rgb_frames = None
        if not has_movie_video and recording.rgb_frames and wants_pictures:
            self.rgb_frames = files.enter_context(NumberedFrames(recording.rgb_frames, "video"))
        self.sound = self._sound()

    def _sound(self) -> Sound | None:
        source, recording = self.spec.audio.source, self.recording
        if "audio" not in self.spec.modalities:
            return None
        if self.movie is not None and source != "hdf5" and (sound := self.movie.sound()) is not None:
            return sound
        if recording.sound_hdf5 is not None and source != "movie":
            return read_sound(recording.sound_hdf5, recording.name, recording.sound_hdf5_rate)
        return None

    def pictures(self) -> Iterator[tuple[ClipRecord, CutPictures | MediaError]]:
        """Yield every clip with its video and computed flow, in the order in which the clips end."""
        if self.from_movie:
            yield from self._pictures_of_movie()
        elif self.rgb_frames is not None:
            for clip in self.recording.clips:
                try:
                    yield clip, self._pictures_of_frames(clip, self.rgb_frames)
                except MediaError as error:
                    yield clip, error
        else:
            yield from ((clip, CutPictures()) for clip in self.recording.clips)

    def _pictures_of_movie(self) -> Iterator[tuple[ClipRecord, CutPictures | MediaError]]:
        assert self.movie is not None
        movie, shrinker, size, decoded_size = self.movie, None, None, (0, 0)
        fps = min(movie.fps, Fraction(self.spec.video.max_fps).limit_denominator(1001))
        waiting = sorted(self.recording.clips, key=lambda clip: (clip.start_s, clip.key), reverse=True)
        active: list[MovieClip] = []
        shown: Picture | None = None
        for time_s, frame in movie.frames():
            if shown is not None:
                while waiting and waiting[-1].start_s < time_s - EARLY_S:
                    active.append(MovieClip(waiting.pop(), fps, self.spec.video, self.computed_flow))
                yield from show_to_all(active, shown, time_s, movie, size)
                if not waiting and not active:
                    return
            if shrinker is None or (frame.width, frame.height) != decoded_size:
                turns, decoded_size = quarter_turns(frame), (frame.width, frame.height)
                size = decoded_size[::-1] if turns % 2 else decoded_size
                try:
                    shrinker = Shrinker(Geometry.of(*size, self.spec.video), turns, frame.colorspace)
                except MediaError as error:
                    yield from ((clip, error) for clip in [*waiting, *(cut.clip for cut in active)])
                    return
            shown = Picture(frame, time_s, shrinker)
        active += [MovieClip(clip, fps, self.spec.video, self.computed_flow) for clip in reversed(waiting)]
        if shown is not None:
            yield from show_to_all(active, shown, movie.end_s, movie, size)
        yield from ((cut.clip, cut.finish(movie, size)) for cut in active)

    def _pictures_of_frames(self, clip: ClipRecord, frames: NumberedFrames) -> CutPictures:
        nominal = self.recording.nominal_fps
        fps = min(Fraction(nominal), Fraction(self.spec.video.max_fps).limit_denominator(1001))
        pictures = ClipPictures(fps, self.spec.video, self.computed_flow)
        size, geometry, to_i420 = None, None, ToI420()
        numbers = _numbers(clip, frames, clip.start_frame, clip.stop_frame, Fraction(nominal), fps)
        for number in numbers:
            picture = frames.read(number)
            if geometry is None:
                size = (picture.shape[1], picture.shape[0])
                geometry = Geometry.of(*size, self.spec.video)
            elif size != (picture.shape[1], picture.shape[0]):
                raise MediaError("video", "decode", f"{frames.path.name}: frames of the clip differ in size")
            pictures.add(to_i420.of_rgb(geometry.shrink(picture)), to_i420.colorspace)
        return CutPictures(*pictures.finish(), size, len(numbers))

    def complete(self, clip: ClipRecord, pictures: CutPictures) -> CutClip:
        """Add flow files, sound and boxes to a clip's pictures.

        Raises:
            MediaError: any of them exists and cannot be read, or the clip has no modality at all.
        """
        payloads, described = pictures.payloads, pictures.described
        stop_s = clip.stop_s if clip.stop_s is not None else pictures.stop_s
        if stop_s is None and self.sound is not None:
            stop_s = self.sound.end_s
        if self.flow_frames is not None:
            payloads["flow"], described["flow"] = self._flow_of_files(clip, self.flow_frames, pictures)
        if self.sound is not None and stop_s is not None:
            samples = self.sound.cut(clip.start_s, stop_s)
            if samples is not None:
                payloads["audio"] = encode_flac(samples)
                described["audio"] = {"sample_rate": SAMPLE_RATE, "num_samples": len(samples)}
        if clip.boxes is not None:
            payloads["detections"], described["detections"] = self._detections(clip, pictures)
        if not payloads:
            raise MediaError(self.spec.modalities[0], "cut", f"no modality at {clip.start_s:.2f} s: nothing to store")
        return CutClip(clip, payloads, described, stop_s)

    def _flow_of_files(
        self, clip: ClipRecord, frames: NumberedFrames, pictures: CutPictures
    ) -> tuple[bytes, dict[str, Any]]:
        per_flow = self.recording.rgb_frames_per_flow_frame
        start = (clip.start_frame - 1) // per_flow + 1
        stop = None if clip.stop_frame is None else (clip.stop_frame - 2) // per_flow + 2
        fps = Fraction(self.recording.nominal_fps, per_flow)
        spec, encoder, geometry, bound, size = self.spec, None, None, 0.0, None
        numbers = _numbers(clip, frames, start, stop, fps, fps)
        for number in self._one_per_picture(clip, frames, numbers, pictures):
            u_HW, v_HW = frames.read(number, "u"), frames.read(number, "v")
            if geometry is None:
                size = u_HW.shape
                geometry = Geometry.of(size[1], size[0], spec.video, "flow")
                encoder = FlowEncoder(geometry.width, geometry.height, fps, spec.flow, spec.video)
                bound = spec.flow.files_bound * geometry.scaled_width / size[1]
            if not size == u_HW.shape == v_HW.shape:
                raise MediaError("flow", "decode", f"{frames.path.name}: frames of the clip differ in size")
            assert encoder is not None
            encoder.add(flow_of_files(np.dstack([geometry.shrink(u_HW), geometry.shrink(v_HW)]), bound))
        assert encoder is not None
        data, described = encoder.finish()
        return data, described | {"source": "files"}

    def _one_per_picture(
        self, clip: ClipRecord, frames: NumberedFrames, numbers: list[int], pictures: CutPictures
    ) -> list[int]:
        """In a recording that is one clip, the i-th flow file belongs to the i-th picture; the last may lack its own.

        Raises:
            MediaError: there are more or fewer files than that, at the frame rate of the pictures.
        """
        movie, nominal = self.movie, self.recording.nominal_fps
        if clip.start_frame or not self.from_movie or movie is None or abs(float(movie.fps) - nominal) > 0.5:
            return numbers
        num = pictures.num_source_frames
        if not num - 1 <= len(numbers) <= num + 1:
            there = f"{frames.path.name} has {len(numbers)} frames of flow for {num} of video at {nominal} frames/s"
            raise MediaError("flow", "cut", f"{there}: extract it again, or set frames_per_second")
        return [*numbers, numbers[-1]][:num]

    def _detections(self, clip: ClipRecord, pictures: CutPictures) -> tuple[bytes, dict[str, Any]]:
        assert self.recording.boxes is not None
        assert clip.boxes is not None
        if pictures.source_size is None:
            raise MediaError("detections", "parse", "no picture to take the boxes' scale from")
        frames = read_boxes(self.recording.boxes, clip.boxes)
        data, num_boxes = detections_json(
            frames, *pictures.source_size, pictures.num_source_frames, self.spec.detections.max_boxes
        )
        return data, {"num_frames": pictures.num_source_frames, "num_boxes": num_boxes}


def _numbers(
    clip: ClipRecord, frames: NumberedFrames, start: int, stop: int | None, nominal: Fraction, fps: Fraction
) -> list[int]:
    """File numbers that show the clip at `fps`: the first by its number, then as many as a movie's cut would store.

    A clip of an untrimmed recording lasts from its start to its stop in seconds, as in a movie, so that either source
    gives as many frames; a clip that is its whole recording lasts as long as there are files.

    Raises:
        MediaError: the clip lies outside of the files.
    """
    there = frames.clamped(start, stop)
    stop_s = clip.start_s + len(there) / float(nominal) if clip.stop_s is None else clip.stop_s
    wanted = [
        there.start + int(place * nominal / fps) for place in range(num_frames_between(clip.start_s, stop_s, fps))
    ]
    return [number for number in wanted if number <= frames.last]
