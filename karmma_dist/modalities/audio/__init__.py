"""Audio: 16 kHz, mono, stored as FLAC; models receive a mel spectrogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.modalities.contract import Breakage, Description, Modality
from karmma_dist.settings import Positive, Settings

SAMPLE_RATE = 16_000
"""Sample rate of every stored member, Hz."""

HOP = 80
"""Samples from one column of a spectrogram to the next."""
FRAME, STEP = 400, 160
"""Samples of a column, and from one to the next, of the spectrograms of published models."""


class AudioInput(Settings):
    """The mel spectrogram: n_fft 1024, window 160, hop 80, power 2, at 16 kHz [fit]."""

    num_windows: Positive = 32
    """Windows spread over the clip, one centred on each video frame [fit]."""
    window_s: Annotated[float, Field(gt=0.01)] = 1.116
    """Length of one window in seconds, padded with silence at the clip's borders [fit]."""
    num_mels: Positive = 128
    """Mel bands [fit]."""
    spectrogram: Literal["paper", "kaldi", "whisper"] = "paper"
    """`paper`: as above. `kaldi`: the log filter banks on which AST was pretrained, a column every 10 ms. `whisper`:
    the log mel spectrogram of Whisper, likewise. Published encoders need theirs."""

    @property
    def window_samples(self) -> int:
        """Number of samples in one window at 16 kHz."""
        return round(self.window_s * SAMPLE_RATE)

    @property
    def num_steps(self) -> int:
        """Number of spectrogram columns in one window."""
        if self.spectrogram == "kaldi":
            return (self.window_samples - FRAME) // STEP + 1
        if self.spectrogram == "whisper":
            return self.window_samples // STEP
        return self.window_samples // HOP + 1

    @model_validator(mode="after")
    def _window_holds_a_column(self) -> AudioInput:
        if self.spectrogram != "paper" and self.window_samples < FRAME:
            raise ValueError(f"window_s {self.window_s} is shorter than a column of {self.spectrogram}, 0.025 s")
        return self


class AudioSpec(Settings):
    """Audio, stored as mono 16-bit FLAC at 16 kHz, cut to the clip's exact seconds."""

    source: Literal["auto", "movie", "hdf5", "none"] = "auto"
    """`movie`: the video file's best audio stream. `hdf5`: the dataset's HDF5 file of audio (Epic-Kitchens only).
    `auto`: the video file, else the HDF5 file. `none`: do not store audio."""


@dataclass(frozen=True)
class AudioDescription(Description):
    """Rate and number of the stored samples."""

    sample_rate: int
    """Hz."""
    num_samples: int

    @property
    def length_s(self) -> float:
        """Seconds of audio."""
        return float(self.num_samples / self.sample_rate)


AUDIO = Modality(
    name="audio",
    letter="A",
    member="audio.flac",
    array="spectrograms",
    layout="float (N, windows, mels, time), normalised dB",
    settings=AudioInput,
    section="audio",
    description=AudioDescription,
    storage_part="karmma_dist.modalities.audio.store:STORAGE",
    decoder_part="karmma_dist.modalities.audio.decode:DECODER",
    tensors_part="karmma_dist.modalities.audio.tensor:TENSORS",
    drawing_part="karmma_dist.modalities.audio.draw:DRAWING",
    breaker_part="karmma_dist.modalities.audio.breaks:BREAKER",
    breakages=(
        Breakage(
            "audio", "mute", "mute", (0.2, 0.4, 0.6, 0.8, 1.0), "{:.0%} of the clip, from a random moment on",
            is_random=True,
        ),
        Breakage(
            "audio", "noise", "noise", (20, 10, 5, 0, -5), "white noise, signal to noise {:g} dB", is_random=True
        ),
        Breakage(
            "audio", "desync", "late", (0.1, 0.25, 0.5, 1.0, 2.0), "{:g} s late, silence before it", is_random=False
        ),
    ),
    fills_clip=True,
)
