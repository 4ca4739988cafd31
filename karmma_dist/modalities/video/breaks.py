"""The breaker of video: cameras that are frozen, dark, out of focus or noisy."""

from __future__ import annotations

from torch import Tensor

from karmma_dist.modalities.breaking import FramesBreaker, add_noise, blur, span


def _frozen(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    """Repeat the first frame of a span until its end."""
    hit = span(len(clip), share, text)
    held = clip.clone()
    held[hit] = clip[hit.start]
    return held


def _black(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    dark = clip.clone()
    dark[span(len(clip), share, text)] = 0
    return dark


BREAKER = FramesBreaker("video", {"frozen": _frozen, "black": _black, "blur": blur, "noise": add_noise})
