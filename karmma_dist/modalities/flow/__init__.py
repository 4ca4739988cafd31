"""Optical flow: displacements between frames, stored as one gray H.264 video, u above v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

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
    Crf,
    VideoDescription,
    VideoInput,
)
from karmma_dist.settings import Settings


class FlowSpec(Settings):
    """Optical flow, stored as one gray H.264 video of the same region and size as the video: u above v."""

    source: Literal["auto", "files", "compute", "none"] = "auto"
    """`files`: the raw dataset's flow frames. `compute`: between consecutive stored frames.
    `auto`: files if the dataset has any, else computed. `none`: do not store flow."""
    method: Literal["dis", "tvl1"] = "dis"
    """Method of computing flow. `dis`: dense inverse search, fast. `tvl1`: the method of Epic-Kitchens' published
    flow, 160 times slower; needs the extra `tvl1`."""
    bound: Annotated[float, Field(gt=0)] = 8.0
    """Displacement in pixels (at the stored size, per flow frame) that is stored as 0 and 255; no motion is 127.5."""
    files_bound: Annotated[float, Field(gt=0)] = 8.0
    """Displacement in pixels (at the size of the files) that 0 and 255 mean in the raw dataset's flow files."""
    crf: Crf = 20
    """x264's constant rate factor."""


@dataclass(frozen=True)
class FlowDescription(VideoDescription):
    """The stored frames of flow: width and height are those of u alone."""

    bound: float
    """Displacement in pixels per frame that is stored as 0 and 255; no motion is 127.5."""
    source: str
    """`computed` or `files`."""

    def problem_beside(self, others: Mapping[str, Description]) -> str:
        """Return a problem if computed flow and the video it was computed from differ in their number of frames."""
        video = others.get(VIDEO.name)
        if self.source == "computed" and isinstance(video, VideoDescription) and video.num_frames != self.num_frames:
            return f"{self.num_frames} frames of flow computed from {video.num_frames} of video"
        return ""


FLOW = Modality(
    name="flow",
    letter="F",
    member="flow.mp4",
    array="frames",
    layout="float (N, 3, frames, height, width): u, v, 0, by inputs.video.flow_scale",
    settings=VideoInput,
    section="video",
    description=FlowDescription,
    storage_part="karmma_dist.modalities.flow.store:STORAGE",
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
