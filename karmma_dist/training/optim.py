"""The optimizer, with parameter groups for weight decay, and the learning rate of each step.

Learning rate: linear warm-up, then a cosine or linear decay back to the start value (paper, Sec. IV).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from karmma_dist.recipe import OptimizerRecipe, Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build AdamW or SGD over the trainable parameters, in groups with and without weight decay."""
    settings = recipe.optimizer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = [] if settings.decay_norms else [name for name, p in trained.items() if _is_undecayed(name, p)]
    groups = [
        {"params": [p for name, p in trained.items() if name not in undecayed], "weight_decay": settings.weight_decay},
        {"params": [trained[name] for name in undecayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Return True for norms, biases, learnable tokens and position tables."""
    return parameter.ndim < 2 or any(word in name for word in ("token", "position", "pos_embed"))


def learning_rate(
    recipe: OptimizerRecipe, step: int, steps_per_epoch: int, total_steps: int, batch_size: int
) -> float:
    """Return the learning rate of optimizer step `step` (0-based).

    The rate rises from start_lr to lr over the warm-up, then falls to start_lr at the last step along
    `recipe.schedule`. A warm-up as long as the run rises until the step before the last, which has start_lr too; the
    only step of a run has lr. Both rates are scaled to `batch_size` (clips per optimizer step) as `recipe.lr_scaling`
    says.
    """
    return recipe.rate_factor(batch_size) * _unscaled(recipe, step, steps_per_epoch, total_steps)


def _unscaled(recipe: OptimizerRecipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    last = total_steps - 1
    if last == 0:
        return recipe.lr
    if step == last:
        return recipe.start_lr
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup
    progress = (step - warmup) / (last - warmup)
    if recipe.schedule == "linear":
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * (1 - progress)
    return recipe.start_lr + (recipe.lr - recipe.start_lr) * 0.5 * (1 + math.cos(math.pi * progress))
