"""One clip's stored pictures as they come: encodes the video, and the flow between them when it is computed.

One clip while the pass over its movie goes on: which picture is stored for which of its moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.reformatter import Colorspace

from karmma_dist.modalities.encode import VideoEncoder, num_frames_between, rounded
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.flow.store import ComputedFlow
from karmma_dist.modalities.recording import ClipRecord, MediaError
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.modalities.video_file import Movie, Picture
from karmma_dist.modalities.yuv import size_of


class ClipPictures:
    """Pictures of one clip -> its video and computed flow."""

    def __init__(self, fps: Fraction, video: VideoSpec, flow: FlowSpec | None) -> None:
        """`flow` None: no flow is computed."""
        self.num_frames = 0
        self._fps, self._video_spec, self._flow_spec = fps, video, flow
        self._video: VideoEncoder | None = None
        self._flow: ComputedFlow | None = None
        self._size = (0, 0)

    def add(self, picture: np.ndarray, colorspace: Colorspace) -> None:
        """Append a stored picture, uint8 (3H/2, W) I420; all of one size and colour space."""
        if self.num_frames == 0:
            self._open(*size_of(picture), colorspace)
        self.num_frames += 1
        if self._video is not None:
            self._video.add(picture)
        if self._flow is not None:
            self._flow.add(picture)

    def finish(self) -> tuple[dict[str, bytes], dict[str, dict[str, Any]]]:
        """Payload and description per modality."""
        payloads: dict[str, bytes] = {}
        described: dict[str, dict[str, Any]] = {}
        if self._video is not None:
            payloads["video"] = self._video.finish()
            described["video"] = {
                "width": self._size[0], "height": self._size[1], "fps": rounded(self._fps),
                "num_frames": self._video.num_frames,
            }  # fmt: skip
        if self._flow is not None:
            payloads["flow"], described["flow"] = self._flow.finish()
        return payloads, described

    def _open(self, height: int, width: int, colorspace: Colorspace) -> None:
        self._size = (width, height)
        if self._video_spec.source != "none":
            spec = self._video_spec
            self._video = VideoEncoder(width, height, self._fps, spec.crf, spec, colorspace)
        if self._flow_spec is not None:
            self._flow = ComputedFlow(width, height, self._fps, self._flow_spec, self._video_spec)


@dataclass(slots=True)
class CutPictures:
    """What a pass over the pictures gave for one clip."""

    payloads: dict[str, bytes] = field(default_factory=dict)
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_size: tuple[int, int] | None = None
    """Width and height of the upright source."""
    num_source_frames: int = 0
    stop_s: float | None = None
    """End of the last picture."""


EARLY_S = 2e-3
"""A frame this much after a stored frame's moment counts as shown: many containers round to milliseconds."""


class MovieClip:
    """A clip while the pass goes over it: which of its stored frames come next."""

    def __init__(self, clip: ClipRecord, fps: Fraction, video: VideoSpec, computed_flow: FlowSpec | None) -> None:
        self.clip, self._fps = clip, float(fps)
        self._stored = ClipPictures(fps, video, computed_flow)
        self._wanted = None if clip.stop_s is None else num_frames_between(clip.start_s, clip.stop_s, fps)
        self._first_s = clip.start_s
        self._size: tuple[int, ...] | None = None
        self._problem: MediaError | None = None

    def show(self, picture: Picture, until_s: float) -> None:
        """`picture` is on until `until_s`: store it for every moment of the clip before that."""
        while not self.done and self.clip.start_s + self._stored.num_frames / self._fps < until_s - EARLY_S:
            image = picture.image()
            if self._stored.num_frames == 0:
                self._first_s, self._size = picture.time_s, image.shape
            elif image.shape != self._size:
                self._problem = MediaError("video", "decode", f"picture size changes at {picture.time_s:.2f} s")
                return
            self._stored.add(image, picture.colorspace)

    @property
    def done(self) -> bool:
        """No picture after this one is needed."""
        return self._problem is not None or self._stored.num_frames == self._wanted

    def finish(self, movie: Movie, size: tuple[int, int] | None) -> CutPictures | MediaError:
        """The clip's pictures, or what is wrong with them."""
        try:
            if self._problem is not None:
                raise self._problem
            movie.damage.check("video", *self._span(movie))
            if self._stored.num_frames == 0:
                text = f"starts at {self.clip.start_s:.2f} s, the video ends at {movie.end_s:.2f} s"
                raise MediaError("video", "cut", text)
        except MediaError as error:
            return error
        stop_s = self.clip.start_s + self._stored.num_frames / self._fps
        return CutPictures(*self._stored.finish(), size, movie.num_frames, round(stop_s, 6))

    def _span(self, movie: Movie) -> tuple[float, float]:
        """From the first picture shown to the last moment stored, or to the clip's end when the movie ends before."""
        if self.done:
            return self._first_s, self.clip.start_s + (self._stored.num_frames - 1) / self._fps
        return self._first_s, max(movie.end_s, self.clip.stop_s or 0.0)


def show_to_all(
    active: list[MovieClip], picture: Picture, until_s: float, movie: Movie, size: tuple[int, int] | None
) -> Iterator[tuple[ClipRecord, CutPictures | MediaError]]:
    """Show a picture to all active clips; yield and remove those that are done."""
    for cut in list(active):
        cut.show(picture, until_s)
        if cut.done:
            active.remove(cut)
            yield cut.clip, cut.finish(movie, size)
