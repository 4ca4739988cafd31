"""Tests of the objective that weighs hard combinations of modalities: it finds them, and every rank finds the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.models.losses import cross_entropy
from karmma_dist.recipe import Recipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.hard_combinations import HardCombinations
from karmma_dist.training.objectives import build_objective
from karmma_dist.training.trainer import train
from kits.experts import HEADS, make_recipe
from kits.recipes import tiny_recipe
from kits.students import MODALITIES, interrupted_at, lines, weights

ONE, TWO, THREE = 1, 2, 4
"""Sets of a single modality."""
EVERY_SET = range(1, 8)


def objective(folder: Path, modalities: Sequence[str] = ("video", "flow", "audio"), **options: Any) -> HardCombinations:
    recipe = make_recipe(folder, modalities, objective={"name": "hard_combinations", "options": options})
    built = build_objective(recipe, None)
    assert isinstance(built, HardCombinations)
    return built


def batch_of(sets: Sequence[int], epoch: int = 9, num_modalities: int = 3) -> Batch:
    present_BM = torch.tensor([[bool(which >> m & 1) for m in range(num_modalities)] for which in sets])
    labels = {head: torch.arange(len(sets)) % num for head, num in HEADS.items()}
    keys = [f"clip_{number}" for number in range(len(sets))]
    return Batch(keys, present_BM, {}, labels, torch.ones(len(sets), dtype=torch.bool), {}, epoch=epoch)


def logits_for(batch: Batch, hard: int = 0) -> dict[str, Tensor]:
    """Return random logits that are wrong for the clips of one set (0: no clip)."""
    generator = torch.Generator().manual_seed(3)
    logits = {head: torch.randn(len(batch.keys), num, generator=generator) for head, num in HEADS.items()}
    is_hard_B = (batch.present_BM.long() << torch.arange(3)).sum(dim=1) == hard
    return {
        head: x - 9.0 * F.one_hot(batch.labels[head], x.shape[1]) * is_hard_B[:, None] for head, x in logits.items()
    }


@pytest.mark.parametrize(
    ("hard", "parts"),
    [(ONE | TWO, {ONE, TWO, ONE | TWO}), (TWO | THREE, {TWO, THREE, TWO | THREE})],
)
def test_the_hardest_combination_and_its_parts_weigh_more(tmp_path: Path, hard: int, parts: set[int]) -> None:
    built = objective(tmp_path, weight=0.5)
    batch = batch_of(EVERY_SET)
    built.loss(logits_for(batch, hard), batch)
    built.sums.commit(lambda own: own, keep=True)
    logits = logits_for(batch)
    loss, figures = built.loss(logits, batch)
    losses_B = torch.stack(
        [F.cross_entropy(x, batch.labels[head], reduction="none") for head, x in logits.items()]
    ).mean(dim=0)
    weights_B = torch.tensor([1.5 if which in parts else 1.0 for which in EVERY_SET])
    torch.testing.assert_close(loss, (losses_B * weights_B).mean())
    torch.testing.assert_close(figures["cross_entropy"], cross_entropy(logits, batch.labels))
    assert float(figures["hard_share"]) == pytest.approx(3 / 7)


@pytest.mark.parametrize("hard", [ONE, ONE | TWO | THREE])
def test_a_single_modality_or_all_of_them_are_not_mined(tmp_path: Path, hard: int) -> None:
    built = objective(tmp_path)
    batch = batch_of([hard] * 4)
    built.loss(logits_for(batch, hard), batch)
    built.sums.commit(lambda own: own, keep=True)
    assert not built.loss(logits_for(batch, hard), batch)[1]["hard_share"]


def test_of_two_modalities_the_harder_one_is_hard(tmp_path: Path) -> None:
    built = objective(tmp_path, ["video", "audio"])
    batch = batch_of([ONE, TWO, ONE | TWO], num_modalities=2)
    logits = {head: torch.zeros(3, num) for head, num in HEADS.items()}
    for head, x in logits.items():
        x[1, batch.labels[head][1]] = -5
    built.loss(logits, batch)
    built.sums.commit(lambda own: own, keep=True)
    assert built._hard(torch.device("cpu")).nonzero().flatten().tolist() == [TWO]


def test_nothing_is_weighed_in_the_warm_up_or_by_the_step_itself(tmp_path: Path) -> None:
    built = objective(tmp_path, warmup_epochs=3)
    for epoch, is_weighed in ((0, False), (2, False), (3, True)):
        batch = batch_of(EVERY_SET, epoch)
        logits = logits_for(batch, ONE | TWO)
        for _ in range(2):
            loss, figures = built.loss(logits, batch)
            assert bool(figures["hard_share"]) == is_weighed
            assert bool(loss > cross_entropy(logits, batch.labels) + 1e-6) == is_weighed
        built.sums.commit(lambda own: own, keep=True)


def test_a_model_of_one_modality_has_no_hard_combination(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'hard_combinations' compares combinations of modalities.*only audio"):
        objective(tmp_path, ["audio"])


@pytest.mark.parametrize(("options", "field"), [({"weight": -1}, "weight"), ({"warmup": 3}, "warmup_epochs")])
def test_an_option_that_makes_no_sense_is_named(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"objective\.options \(hard_combinations\).*{field}"):
        objective(tmp_path, **options)


def rival(folder: Path, shards: Path, name: str) -> Recipe:
    """Return a recipe in which every step depends on sums over the steps before: of tokens, and of losses."""
    tree = tiny_recipe(
        MODALITIES, name=name, seed=4, runs_dir=str(folder),
        data={"shards": str(shards), "modality_dropout": {"probability": 0.5}, "keep_decoded": "100 MB"},
        model={"missing": "mean"},
        objective={"name": "hard_combinations", "options": {"warmup_epochs": 0}},
        optimizer={"lr": 0.01},
        training={"epochs": 2, "batch_size": 6, "log_every_steps": 1, "checkpoint_every_steps": 1},
    )  # fmt: skip
    return Recipe.model_validate(tree)


def test_a_run_resumes_with_the_sums_of_earlier_steps(shards: Path, tmp_path: Path, world: World) -> None:
    whole, broken = rival(tmp_path, shards, "whole"), rival(tmp_path, shards, "broken")
    train(whole, world, validate)
    with interrupted_at(6), pytest.raises(KeyboardInterrupt):
        train(broken, world, validate)
    train(broken, world, validate)
    assert weights(broken) == weights(whole)
    figures = [(entry["loss"], entry["cross_entropy"], entry["hard_share"]) for entry in lines(whole)]
    assert [(entry["loss"], entry["cross_entropy"], entry["hard_share"]) for entry in lines(broken)] == figures
    assert sum(share > 0 for *_, share in figures) > 5


def test_a_checkpoint_of_another_objective_is_refused(shards: Path, tmp_path: Path, world: World) -> None:
    other = rival(tmp_path, shards, "other").model_copy(update={"objective": None})
    train(other, world, validate)
    checkpoint = str(next((other.run_dir / "checkpoints").glob("step-*")))
    with pytest.raises(UserError, match=r"step-.*: saved with another objective: start over with --resume never"):
        train(rival(tmp_path, shards, "mine"), world, validate, resume=checkpoint)
