"""Ways of breaking a signal that several modalities share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from karmma_dist.modalities.contract import ArraysBreaker
from karmma_dist.seeding import generator, uniform

Effect = Callable[[Tensor, float, str, str], Tensor]
"""Function of one clip's frames (F, H, W, channels), the amount, the text `seed/key` and the modality's name."""


class FramesBreaker(ArraysBreaker):
    """A breaker of decoded frames, uint8 (N, F, H, W, channels).

    Args:
        modality: Name of the modality.
        effects: Possible effects on a clip, by name.
    """

    def __init__(self, modality: str, effects: Mapping[str, Effect]) -> None:
        self._modality, self._effects = modality, effects

    def break_arrays(self, effect: str, amount: float, arrays_N: Tensor, keys: Sequence[str], seed: int) -> Tensor:
        """Break each clip independently."""
        change = self._effects[effect]
        return torch.stack(
            [change(clip, amount, f"{seed}/{key}", self._modality) for clip, key in zip(arrays_N, keys, strict=True)]
        )


def span(num: int, share: float, text: str) -> slice:
    """Draw a random span of `num` places that covers a `share` of them, at least one.

    Spans of the same `text` are nested: a larger share contains the smaller ones.
    """
    length = max(round(share * num), 1)
    start = int(_moment(text) * (num - length + 1))
    return slice(start, start + length)


def _moment(text: str) -> float:
    """Draw a number in [0, 1), the same for all modalities of a clip, since a camera freezes all of them at once."""
    seed, _, key = text.partition("/")
    return uniform(int(seed), key, "moment")


def blur(clip: Tensor, share: float, _text: str, _: str) -> Tensor:
    """Blur a clip with a Gaussian, mirrored at the borders, like a camera out of focus."""
    height, width = clip.shape[1:3]
    sigma = share * min(height, width)
    rows_HH, columns_WW = (_gaussian(num, sigma).to(clip.device) for num in (height, width))
    # Two matrix products take a fraction of a convolution's time on a CPU.
    smooth = rows_HH @ clip.permute(0, 3, 1, 2).float() @ columns_WW.T  # (F, channels, H, W)
    return smooth.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)


def _gaussian(num: int, sigma: float) -> Tensor:
    """Return weights (num, num) of which row i averages around pixel i and sums to 1. They are cut at three sigma."""
    radius = min(int(np.ceil(3 * sigma)), num - 1)
    offsets = np.arange(-radius, radius + 1)
    # Integrate over each pixel's area: sampled at its centre, a blur of less than half a pixel would have no effect.
    edges = torch.from_numpy(np.arange(-radius, radius + 2) - 0.5) / (sigma * 2**0.5)
    weights = torch.erf(edges).diff().numpy()
    columns = np.abs(np.arange(num)[:, None] + offsets)
    columns = np.where(columns >= num, 2 * (num - 1) - columns, columns)
    matrix = np.zeros((num, num))
    np.add.at(matrix, (np.arange(num)[:, None], columns), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


def add_noise(clip: Tensor, share: float, text: str, modality: str) -> Tensor:
    """Add Gaussian noise whose standard deviation is a `share` of the range."""
    # NumPy draws it on the CPU for any device, so that the noise is the same on every machine.
    noise = generator(f"{text}/{modality}").standard_normal(tuple(clip.shape), dtype=np.float32)
    noisy = clip.float() + 255 * share * torch.from_numpy(noise).to(clip.device)
    return noisy.round_().clamp_(0, 255).to(torch.uint8)
