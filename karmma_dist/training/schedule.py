"""Learning rate as a function of the optimizer step (paper, Sec. IV: linear warm-up, cosine to the start value)."""

from __future__ import annotations

import math

from karmma_dist.recipe import OptimizerRecipe


def learning_rate(
    recipe: OptimizerRecipe, step: int, steps_per_epoch: int, total_steps: int, batch_size: int
) -> float:
    """Return the rate of optimizer step `step` (0-based).

    start_lr -> lr over the warm-up, then down to start_lr at the last step, along `recipe.schedule`; both rates are
    scaled to `batch_size` (clips per optimizer step) as the recipe says.
    """
    return recipe.rate_factor(batch_size) * _unscaled(recipe, step, steps_per_epoch, total_steps)


def _unscaled(recipe: OptimizerRecipe, step: int, steps_per_epoch: int, total_steps: int) -> float:
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * step / warmup
    span = total_steps - 1 - warmup
    progress = (step - warmup) / span if span > 0 else 1.0
    if recipe.schedule == "linear":
        return recipe.start_lr + (recipe.lr - recipe.start_lr) * (1 - progress)
    return recipe.start_lr + (recipe.lr - recipe.start_lr) * 0.5 * (1 + math.cos(math.pi * progress))
