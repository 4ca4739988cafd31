"""The losses, averaged over heads: cross-entropy, and the distillation of a teacher's class distributions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from karmma_dist.models.encoders.transformer import at_least_float32


def cross_entropy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy over clips and heads, computed in float32 or more.

    Args:
        logits: logits_BC by head.
        labels: int64 labels (B,) by head.
    """
    losses = [F.cross_entropy(at_least_float32(logits[head]), labels[head]) for head in logits]
    return sum(losses[1:], losses[0]) / len(losses)


def distillation(student: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float) -> Tensor:
    """Return KL(teacher || student) of the class distributions, mean over clips and heads, times temperature squared.

    Args:
        student: logits_BC by head.
        teacher: Log-probabilities (B, C) by head, at this temperature; a mixture of teachers has no logits.
        temperature: Temperature that softens the student's distribution.

    Source: paper, Sec. III-D; Hinton et al., arXiv 1503.02531, for the temperature.
    """
    losses = [
        F.kl_div(
            F.log_softmax(at_least_float32(student[head]) / temperature, dim=-1),
            at_least_float32(teacher[head]),
            reduction="batchmean",
            log_target=True,
        )
        for head in student
    ]
    return sum(losses[1:], losses[0]) / len(losses) * temperature**2
