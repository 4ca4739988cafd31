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
        return clip_cross_entropy(logits, labels, labelled).mean()
    losses = [F.cross_entropy(at_least_float32(logits[head]), labels[head]) for head in logits]
    return sum(losses[1:], losses[0]) / len(losses)


def clip_cross_entropy(
    logits: dict[str, Tensor], labels: dict[str, Tensor], labelled: dict[str, Tensor] | None = None
) -> Tensor:
    """Return each clip's cross-entropy, the mean over the heads that it has, (B,), computed in float32 or more.

    Args:
        logits: logits_BC by head.
        labels: int64 labels (B,) by head.
        labelled: bool (B,) by head, True = the clip has the head; None: every clip has every head.
    """
    if labelled is not None:
        labels = {head: labels_B.clamp(min=0) for head, labels_B in labels.items()}
    losses_B = {
        head: F.cross_entropy(at_least_float32(logits_BC), labels[head], reduction="none")
        for head, logits_BC in logits.items()
    }
    return _mean_over_heads(losses_B, labelled)


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
        return _mean_over_heads(losses_B, labelled).mean() * temperature**2
    losses = [
        F.kl_div(softened[head], at_least_float32(teacher[head]), reduction="batchmean", log_target=True)
        for head in student
    ]
    return sum(losses[1:], losses[0]) / len(losses) * temperature**2


def _mean_over_heads(losses_B: dict[str, Tensor], labelled: dict[str, Tensor] | None) -> Tensor:
    """Return the mean (B,) of losses (B,) by head over the heads that each clip has."""
    losses_BH = torch.stack(list(losses_B.values()), dim=1)
    if labelled is None:
        return losses_BH.mean(dim=1)
    has_BH = torch.stack([labelled[head] for head in losses_B], dim=1)
    return (losses_BH * has_BH).sum(dim=1) / has_BH.sum(dim=1).clamp(min=1)
