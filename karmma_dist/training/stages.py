"""The three stages: what a batch's loss is, and what has to be loaded for it.

    supervised   cross-entropy on labels: unimodal encoders, Baseline, Baseline with modality dropout
    teacher      the same, every encoder frozen
    distill      alpha * cross-entropy + (1 - alpha) * KL(teacher || student); the teacher runs online, frozen
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.pretrained import load_model
from karmma_dist.recipe import DistillRecipe, Recipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.losses import cross_entropy, distillation


class Stage(Protocol):
    """Turns a student's logits and the batch they came from into a loss."""

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise and its parts for the log, all 0-d tensors."""


def build_stage(recipe: Recipe, heads: dict[str, int], device: torch.device, dtype: torch.dtype) -> Stage:
    """Build the recipe's stage; the distill stage loads its teacher.

    Raises:
        UserError: the teacher is missing, or was trained on other classes, modalities or inputs.
    """
    if recipe.distill is None:
        return Supervised()
    teacher = load_teacher(recipe, heads).to(device=device, dtype=dtype)
    return Distill(teacher, recipe.distill)


def load_teacher(recipe: Recipe, heads: dict[str, int]) -> KarmmaModel:
    """The teacher of a distill recipe, frozen and in eval mode, checked against the student's data."""
    assert recipe.distill is not None
    path = recipe.find_run(recipe.distill.teacher)
    teacher, card = load_model(path)
    if dict(teacher.heads) != heads:
        raise UserError(f"{path}: the teacher's heads {dict(teacher.heads)} are not the shards' {heads}")
    if list(teacher.modalities) != recipe.data.modalities:
        raise UserError(
            f"{path}: the teacher's modalities {', '.join(teacher.modalities)} are not the student's "
            f"{', '.join(recipe.data.modalities)}"
        )
    if card.inputs != recipe.inputs:
        raise UserError(f"{path}: the teacher was trained on other inputs: the two recipes' 'inputs' must be equal")
    return teacher.requires_grad_(False).eval()


class Supervised:
    """Cross-entropy averaged over heads."""

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        loss = cross_entropy(logits, batch.labels)
        return loss, {"loss": loss.detach(), **_accuracies("train", logits, batch)}


class Distill:
    """A student taught online by a frozen teacher that sees the same batch with the same modalities."""

    def __init__(self, teacher: KarmmaModel, recipe: DistillRecipe) -> None:
        self.teacher, self.recipe = teacher, recipe

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        with torch.no_grad():
            taught = self.teacher(batch.inputs, batch.present_BM)
        hard = cross_entropy(logits, batch.labels)
        soft = distillation(logits, taught, self.recipe.temperature)
        loss = self.recipe.alpha * hard + (1 - self.recipe.alpha) * soft
        parts = {"loss": loss.detach(), "cross_entropy": hard.detach(), "kl": soft.detach()}
        return loss, {**parts, **_accuracies("train", logits, batch), **_accuracies("teacher", taught, batch)}


def _accuracies(name: str, logits: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Share of the batch's clips whose labels are right, 0 to 1, over all heads together."""
    right = [logits[head].detach().argmax(-1) == batch.labels[head] for head in logits]
    return {f"{name}_accuracy": torch.stack(right).all(dim=0).float().mean()}
