"""The storage of video: the pictures of a clip as H.264 in MP4."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from av.video.reformatter import Colorspace

from karmma_dist.modalities.encode import VideoEncoder, rounded
from karmma_dist.modalities.storage import MediaStream, PictureSink, Sections, SinkMaker, Source, Storage, Stored
from karmma_dist.modalities.video import VideoSpec


class VideoSink(PictureSink):
    """A sink that encodes the pictures of one clip."""

    def __init__(self, width: int, height: int, fps: Fraction, colorspace: Colorspace, spec: VideoSpec) -> None:
        self._size, self._fps = (width, height), fps
        self._encoder = VideoEncoder(width, height, fps, spec.crf, spec, colorspace)

    def add(self, picture: np.ndarray) -> None:
        """Append a picture, uint8 (3H/2, W) I420."""
        self._encoder.add(picture)

    def finish(self) -> Stored:
        """Return the member."""
        return self._encoder.finish(), {
            "width": self._size[0], "height": self._size[1], "fps": rounded(self._fps),
            "num_frames": self._encoder.num_frames,
        }  # fmt: skip


class VideoStorage(Storage):
    """The storage of video."""

    settings = VideoSpec
    media_stream, has_clip_length = MediaStream.PICTURES, True

    def sink_maker(self, source: Source | None, sections: Sections) -> SinkMaker:
        """Return the maker of sinks that encode the pictures."""
        spec = sections["video"]
        return lambda width, height, fps, colorspace: VideoSink(width, height, fps, colorspace, spec)


STORAGE = VideoStorage()
