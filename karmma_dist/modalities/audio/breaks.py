"""Broken microphones: mute, noisy, late."""

from __future__ import annotations

import numpy as np

from karmma_dist.modalities.audio import SAMPLE_RATE
from karmma_dist.modalities.breaking import span
from karmma_dist.modalities.contract import SignalBreaker
from karmma_dist.seeding import generator

_LOUDEST = 32_767
"""Largest int16 sample."""


class AudioBreaker(SignalBreaker):
    """A breaker of a clip's whole audio, int16 (samples,), from which windows are cut again."""

    def break_uncut(self, effect: str, amount: float, decoded: np.ndarray, key: str, seed: int) -> np.ndarray:
        """Break one clip's audio."""
        return _EFFECTS[effect](decoded, amount, f"{seed}/{key}")


def _mute(samples: np.ndarray, share: float, text: str) -> np.ndarray:
    muted = samples.copy()
    muted[span(len(samples), share, text)] = 0
    return muted


def _hiss(samples: np.ndarray, ratio_db: float, text: str) -> np.ndarray:
    """Add white noise at a signal-to-noise ratio over the whole clip; silence has no power and stays silent."""
    sound = samples.astype(np.float32)
    power = float(np.mean(np.square(sound, dtype=np.float64)))
    noise = generator(f"{text}/audio").standard_normal(len(samples), dtype=np.float32)
    noisy = sound + np.float32(np.sqrt(power / 10 ** (ratio_db / 10))) * noise
    return np.rint(noisy).clip(-_LOUDEST - 1, _LOUDEST).astype(np.int16)


def _late(samples: np.ndarray, seconds: float, _: str) -> np.ndarray:
    """Delay the audio; it starts with silence, since no shard holds the audio before the clip."""
    late = np.zeros_like(samples)
    num = round(seconds * SAMPLE_RATE)
    late[num:] = samples[: max(len(samples) - num, 0)]
    return late


_EFFECTS = {"mute": _mute, "noise": _hiss, "late": _late}

BREAKER = AudioBreaker()
