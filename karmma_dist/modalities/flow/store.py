"""The storage of optical flow: computed between stored frames or read from files, stored as one gray video, u above v.

In both cases the stored unit is that of the specification: `bound` pixels (at the stored size, per flow frame) become 0
and 255, no motion is 127.5.
"""

from __future__ import annotations

import io
from contextlib import ExitStack
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.modalities.encode import Geometry, VideoEncoder, rounded
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.numbered_frames import NumberedFrames, numbers_shown
from karmma_dist.modalities.recording import ClipRecord, MediaError, Recording
from karmma_dist.modalities.storage import MediaStream, PictureSink, Sections, SinkMaker, Source, Storage, Stored
from karmma_dist.modalities.video import VIDEO, VideoSpec
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.modalities.yuv import gray

if TYPE_CHECKING:
    from karmma_dist.modalities.pictures import CutPictures

_MOST_COMPARED = 16
"""Largest number of a clip's frames whose stored flow is compared with its source."""


def check_method(flow: FlowSpec) -> None:
    """Refuse a method that is not installed.

    Raises:
        UserError: the method is TV-L1 and OpenCV lacks it.
    """
    if flow.method == "tvl1" and flow.source in ("auto", "compute") and not hasattr(cv2, "optflow"):
        raise UserError(
            "flow.method tvl1: this OpenCV lacks it: pip uninstall opencv-python-headless, then "
            "pip install 'karmma-dist[tvl1]' (or choose flow.method=dis)"
        )


def flow_between(method: str) -> Any:
    """Return an object whose `calc(previous_HW, next_HW, None)` gives flow of gray pictures, float32 (H, W, 2), pixels.

    `dis`: dense inverse search [Kroeger et al. 2016]; `tvl1`: total variation with L1 norm [Zach et al. 2007].
    """
    if method == "tvl1":
        return cv2.optflow.DualTVL1OpticalFlow_create()  # type: ignore[attr-defined]
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)


def flow_of_files(gray_HW2: np.ndarray, bound: float) -> np.ndarray:
    """Turn published flow, uint8 (H, W, 2), where 0 and 255 are -bound and bound, into pixels, float32 (H, W, 2)."""
    pixels: np.ndarray = (gray_HW2.astype(np.float32) - 127.5) * np.float32(bound / 127.5)
    return pixels


def quantise_flow(flow_HW2: np.ndarray, bound: float) -> np.ndarray:
    """Quantise flow in pixels, float32 (H, W, 2), to uint8 (2H, W), u above v: round(127.5 + 127.5 * flow / bound).

    Values beyond the bound are clipped.
    """
    stacked = np.concatenate([flow_HW2[..., 0], flow_HW2[..., 1]])
    quantised: np.ndarray = np.clip(np.rint(127.5 + 127.5 / bound * stacked), 0, 255).astype(np.uint8)
    return quantised


def stored_flow(picture_2HW: np.ndarray, bound: float) -> np.ndarray:
    """Turn a stored picture, uint8 (2H, W), u above v, into flow in pixels, float32 (H, W, 2)."""
    half = picture_2HW.shape[0] // 2
    return flow_of_files(np.dstack([picture_2HW[:half], picture_2HW[half:]]), bound)


class FlowEncoder:
    """An encoder of one clip's flow, which also measures the error of the stored flow."""

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


class ComputedFlow(PictureSink):
    """A sink that computes flow between one clip's stored pictures as they arrive."""

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
        """Return bytes and description. The last flow is repeated, so that every picture has a flow frame."""
        self._encoder.add(self._motion)
        data, described = self._encoder.finish()
        return data, described | {"source": "computed", "method": self._method}


class FlowFiles(Source):
    """A recording's numbered files of flow."""

    def __init__(
        self, frames: NumberedFrames, recording: Recording, sections: Sections, video_file: VideoFile | None
    ) -> None:
        self._frames, self._flow, self._video = frames, sections["flow"], sections[VIDEO.name]
        self._nominal_fps, self._per_flow = recording.nominal_fps, recording.media["flow"].rate
        self._video_file = video_file

    @property
    def reach_s(self) -> float:
        """End of the last file in seconds from the start of the recording."""
        return self._frames.last * self._per_flow / self._nominal_fps

    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored:
        """Store the files that show the clip, in the specification's unit."""
        per_flow, frames = self._per_flow, self._frames
        start = (clip.start_frame - 1) // per_flow + 1
        stop = None if clip.stop_frame is None else (clip.stop_frame - 2) // per_flow + 2
        fps = Fraction(self._nominal_fps, per_flow)
        encoder, geometry, bound, size = None, None, 0.0, None
        numbers = numbers_shown(clip, frames, start, stop, fps, fps)
        for number in self._one_per_picture(clip, numbers, pictures):
            u_HW, v_HW = frames.read(number, "u"), frames.read(number, "v")
            if geometry is None:
                size = u_HW.shape
                geometry = Geometry.of(size[1], size[0], self._video, "flow")
                encoder = FlowEncoder(geometry.width, geometry.height, fps, self._flow, self._video)
                bound = self._flow.files_bound * geometry.scaled_width / size[1]
            if not size == u_HW.shape == v_HW.shape:
                raise MediaError("flow", "decode", f"{frames.path.name}: frames of the clip differ in size")
            assert encoder is not None
            encoder.add(flow_of_files(np.dstack([geometry.shrink(u_HW), geometry.shrink(v_HW)]), bound))
        assert encoder is not None
        data, described = encoder.finish()
        return data, described | {"source": "files"}

    def _one_per_picture(self, clip: ClipRecord, numbers: list[int], pictures: CutPictures) -> list[int]:
        """Return one file number per picture if the recording is one clip with a video file at the nominal frame rate.

        The i-th file belongs to the i-th picture; the last picture may lack its file. Otherwise the numbers are
        returned unchanged.

        Raises:
            MediaError: the numbers of files and pictures differ by more than one.
        """
        file, nominal = self._video_file, self._nominal_fps
        has_video = file is not None and file.video is not None and pictures.num_source_frames
        if clip.start_frame or not has_video or file is None or abs(float(file.fps) - nominal) > 0.5:
            return numbers
        num_frames = pictures.num_source_frames
        if not num_frames - 1 <= len(numbers) <= num_frames + 1:
            counted = f"{self._frames.path.name} has {len(numbers)} frames of flow for {num_frames} of video"
            raise MediaError(
                "flow", "cut", f"{counted} at {nominal} frames/s: extract it again, or set frames_per_second"
            )
        return [*numbers, numbers[-1]][:num_frames]


class FlowStorage(Storage):
    """The storage of flow: read from files, or computed between stored pictures."""

    settings = FlowSpec
    media_stream, media_source = MediaStream.PICTURES, "compute"

    def check_settings(self, settings: FlowSpec) -> None:
        """Check that the method is installed."""
        check_method(settings)

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> FlowFiles | None:
        """Open the recording's flow files if it has any and the settings use them."""
        media_file = recording.media.get("flow")
        if media_file is None or sections["flow"].source not in ("auto", "files"):
            return None
        frames = files.enter_context(NumberedFrames(recording.usable(media_file.path, "flow"), "flow"))
        return FlowFiles(frames, recording, sections, video_file)

    def sink_maker(self, source: Source | None, sections: Sections) -> SinkMaker | None:
        """Return the maker of computed flow if the settings ask for it, or if the recording has no flow files."""
        flow, video = sections["flow"], sections[VIDEO.name]
        if flow.source == "compute" or (flow.source == "auto" and source is None):
            return lambda width, height, fps, _: ComputedFlow(width, height, fps, flow, video)
        return None


STORAGE = FlowStorage()
