"""Two ranks with the clips of different datasets learn what one process learns from all, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.streaming import order
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips, open_shards
from karmma_dist.streaming.order import Slice
from kits.mixtures import mixture_recipe
from kits.ranks import karmma_dist, outcome

BATCH_SIZE, NUM_STEPS = 6, 8
APART = (
    "import numpy as np\n"
    "from karmma_dist.streaming import order\n"
    "order._evenly_spread = lambda counts: np.tile(np.repeat(np.arange(2, dtype=np.int16), 3), sum(counts) // 6)\n"
)
"""Script that gives the first half of each batch, and so the first of two ranks, to the first dataset alone."""


def recipe_of(folder: Path, shards: Path, actions: Path) -> Recipe:
    mixture = {
        "actions": {"shards": str(actions), "weight": 1}, "kitchen": {"shards": str(shards), "weight": 1},
    }  # fmt: skip
    data = {"modality_dropout": {"probability": 0.5}}
    plain = {"weight_decay": 0.0, "start_lr": 0.1}
    return mixture_recipe(
        folder / "runs", mixture, name="student", data=data, training={"epochs": 1}, optimizer=plain
    )


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over clips of the mean over the heads that a clip has, clip by clip."""
    logits = model(batch.inputs, batch.present_BM)
    losses = []
    for clip in range(len(batch.keys)):
        own = [
            F.cross_entropy(logits_BC[clip], batch.labels[head][clip])
            for head, logits_BC in logits.items() if batch.labels[head][clip] >= 0
        ]  # fmt: skip
        losses.append(torch.stack(own).mean())
    return torch.stack(losses).mean()


def trained_alone(recipe: Recipe) -> tuple[KarmmaModel, list[float], list[str]]:
    """Train in this process, each global batch at once; return the model, the losses and all keys."""
    folder = open_shards(recipe.data)
    model = build_model(recipe, folder.classes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.optimizer.lr)
    clips = TrainingClips(folder, recipe.data, recipe.inputs, recipe.seed, BATCH_SIZE)
    losses, keys = [], []
    for step in range(NUM_STEPS):
        raw = clips.batch(Slice(0, step, step * BATCH_SIZE, (step + 1) * BATCH_SIZE))
        loss = loss_of(model, prepare(raw, recipe.inputs, "cpu"))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        losses.append(loss.item())
        keys += raw.keys
    return model, losses, keys


@pytest.fixture(scope="module")
def reference(
    shards: Path, actions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The weights before and after, and the loss of every step, of one process."""
    recipe = recipe_of(tmp_path_factory.mktemp("reference"), shards, actions)
    start = build_model(recipe, open_shards(recipe.data).classes).state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_evenly_spread", None)  # so that what the script replaces comes back
        exec(APART, {})
        model, losses, keys = trained_alone(recipe)
    assert [key.partition("/")[0] for key in keys] == (["actions"] * 3 + ["kitchen"] * 3) * NUM_STEPS
    return start, dict(model.state_dict()), losses


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_ranks_of_different_datasets_learn_what_one_process_learns(
    reference: Any, shards: Path, actions: Path, tmp_path: Path, zero_stage: int
) -> None:
    """Check weights and losses: no head is on both ranks."""
    start, expected, losses = reference
    recipe = recipe_of(tmp_path, shards, actions)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    karmma_dist(
        tmp_path, "train", "recipe.yaml", f"--set=training.zero_stage={zero_stage}", num_ranks=2, script=APART
    )
    weights, losses_of_ranks = outcome(tmp_path)
    assert losses_of_ranks == pytest.approx(losses, abs=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-6, rtol=0)
        assert not torch.equal(tensor, start[name]) or "encoders" in name
