"""The three stages of training: the loss of a batch, and what has to be loaded for it.

    supervised   cross-entropy on labels: unimodal encoders, Baseline, Baseline with modality dropout
    teacher      the same, every encoder frozen
    distill      alpha * cross-entropy + (1 - alpha) * KL(teacher || student); the teacher runs online, frozen
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.losses import cross_entropy, distillation
from karmma_dist.recipe import DistillRecipe, Recipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.engine import Engine, ShardedModule
from karmma_dist.training.teacher import Measure, Teacher, build_teacher
from karmma_dist.training.tracking import accuracies, agreements, entropies


class Stage(Protocol):
    """Turns a student's logits and the batch they came from into a loss."""

    @property
    def teachers(self) -> list[KarmmaModel]:
        """Frozen models that run beside the one in training."""

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise and its parts for the log, all 0-d tensors."""


def build_stage(recipe: Recipe, heads: dict[str, int], engine: Engine, world: World, measure: Measure) -> Stage:
    """Build the recipe's stage; the distill stage loads its teacher, see `build_teacher`. Every rank must call this."""
    if recipe.distill is None:
        return Supervised()
    return Distill(build_teacher(recipe, heads, engine, world, measure), recipe.distill)


class Supervised:
    """Cross-entropy averaged over heads."""

    teachers: list[KarmmaModel] = []

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`."""
        loss = cross_entropy(logits, batch.labels)
        return loss, {"loss": loss.detach(), **accuracies("train", logits, batch.labels), **entropies("train", logits)}


class Distill:
    """A student taught online by a frozen teacher that sees the same batch with the same modalities."""

    def __init__(self, teacher: Teacher | ShardedModule, recipe: DistillRecipe) -> None:
        self.teacher, self.recipe = teacher, recipe

    @property
    def teachers(self) -> list[KarmmaModel]:
        """See `Stage.teachers`."""
        module = self.teacher.module if isinstance(self.teacher, ShardedModule) else self.teacher
        assert isinstance(module, Teacher)
        return [member for member in module.members if isinstance(member, KarmmaModel)]

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Stage.loss`. The teacher's entropy is that of what it teaches, softened by the temperature."""
        with torch.no_grad():
            taught: dict[str, Tensor] = self.teacher(batch.inputs, batch.present_BM, batch.labels)
        hard = cross_entropy(logits, batch.labels)
        soft = distillation(logits, taught, self.recipe.temperature)
        loss = self.recipe.alpha * hard + (1 - self.recipe.alpha) * soft
        softened = {head: of.detach().float() / self.recipe.temperature for head, of in logits.items()}
        return loss, {
            "loss": loss.detach(), "cross_entropy": hard.detach(), "kl": soft.detach(),
            **accuracies("train", logits, batch.labels), **accuracies("teacher", taught, batch.labels),
            **agreements(logits, taught), **entropies("train", softened), **entropies("teacher", taught),
        }  # fmt: skip
