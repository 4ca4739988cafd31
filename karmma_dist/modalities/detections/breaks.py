"""A detector that misses boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from karmma_dist.modalities.contract import ArraysBreaker
from karmma_dist.seeding import generator


class DetectionsBreaker(ArraysBreaker):
    """A breaker of boxes, float32 (N, F, boxes, 6)."""

    def break_arrays(self, effect: str, amount: float, arrays_N: Tensor, keys: Sequence[str], seed: int) -> Tensor:
        """Drop each box independently with probability `amount`; a dropped box becomes an empty one, all zeros."""
        kept = arrays_N.clone()
        for clip, key in zip(kept, keys, strict=True):
            draws_FO = generator(f"{seed}/{key}/detections").random(clip.shape[:2])
            clip[torch.from_numpy(draws_FO < amount).to(clip.device)] = 0
        return kept


BREAKER = DetectionsBreaker()
