"""Detections: boxes of hands and objects in each frame, stored as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from karmma_dist.modalities.contract import Breakage, Description, Modality
from karmma_dist.settings import Positive, Settings

NUM_VALUES = 6
"""Number of values of a stored box: x0, y0, x1, y1 in [0, 1], category, score."""

HAND, OBJECT = 1, 2
"""Categories of stored boxes; 0 means no box."""


class DetectionsInput(Settings):
    """Detected boxes of hands and objects."""

    num_frames: Positive = 32
    """Frames whose boxes are taken, at the same times as the video's [ours]."""
    max_boxes: Positive = 14
    """Boxes kept per frame, best score first [Radevski]."""


class DetectionsSpec(Settings):
    """Boxes of hands and objects, one list per video frame."""

    source: Literal["auto", "hand_objects", "none"] = "auto"
    """`auto`: the annotated boxes of the dataset, if it has any. `hand_objects`: the published detections of
    Epic-Kitchens-100, a file per recording. `none`: do not store boxes."""
    max_boxes: Positive = 14
    """Boxes kept per frame, hands first [STLT's code: 14]."""


@dataclass(frozen=True)
class DetectionsDescription(Description):
    """Number of frames with an entry, and of all their boxes."""

    num_frames: int
    num_boxes: int = field(metadata={"above": -1})


DETECTIONS = Modality(
    name="detections",
    letter="D",
    member="detections.json",
    array="boxes",
    layout="float (N, frames, boxes, 6): x0 y0 x1 y1 category score",
    settings=DetectionsInput,
    section="detections",
    description=DetectionsDescription,
    storage_part="karmma_dist.modalities.detections.store:STORAGE",
    decoder_part="karmma_dist.modalities.detections.decode:DECODER",
    tensors_part="karmma_dist.modalities.detections.tensor:TENSORS",
    drawing_part="karmma_dist.modalities.detections.draw:DRAWING",
    breaker_part="karmma_dist.modalities.detections.breaks:BREAKER",
    breakages=(
        Breakage(
            "detections", "dropped", "dropped", (0.10, 0.25, 0.50, 0.75, 0.90), "{:.0%} of the boxes", is_random=True
        ),
    ),
)
