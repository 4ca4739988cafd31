"""One clip's stored pictures as they come: encodes the video, and the flow between them when it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.reformatter import Colorspace

from karmma_dist.packing.flow import ComputedFlow
from karmma_dist.packing.media import VideoEncoder, rounded
from karmma_dist.packing.spec import FlowSpec, VideoSpec
from karmma_dist.packing.yuv import size_of


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
