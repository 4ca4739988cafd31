"""Broken sensors of signals: channels that are frozen, off or noisy, packets that are lost, a clock that is off."""

from __future__ import annotations

import numpy as np

from karmma_dist.modalities.contract import SignalBreaker
from karmma_dist.modalities.signal.decode import TIME, VALUE
from karmma_dist.seeding import generator

PACKET_S = 0.1
"""Seconds of a packet, which is lost as a whole."""


class SeriesBreaker(SignalBreaker):
    """A breaker of a clip's channels, float64 (channels, 2, T), whose samples have mean 0 and variance 1."""

    def break_uncut(self, effect: str, amount: float, decoded: np.ndarray, key: str, seed: int) -> np.ndarray:
        """Break one clip's channels."""
        broken = decoded.copy()
        _EFFECTS[effect](broken, amount, generator(f"{seed}/{key}/signal"))
        return broken


def _freeze(channels: np.ndarray, share: float, random: np.random.Generator) -> None:
    """Keep a share of the channels, at least one, at their first value."""
    frozen = random.permutation(len(channels))[: max(round(share * len(channels)), 1)]
    channels[frozen, VALUE] = channels[frozen, VALUE, :1]


def _shift(channels: np.ndarray, deviations: float, random: np.random.Generator) -> None:
    """Add a constant to every channel, up or down."""
    channels[:, VALUE] += deviations * random.choice((-1.0, 1.0), (len(channels), 1))


def _add_noise(channels: np.ndarray, deviations: float, random: np.random.Generator) -> None:
    channels[:, VALUE] += deviations * random.standard_normal(channels[:, VALUE].shape)


def _lose(channels: np.ndarray, share: float, random: np.random.Generator) -> None:
    """Lose each packet independently with probability `share`, in all channels; a line bridges what is lost.

    A lost sample takes the place of the one before it, moment and value: to interpolation it does not exist.
    """
    packets = np.maximum(channels[:, TIME] / PACKET_S, 0).astype(np.int64)
    is_lost = random.random(int(packets.max()) + 1) < share
    for channel, packets_T in zip(channels, packets, strict=True):
        is_kept_T = ~is_lost[packets_T]
        is_kept_T[0] = True
        last_kept_T = np.maximum.accumulate(np.where(is_kept_T, np.arange(len(is_kept_T)), 0))
        channel[:] = channel[:, last_kept_T]


def _delay(channels: np.ndarray, seconds: float, _: np.random.Generator) -> None:
    """Let everything come later; no shard holds what was before the clip, so it begins with the mean."""
    channels[:, TIME] += seconds


_EFFECTS = {"frozen": _freeze, "bias": _shift, "noise": _add_noise, "lost": _lose, "late": _delay}

BREAKER = SeriesBreaker()
