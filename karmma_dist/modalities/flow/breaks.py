"""The breaker of flow: flow between the pictures of a broken camera."""

from __future__ import annotations

from torch import Tensor

from karmma_dist.modalities.breaking import FramesBreaker, add_noise, blur, span

_STILL = 128
"""Stored value of no motion: 127.5, rounded as in packing."""


def _still(clip: Tensor, share: float, text: str, _: str) -> Tensor:
    """Stop all motion during a span, as in pictures that do not change."""
    still = clip.clone()
    still[span(len(clip), share, text)] = _STILL
    return still


BREAKER = FramesBreaker("flow", {"still": _still, "blur": blur, "noise": add_noise})
