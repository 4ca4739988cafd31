"""Signals: channels of numbers over time, of an IMU, gaze, hand pose or force, sampled regularly or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.modalities.contract import Breakage, Description, Modality
from karmma_dist.settings import Positive, Settings

_LONGEST_TEXT = 60
Text = Annotated[str, Field(min_length=1, max_length=_LONGEST_TEXT)]

TICKS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds per unit of a clock."""


class SignalInput(Settings):
    """A window of the signal on a regular clock, each channel with mean 0 and variance 1."""

    rate_hz: Annotated[float, Field(gt=0, le=1e6)] = 100.0
    """Samples per second, interpolated linearly between the stored ones [ours]."""
    num_samples: Positive = 400
    """Samples of the window. A clip that is longer shows a part of it, at random in training, else its middle; of a
    shorter one the samples beyond its ends are 0, the mean [ours]."""
    num_channels: Positive = 6
    """Channels that the shards have."""

    @property
    def window_s(self) -> float:
        """Length of the window in seconds."""
        return self.num_samples / self.rate_hz


class ChannelSpec(Settings):
    """A channel of a signal."""

    name: Text
    """Name, unique among the channels."""
    unit: Text
    """Unit of its numbers, such as m/s2. A file whose header gives another one in brackets is refused."""
    word: Annotated[Text, Field(pattern=r"^\S+$")]
    """One word on what it measures, such as acceleration."""
    column: Text | None = None
    """Column of the file, without a unit in brackets; None: the name."""
    mean: float | None = None
    """Mean that is subtracted for models; None: the recording's own."""
    std: Annotated[float, Field(ge=1e-9)] | None = None
    """Standard deviation by which models' inputs are divided; None: the recording's own."""


class TrackSpec(Settings):
    """A CSV file per recording, whose channels share a clock."""

    file: Annotated[str, Field(min_length=1, max_length=1000)]
    """Path inside the raw folder; {participant} and {recording} stand for the names."""
    time_column: Text = "time"
    """Column of the moments, counted from the start of the recording."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of the moments."""
    channels: Annotated[list[ChannelSpec], Field(min_length=1, max_length=64)]
    """Channels, in the order in which models receive them."""


class SignalSpec(Settings):
    """Signals, stored to the sample with the moments of their own clocks. Each file may have another clock."""

    source: Literal["auto", "none"] = "auto"
    """`auto`: the files of `tracks`; a recording that lacks one of them has no signal. `none`: do not store signals."""
    tracks: Annotated[list[TrackSpec], Field(min_length=1, max_length=16)]
    """Files of a recording; all of their channels make one signal."""
    max_gap_s: Annotated[float, Field(gt=0)] = 0.1
    """Longest time in seconds between two samples; a clip with a longer gap inside has no signal."""
    min_coverage: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Fraction of a clip that every track must cover; a clip whose ends are covered less has no signal."""

    @model_validator(mode="after")
    def _channels_differ(self) -> SignalSpec:
        names = [channel.name for track in self.tracks for channel in track.channels]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"tracks: two channels are called '{twice}'")
        return self


@dataclass(frozen=True)
class SignalDescription(Description):
    """Size and channels of a stored signal."""

    num_channels: int
    num_samples: int
    """Samples of the track that has most."""
    span_s: float
    """Length of the clip in seconds."""
    channels: str
    """Name and unit of each channel: `accl_x [m/s2], ...`."""

    @property
    def length_s(self) -> float:
        """Length of the clip in seconds."""
        return self.span_s


SIGNAL = Modality(
    name="signal",
    letter="S",
    member="signal.bin",
    array="series",
    layout="float (N, channels, samples), mean 0 and variance 1",
    settings=SignalInput,
    section="signal",
    description=SignalDescription,
    storage_part="karmma_dist.modalities.signal.store:STORAGE",
    decoder_part="karmma_dist.modalities.signal.decode:DECODER",
    tensors_part="karmma_dist.modalities.signal.tensor:TENSORS",
    drawing_part="karmma_dist.modalities.signal.draw:DRAWING",
    breaker_part="karmma_dist.modalities.signal.breaks:BREAKER",
    breakages=(
        Breakage(
            "signal", "frozen", "frozen", (0.2, 0.4, 0.6, 0.8, 1.0), "{:.0%} of the channels keep their first value",
            is_random=True,
        ),
        Breakage(
            "signal", "bias", "bias", (0.25, 0.5, 1, 2, 4), "every channel off by {:g} standard deviations",
            is_random=True,
        ),
        Breakage(
            "signal", "noise", "noise", (0.1, 0.25, 0.5, 1, 2), "Gaussian noise of {:g} standard deviations",
            is_random=True,
        ),
        Breakage(
            "signal", "lost", "lost", (0.10, 0.25, 0.50, 0.75, 0.90), "{:.0%} of the packets of 0.1 s", is_random=True
        ),
        Breakage(
            "signal", "desync", "late", (0.05, 0.1, 0.25, 0.5, 1.0), "clock off by {:g} s, the mean before it",
            is_random=False,
        ),
    ),
)
