"""Objectives: the loss that training minimises, and the table of objectives, which other packages can extend.

    cross_entropy   on labels: unimodal encoders, teachers, Baseline, Baseline with modality dropout
    distillation    alpha * cross-entropy + (1 - alpha) * KL(teacher || student); the frozen teacher runs online
    hard_combinations    cross-entropy, more of it for hard combinations of modalities; see `hard_combinations.py`

A recipe selects one in its section `objective`; without that section, the stage determines it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karmma_dist.distributed.collectives import raise_on_all
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.models.losses import cross_entropy, distillation
from karmma_dist.models.running_sums import RunningSums
from karmma_dist.plugins import find_plugin, with_plugins
from karmma_dist.recipe import DataRecipe, DistillRecipe, Recipe
from karmma_dist.settings import Settings, validate
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.format import Clip, label_problem
from karmma_dist.shards.mixture import open_dataset
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.engine import ShardedModule
from karmma_dist.training.memories.teacher_answers import TeacherMemory
from karmma_dist.training.teacher import Teacher
from karmma_dist.training.tracking import accuracies, agreements, entropies, labelled_shares

SoftTargets = Callable[[Batch], dict[str, Tensor]]
"""Returns the soft targets of a batch: the frozen teacher's log-probabilities (B, C) per head, at distill.temperature.
Every rank must call it for every batch; the result carries no gradient."""


class Objective(ABC):
    """The loss of a batch."""

    sums: RunningSums | None = None
    """Sums over the clips of earlier steps on which the loss depends. The trainer commits them after each step, and
    saves `state` in checkpoints."""

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's state from which `restore` goes on, as JSON values."""
        return {} if self.sums is None else {"objective": self.sums.sums.tolist()}

    def restore(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Go on from the state of a checkpoint.

        Raises:
            UserError: the checkpoint was saved with another objective.
        """
        if self.sums is None:
            return
        if "objective" not in state:
            raise UserError(f"{checkpoint}: saved with another objective: start over with --resume never")
        self.sums.restore(state["objective"])

    @abstractmethod
    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimise, which must depend on every head, and metrics for the log; all 0-d tensors.

        Args:
            logits: logits_BC per head of the model in training.
            batch: The batch that the logits were computed from. With `heads_vary` its clips may lack labels of some
                heads; the loss must be a mean over clips, so that those of ranks and passes are averaged.
        """


@dataclass(frozen=True)
class ObjectiveType:
    """An entry of the table of objectives."""

    options: type[Settings]
    """The recipe's `objective.options`, typed."""
    build: Callable[[Any, Recipe, SoftTargets | None], Objective]
    """Called with the options, the recipe and, in the distill stage, the soft targets."""


class CrossEntropy(Objective):
    """Cross-entropy on labels, averaged over heads."""

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, accuracy and entropy; see `Objective.loss`."""
        labelled = batch.labelled
        loss = cross_entropy(logits, batch.labels, labelled)
        return loss, {
            "loss": loss.detach(), **labelled_shares(labelled), **accuracies("train", logits, batch.labels, labelled),
            **entropies("train", logits, labelled),
        }  # fmt: skip


class Distillation(Objective):
    """Cross-entropy on labels and KL divergence from a frozen teacher that sees the same batch (paper, Sec. III-D).

    Args:
        recipe: alpha and temperature.
        soft_targets: Returns the teacher's soft targets for a batch.
    """

    def __init__(self, recipe: DistillRecipe, soft_targets: SoftTargets) -> None:
        self.recipe, self.soft_targets = recipe, soft_targets

    def loss(self, logits: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, its parts, and the accuracy and entropy of both models; entropies are at the temperature."""
        targets = self.soft_targets(batch)
        labels, labelled = batch.labels, batch.labelled
        hard = cross_entropy(logits, labels, labelled)
        soft = distillation(logits, targets, self.recipe.temperature, labelled)
        loss = self.recipe.alpha * hard + (1 - self.recipe.alpha) * soft
        softened = {head: logits_BC.detach().float() / self.recipe.temperature for head, logits_BC in logits.items()}
        return loss, {
            "loss": loss.detach(), "cross_entropy": hard.detach(), "kl": soft.detach(), **labelled_shares(labelled),
            **accuracies("train", logits, labels, labelled), **accuracies("teacher", targets, labels, labelled),
            **agreements(logits, targets, labelled), **entropies("train", softened, labelled),
            **entropies("teacher", targets, labelled),
        }  # fmt: skip


class NoOptions(Settings):
    """No options."""


def _distillation(_options: NoOptions, recipe: Recipe, soft_targets: SoftTargets | None) -> Objective:
    if recipe.distill is None or soft_targets is None:
        raise UserError(f"objective.name: 'distillation' needs a teacher, which stage {recipe.stage} does not have")
    return Distillation(recipe.distill, soft_targets)


_OWN = {
    "cross_entropy": ObjectiveType(NoOptions, lambda _options, _recipe, _soft_targets: CrossEntropy()),
    "distillation": ObjectiveType(NoOptions, _distillation),
}


@cache
def objective_table() -> dict[str, ObjectiveType]:
    """Return all objectives by name: ours, and the entry points `karmma_dist.objectives` of other packages."""
    from karmma_dist.training.hard_combinations import HARD_COMBINATIONS  # which derives from `Objective`

    return with_plugins({**_OWN, "hard_combinations": HARD_COMBINATIONS}, "karmma_dist.objectives", ObjectiveType)


def build_objective(recipe: Recipe, soft_targets: SoftTargets | None) -> Objective:
    """Build the objective that the recipe names, or else the default of its stage.

    Args:
        recipe: The run's recipe.
        soft_targets: The teacher's soft targets, in the distill stage.

    Raises:
        UserError: the objective or one of its options is unknown, or the objective does not fit the stage.
    """
    if recipe.objective is None:
        name, options = ("cross_entropy" if recipe.distill is None else "distillation"), {}
    else:
        name, options = recipe.objective.name, recipe.objective.options
    entry = find_plugin(objective_table(), name, "objective.name")
    return entry.build(validate(options, entry.options, f"objective.options ({name})"), recipe, soft_targets)


def check_labels(recipe: Recipe, folder: Shards, clips: Iterable[Clip], world: World) -> None:
    """Check, before the first step, that losses and scores can be computed. Every rank must call this.

    Args:
        recipe: The run's recipe.
        folder: The opened shards.
        clips: The training clips.
        world: This rank.

    Raises:
        UserError: a training clip has no label for a head of its dataset, a class of a training or validation clip does
            not exist, or no clip of a validation split has a label for every head of its dataset.
    """
    raise_on_all(_label_problem(recipe, folder, clips) if world.is_main else None)


def _label_problem(recipe: Recipe, folder: Shards, clips: Iterable[Clip]) -> str | None:
    data = recipe.data
    parts: list[tuple[Shards, DataRecipe]] = [(folder, data)]
    if data.mixture:
        parts = [(open_dataset(data, name), data.of_dataset(name)) for name in sorted(data.mixture)]
    validated: list[tuple[str, Shards, list[Clip]]] = []
    try:
        for part, own in parts:
            if own.validation_split != own.train_split:
                validated.append((own.validation_split, part, part.clips(own.validation_split)))
    except UserError as error:
        return str(error)
    problems = (_unscored(*each) for each in validated)
    return _unlabelled(data.train_split, folder, clips) or next(filter(None, problems), None)


def _unlabelled(split: str, folder: Shards, clips: Iterable[Clip]) -> str | None:
    for clip in clips:
        classes = folder.classes_of(clip)
        head = next((head for head in classes if clip.labels.get(head) is None), None)
        if head is not None:
            return (
                f"{folder.where}: clip {clip.key} of split '{split}' has no label for head '{head}': train on a "
                "labelled split (data.train_split), or pack without this clip"
            )
        if problem := label_problem(classes, clip.labels):
            return f"{folder.where}: clip {clip.key} of split '{split}': {problem}: pack the clips again"
    return None


def _unscored(split: str, folder: Shards, clips: Sequence[Clip]) -> str | None:
    for clip in clips:
        if problem := label_problem(folder.classes, clip.labels):
            return f"{folder.where}: clip {clip.key} of split '{split}': {problem}: pack the clips again"
    if clips and not any(None not in clip.labels.values() for clip in clips):
        return (
            f"{folder.where}: no clip of split '{split}' has a label for every head, so a validation has nothing to "
            "score: name a labelled split in data.validation_split"
        )
    return None


def soft_targets_of(teacher: Teacher | ShardedModule, memory: TeacherMemory | None = None) -> SoftTargets:
    """Return a function that computes the soft targets of a frozen teacher, or remembers its answers.

    Args:
        teacher: The teacher.
        memory: Its memory; None: it is asked about every batch.
    """
    module = teacher.module if isinstance(teacher, ShardedModule) else teacher
    assert isinstance(module, Teacher)

    def ask(batch: Batch | None) -> Tensor:
        subsets = "drawn" if memory is None or not memory.has_all_subsets else "all"
        inputs, present_BM = ({}, module.nothing()) if batch is None else batch.with_dropped(module.modalities)
        answers: Tensor = teacher(inputs, present_BM, answers_for=subsets)
        return answers

    def soft_targets(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            answers_BEA = ask(batch) if memory is None else memory.answers(batch, ask)
            return module.log_probs(answers_BEA, batch.present_BM, batch.labels)

    return soft_targets
