"""The objective `smoothed`: cross-entropy with label smoothing."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from karmma_dist.settings import Settings
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.objectives import Objective, ObjectiveType


class SmoothedOptions(Settings):
    smoothing: float = 0.1


class Smoothed(Objective):
    def __init__(self, options: SmoothedOptions) -> None:
        self.smoothing = options.smoothing

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        losses = [F.cross_entropy(logits[head], batch.labels[head], label_smoothing=self.smoothing) for head in logits]
        loss = sum(losses[1:], losses[0]) / len(losses)
        return loss, {"loss": loss.detach(), "smoothing": loss.new_tensor(self.smoothing)}


def build(options: Any, _recipe: Any, _soft_targets: Any) -> Objective:
    return Smoothed(options)


SMOOTHED = ObjectiveType(SmoothedOptions, build)
