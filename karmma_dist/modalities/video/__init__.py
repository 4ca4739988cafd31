"""Video: RGB pictures, stored as H.264 in MP4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.modalities.contract import Breakage, Description, Modality, Pictures
from karmma_dist.settings import Positive, Settings

Fraction = Annotated[float, Field(ge=0, le=1)]
Crf = Annotated[int, Field(ge=0, le=51)]


class VideoInput(Settings):
    """The frames of video and flow that a model sees, and their resizing and cropping."""

    num_frames: Positive = 32
    """Frames taken from a clip [fit]."""
    sampling: Literal["segments", "dense"] = "segments"
    """`segments`: one frame from each of num_frames equal parts of the clip; `dense`: a window with a stride [ours]."""
    stride: Positive = 2
    """Stored frames from one sampled frame to the next in dense sampling."""
    short_side: Positive = 256
    """Frames are resized so that their short side has this many pixels, before cropping [ours]."""
    crop: Positive = 224
    """Side of the square crop: random in training, centred in evaluation [fit]."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Strength of the colour jitter in training: brightness, contrast and saturation within 1 +- jitter [ours]."""
    flow_scale: Literal["centred", "imagenet"] = "centred"
    """Scaling of flow: `centred`: (u - 1/2) / 0.226, the third channel 0 [ours]; `imagenet`: the picture (u, v, 0)
    normalised like video, the third channel included (-1.80) [Radevski], as encoders trained on video expect."""
    horizontal_flip: bool = False
    """True if half of the training clips are mirrored. Leave off if classes of the dataset depend on left and right."""

    @model_validator(mode="after")
    def _crop_fits(self) -> VideoInput:
        if self.crop > self.short_side:
            raise ValueError(f"crop {self.crop} is larger than short_side {self.short_side}")
        return self


CAMERA = "camera"
"""Name of the sensor behind video and flow: if it breaks, both modalities break together."""

SPANS = (0.2, 0.4, 0.6, 0.8, 1.0)
BLURS = (0.01, 0.02, 0.04, 0.06, 0.10)
GRAINS = (0.05, 0.10, 0.15, 0.25, 0.40)
"""Amounts per severity for pictures: shares of the clip (spans), the picture's side (blurs), the range (grains)."""

SPAN = "{:.0%} of the clip, from a random moment on"
SIGMA = "a Gaussian of {:.1%} of the picture's side (standard deviation)"
GRAIN = "Gaussian noise of {:.0%} of the range (standard deviation)"


class VideoSpec(Settings):
    """Storage of frames: H.264, constant frame rate, closed groups of pictures, no B-frames."""

    source: Literal["auto", "none"] = "auto"
    """`auto`: the recording's video file, else its numbered frames. `none`: do not store video."""
    short_side: Annotated[int, Field(ge=16)] = 256
    """Short side in pixels; smaller sources keep their size."""
    max_fps: Annotated[float, Field(gt=0)] = 30.0
    """Largest stored frame rate; sources with a lower rate keep theirs."""
    region: tuple[Fraction, Fraction, Fraction, Fraction] = (0.0, 0.0, 1.0, 1.0)
    """Part of the picture that is kept, before resizing: left, top, right, bottom as fractions of the frame."""
    crf: Crf = 23
    """x264's constant rate factor: smaller values give better quality and larger files."""
    gop: Positive = 15
    """Frames from one key frame to the next: short groups make single frames cheap to decode."""
    preset: str = "veryfast"
    """x264's preset."""

    @model_validator(mode="after")
    def _region_is_not_empty(self) -> VideoSpec:
        left, top, right, bottom = self.region
        if right - left < 0.01 or bottom - top < 0.01:
            raise ValueError(f"region {list(self.region)} is empty: give left < right and top < bottom")
        return self


@dataclass(frozen=True)
class VideoDescription(Description):
    """Size, rate and number of the stored frames."""

    width: int
    """Pixels."""
    height: int
    fps: float
    num_frames: int

    @property
    def length_s(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.pictures.length_s

    @property
    def pictures(self) -> Pictures:
        """The stored frames."""
        return Pictures(self.num_frames, self.width, self.height, self.fps)


VIDEO = Modality(
    name="video",
    letter="V",
    member="video.mp4",
    array="frames",
    layout="float (N, 3, frames, height, width), ImageNet-normalised RGB",
    settings=VideoInput,
    section="video",
    description=VideoDescription,
    storage_part="karmma_dist.modalities.video.store:STORAGE",
    decoder_part="karmma_dist.modalities.video.decode:DECODER",
    tensors_part="karmma_dist.modalities.video.tensor:TENSORS",
    drawing_part="karmma_dist.modalities.video.draw:DRAWING",
    breaker_part="karmma_dist.modalities.video.breaks:BREAKER",
    breakages=tuple(
        breakage
        for sensor in (CAMERA, "video")
        for breakage in (
            Breakage(sensor, "frozen", "frozen", SPANS, SPAN, is_random=True),
            Breakage(sensor, "black", "black", SPANS, SPAN, is_random=True),
            Breakage(sensor, "blur", "blur", BLURS, SIGMA, is_random=False),
            Breakage(sensor, "noise", "noise", GRAINS, GRAIN, is_random=True),
        )
    ),
    is_jittered=True,
)
