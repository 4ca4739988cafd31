"""Losses over heads, and the three stages that use them.

    supervised   cross-entropy on labels: unimodal encoders, Baseline, Baseline with modality dropout
    teacher      the same, every encoder frozen
    distill      alpha * cross-entropy + (1 - alpha) * KL(teacher || student); the teacher runs online, frozen
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.models.encoders.transformer import at_least_float32
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import DistillRecipe, Recipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.engine import Engine, ShardedModule
from karmma_dist.training.teacher import Measure, Teacher, build_teacher
from karmma_dist.training.tracking import accuracies, agreements, entropies


def cross_entropy(logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
    """Mean over clips and heads. logits_BC per head, int64 labels (B,) per head; computed in float32 or more."""
    losses = [F.cross_entropy(at_least_float32(logits[head]), labels[head]) for head in logits]
    return sum(losses[1:], losses[0]) / len(losses)


def distillation(student: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float) -> Tensor:
    """KL(teacher || student) of the class distributions, mean over clips and heads, times temperature squared.

    Args:
        student: logits_BC per head.
        teacher: log-probabilities (B, C) per head, at this temperature; a mixture's have no logits.
        temperature: softens the student's distribution.

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
