"""The losses, averaged over heads: cross-entropy, and the distillation of a teacher's class distributions.

If clips lack heads, since datasets with different heads are trained on together, a clip's loss is the mean over the
heads that it has, and the loss of a batch is the mean over its clips. So equal parts of a batch, on ranks or in passes,
have the batch's loss as their mean, whatever clips they hold. (A mean over the clips with a head would not: parts have
different numbers of them.) Every head is in the loss, if only with weight 0: ranks must compute the same graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from karmma_dist.models.encoders.transformer import at_least_float32


def cross_entropy(
    logits: dict[str, Tensor], labels: dict[str, Tensor], labelled: dict[str, Tensor] | None = None
) -> Tensor:
    """Return the mean cross-entropy over clips and heads, computed in float32 or more.

    Args:
        logits: logits_BC by head.
        labels: int64 labels (B,) by head.
        labelled: bool (B,) by head, True = the clip has the head; None: every clip has every head.
    """
    if labelled is not None:
        losses_B = {
            head: F.cross_entropy(at_least_float32(logits[head]), labels[head].clamp(min=0), reduction="none")
            for head in logits
        }
        return _mean_over_labelled(losses_B, labelled)
    losses = [F.cross_entropy(at_least_float32(logits[head]), labels[head]) for head in logits]
    return sum(losses[1:], losses[0]) / len(losses)


def distillation(
    student: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float,
    labelled: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return KL(teacher || student) of the class distributions, mean over clips and heads, times temperature squared.

    Args:
        student: logits_BC by head.
        teacher: Log-probabilities (B, C) by head, at this temperature; a mixture of teachers has no logits.
        temperature: Temperature that softens the student's distribution.
        labelled: bool (B,) by head, True = the clip has the head; None: every clip has every head.

    Source: paper, Sec. III-D; Hinton et al., arXiv 1503.02531, for the temperature.
    """
    softened = {head: F.log_softmax(at_least_float32(student[head]) / temperature, dim=-1) for head in student}
    if labelled is not None:
        losses_B = {
            head: F.kl_div(softened[head], at_least_float32(teacher[head]), reduction="none", log_target=True).sum(-1)
            for head in student
        }
        return _mean_over_labelled(losses_B, labelled) * temperature**2
    losses = [
        F.kl_div(softened[head], at_least_float32(teacher[head]), reduction="batchmean", log_target=True)
        for head in student
    ]
    return sum(losses[1:], losses[0]) / len(losses) * temperature**2


def _mean_over_labelled(losses_B: dict[str, Tensor], labelled: dict[str, Tensor]) -> Tensor:
    """Return the mean over clips of a clip's mean over the heads that it has, of losses (B,) by head."""
    num_heads_B = torch.stack(list(labelled.values())).sum(dim=0).clamp(min=1)
    sums = [(losses_B[head] * (labelled[head] / num_heads_B)).sum() for head in losses_B]
    return sum(sums[1:], sums[0]) / len(num_heads_B)
