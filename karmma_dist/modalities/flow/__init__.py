"""Optical flow: displacements between frames, stored as one gray H.264 video, u above v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from karmma_dist.modalities.contract import Breakage, Description, Modality
from karmma_dist.modalities.video import (
    BLURS,
    CAMERA,
    GRAIN,
    GRAINS,
    SIGMA,
    SPAN,
    SPANS,
    VIDEO,
    VideoDescription,
    VideoInput,
)


@dataclass(frozen=True)
class FlowDescription(VideoDescription):
    """The stored frames of flow: width and height are those of u alone."""

    bound: float
    """Pixels per frame that are stored as 0 and 255; no motion is 127.5."""
    source: str
    """`computed` or `files`."""

    def problem_beside(self, others: Mapping[str, Description]) -> str:
        """Return where flow that was computed has not as many frames as the video it was computed from."""
        video = others.get(VIDEO.name)
        if self.source == "computed" and isinstance(video, VideoDescription) and video.num_frames != self.num_frames:
            return f"{self.num_frames} frames of flow computed from {video.num_frames} of video"
        return ""


FLOW = Modality(
    name="flow",
    letter="F",
    member="flow.mp4",
    layout="float (N, 3, frames, height, width): u, v, 0, by inputs.video.flow_scale",
    settings=VideoInput,
    section="video",
    description=FlowDescription,
    decoder_part="karmma_dist.modalities.flow.decode:DECODER",
    tensors_part="karmma_dist.modalities.flow.tensor:TENSORS",
    drawing_part="karmma_dist.modalities.flow.draw:DRAWING",
    breaker_part="karmma_dist.modalities.flow.breaks:BREAKER",
    breakages=(
        Breakage(CAMERA, "frozen", "still", SPANS, SPAN, is_random=True),
        Breakage(CAMERA, "black", "still", SPANS, SPAN, is_random=True),
        Breakage(CAMERA, "blur", "blur", BLURS, SIGMA, is_random=False),
        Breakage(CAMERA, "noise", "noise", GRAINS, GRAIN, is_random=True),
        Breakage("flow", "frozen", "still", SPANS, SPAN, is_random=True),
        Breakage("flow", "blur", "blur", BLURS, SIGMA, is_random=False),
        Breakage("flow", "noise", "noise", GRAINS, GRAIN, is_random=True),
    ),
)
