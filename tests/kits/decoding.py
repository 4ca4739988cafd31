"""Decoders of single members, for tests that make their own members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from torch import Tensor

from karmma_dist.modalities import MODALITIES, ArraysBreaker, SignalBreaker, View
from karmma_dist.modalities.audio import AudioDescription, AudioInput
from karmma_dist.modalities.flow import FlowDescription
from karmma_dist.modalities.video import VideoInput

CENTRE = View(np.array([0.5]), 0.5, 0.5, False, np.ones(3, np.float32))


def described(num_frames: int, fps: Fraction | int) -> FlowDescription:
    """Return the description that packing writes for video and flow."""
    return FlowDescription(64, 48, round(float(fps), 6), num_frames, 2.0, "files")


def decode_video(
    data: bytes, description: FlowDescription, moments_s: np.ndarray, settings: VideoInput, view: View
) -> np.ndarray:
    """Decode video to uint8 (F, crop, crop, 3)."""
    views = [replace(view, times_F=moments_s)]
    return MODALITIES["video"].decoder.decode_views(data, description, settings, views, 1.0)[0]


def decode_flow(
    data: bytes, description: FlowDescription, moments_s: np.ndarray, settings: VideoInput, view: View
) -> np.ndarray:
    """Decode flow to uint8 (F, crop, crop, 2)."""
    views = [replace(view, times_F=moments_s)]
    return MODALITIES["flow"].decoder.decode_views(data, description, settings, views, 1.0)[0]


def decode_audio(data: bytes, num_samples: int, moments_s: np.ndarray, settings: AudioInput) -> np.ndarray:
    """Decode audio to int16 (windows, samples)."""
    views, description = [replace(CENTRE, times_F=moments_s)], AudioDescription(16_000, num_samples)
    return MODALITIES["audio"].decoder.decode_views(data, description, settings, views, 1.0)[0]


def break_arrays(
    modality: str, effect: str, amount: float, arrays_N: Tensor, keys: Sequence[str], seed: int
) -> Tensor:
    """Return the arrays of N clips from a broken sensor."""
    breaker = MODALITIES[modality].breaker
    assert isinstance(breaker, ArraysBreaker)
    return breaker.break_arrays(effect, amount, arrays_N, keys, seed)


def break_sound(effect: str, amount: float, samples: np.ndarray, key: str, seed: int) -> np.ndarray:
    """Return a whole clip's audio from a broken microphone, int16."""
    breaker = MODALITIES["audio"].breaker
    assert isinstance(breaker, SignalBreaker)
    return breaker.break_uncut(effect, amount, samples, key, seed)
