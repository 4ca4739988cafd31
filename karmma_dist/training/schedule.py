"""Learning rate as a function of the optimizer step (paper: linear warm-up, cosine back to the start value)."""

from __future__ import annotations

import math

from karmma_dist.recipe import OptimizerRecipe


def learning_rate(recipe: OptimizerRecipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0-based): start_lr -> lr over the warm-up, then down to start_lr at the last."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup
    span = total_steps - 1 - warmup
    progress = (step - warmup) / span if span > 0 else 1.0
    return recipe.start_lr + (recipe.lr - recipe.start_lr) * 0.5 * (1 + math.cos(math.pi * progress))
