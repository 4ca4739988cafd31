"""What a broken sensor gives: decoded frames, whole sounds and boxes, spoiled before anything is computed from them.

What is random follows from (seed, clip key) alone, and not from the severity: a longer freeze holds a shorter one,
stronger noise is the same noise louder. A broken sensor is still there: presence never changes.

Legend: N clips that have the modality, F frames, H x W pixels, O boxes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from karmma_dist.seeding import generator, uniform
from karmma_dist.streaming.decode import SAMPLE_RATE

_STILL = 128
"""Stored flow of no motion: 127.5, rounded as packing does."""

_LOUDEST = 32_767
"""Of int16 sound."""


def spoil_pixels(modality: str, effect: str, amount: float, clips: Tensor, keys: list[str], seed: int) -> Tensor:
    """Break decoded video (N, F, H, W, 3) or flow (N, F, H, W, 2), uint8 on any device; the given tensor is kept."""
    change = _PIXELS[effect]
    return torch.stack(
        [change(clip, amount, f"{seed}/{key}", modality) for clip, key in zip(clips, keys, strict=True)]
    )


def spoil_sound(effect: str, amount: float, samples: np.ndarray, key: str, seed: int) -> np.ndarray:
    """Break the whole sound of one clip, int16 (samples,)."""
    return _SOUNDS[effect](samples, amount, f"{seed}/{key}")


def spoil_boxes(amount: float, boxes: Tensor, keys: list[str], seed: int) -> Tensor:
    """Lose each box of (N, F, O, 6) with probability `amount`, on its own; a lost one reads as no box at all."""
    kept = boxes.clone()
    for clip, key in zip(kept, keys, strict=True):
        draws_FO = generator(f"{seed}/{key}/detections").random(clip.shape[:2])
        clip[torch.from_numpy(draws_FO < amount).to(clip.device)] = 0
    return kept


def span(num: int, share: float, text: str) -> slice:
    """Which of `num` places in a row are hit: a `share` of them, at least one, from a random one on.

    The spans of a text are nested: a larger share holds the smaller ones.
    """
    length = max(round(share * num), 1)
    start = int(_moment(text) * (num - length + 1))
    return slice(start, start + length)


def _frozen(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    """The frame at which it hung stays on for the rest of the span."""
    hit = span(len(clip), share, text)
    held = clip.clone()
    held[hit] = clip[hit.start]
    return held


def _black(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    dark = clip.clone()
    dark[span(len(clip), share, text)] = 0
    return dark


def _still(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    """Flow between pictures that do not change."""
    still = clip.clone()
    still[span(len(clip), share, text)] = _STILL
    return still


def _blur(clip: Tensor, share: float, _text: str, _: str) -> Tensor:
    """Out of focus: a Gaussian, mirrored at the borders."""
    height, width = clip.shape[1:3]
    sigma = share * min(height, width)
    rows_HH, columns_WW = (_gaussian(num, sigma).to(clip.device) for num in (height, width))
    # Two products of matrices take a fraction of a convolution's time on a CPU.
    smooth = rows_HH @ clip.permute(0, 3, 1, 2).float() @ columns_WW.T  # (F, channels, H, W)
    return smooth.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8)


def _gaussian(num: int, sigma: float) -> Tensor:
    """Weights (num, num), each row's sum 1: row i averages around pixel i. Cut at three sigma."""
    radius = min(int(np.ceil(3 * sigma)), num - 1)
    offsets = np.arange(-radius, radius + 1)
    # Over the area of each pixel: at its middle alone, a blur of less than half a pixel would be none.
    edges = torch.from_numpy(np.arange(-radius, radius + 2) - 0.5) / (sigma * 2**0.5)
    weights = torch.erf(edges).diff().numpy()
    columns = np.abs(np.arange(num)[:, None] + offsets)
    columns = np.where(columns >= num, 2 * (num - 1) - columns, columns)
    matrix = np.zeros((num, num))
    np.add.at(matrix, (np.arange(num)[:, None], columns), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


def _grain(clip: Tensor, share: float, text: str, modality: str) -> Tensor:
    # Drawn by NumPy on the CPU, whatever the device: the same noise on every machine.
    noise = generator(f"{text}/{modality}").standard_normal(tuple(clip.shape), dtype=np.float32)
    noisy = clip.float() + 255 * share * torch.from_numpy(noise).to(clip.device)
    return noisy.round_().clamp_(0, 255).to(torch.uint8)


def _mute(samples: np.ndarray, share: float, text: str) -> np.ndarray:
    muted = samples.copy()
    muted[span(len(samples), share, text)] = 0
    return muted


def _hiss(samples: np.ndarray, ratio_db: float, text: str) -> np.ndarray:
    """White noise at a signal-to-noise ratio over the whole clip; silence has no power to compare with and stays."""
    sound = samples.astype(np.float32)
    power = float(np.mean(np.square(sound, dtype=np.float64)))
    noise = generator(f"{text}/audio").standard_normal(len(samples), dtype=np.float32)
    noisy = sound + np.float32(np.sqrt(power / 10 ** (ratio_db / 10))) * noise
    return np.rint(noisy).clip(-_LOUDEST - 1, _LOUDEST).astype(np.int16)


def _late(samples: np.ndarray, seconds: float, _: str) -> np.ndarray:
    """What came before the clip is in no shard, so that silence comes first."""
    late = np.zeros_like(samples)
    num = round(seconds * SAMPLE_RATE)
    late[num:] = samples[: max(len(samples) - num, 0)]
    return late


def _moment(text: str) -> float:
    """In [0, 1), the same for a clip's video, flow and sound: a camera hangs as a whole."""
    seed, _, key = text.partition("/")
    return uniform(int(seed), key, "moment")


_PIXELS: dict[str, Callable[[Tensor, float, str, str], Tensor]] = {
    "frozen": _frozen, "black": _black, "still": _still, "blur": _blur, "noise": _grain,
}  # fmt: skip
_SOUNDS: dict[str, Callable[[np.ndarray, float, str], np.ndarray]] = {"mute": _mute, "noise": _hiss, "late": _late}
