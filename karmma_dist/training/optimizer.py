"""The optimizer, in parameter groups with and without weight decay."""

from __future__ import annotations

import torch
from torch import nn

from karmma_dist.recipe import Recipe


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters, in groups with and without weight decay."""
    settings = recipe.optimizer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [] if settings.decay_norms else [name for name, p in trained.items() if _is_undecayed(name, p)]
    groups = [
        {"params": [p for name, p in trained.items() if name not in plain], "weight_decay": settings.weight_decay},
        {"params": [trained[name] for name in plain], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases, learnable tokens and position tables."""
    return parameter.ndim < 2 or any(word in name for word in ("token", "position", "pos_embed"))
