"""Weight decay applies to the weights of linear layers and convolutions, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import load_recipe
from karmma_dist.training.optim import build_optimizer


@pytest.mark.parametrize("decay_norms", [False, True])
def test_only_linear_and_convolution_weights_of_the_student_decay(decay_norms: bool) -> None:
    recipe = load_recipe("epic_kitchens/distill", [f"optimizer.decay_norms={decay_norms}"])
    with torch.device("meta"):
        model = KarmmaModel(recipe.model, recipe.inputs, recipe.data.modalities, {"verb": 97, "noun": 300})
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = build_optimizer(model, recipe).param_groups
    grouped = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    decayed = {names[p] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {group["weight_decay"] for group in groups} <= {0.0, recipe.optimizer.weight_decay}
    layer_types = nn.Linear | nn.Conv2d | nn.Conv3d
    layers = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, layer_types)}
    assert decayed == (set(names.values()) if decay_norms else layers)
    others = set(names.values()) - layers
    for word in ("relative_position_bias_table", "pos_embed", "cls_token", "dist_token", "modality_token", ".bias"):
        assert any(word in name for name in others)
