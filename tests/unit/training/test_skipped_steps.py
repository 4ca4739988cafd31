"""A step that is not finite changes nothing at any ZeRO stage and is logged; K consecutive ones end the run."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, free_port
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.models.model_card import find_nonfinite
from karmma_dist.recipe import Recipe
from karmma_dist.training.checkpoint.checkpoint import find_damage
from karmma_dist.training.engine import Engine
from karmma_dist.training.fault_tolerance.skipped_steps import RankStep, SkippedSteps, describe
from karmma_dist.training.objectives import CrossEntropy
from karmma_dist.training.trainer import train

RECIPE: dict[str, Any] = {
    "name": "run",
    "stage": "supervised",
    "data": {"shards": "nowhere", "modalities": ["audio"], "num_workers": 0},
    "inputs": {"audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 16}},
    "model": {
        "encoders": {"audio": {"name": "small_audio", "options": {"width": 4}}},
        "width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16,
    },
    "optimizer": {"name": "adamw", "lr": 0.01, "warmup_epochs": 0, "clip": 1.0},
    "training": {"batch_size": 6, "epochs": 1, "log_every_steps": 1, "threads": 1},
}  # fmt: skip


def recipe(**changes: dict[str, Any] | str) -> Recipe:
    tree = copy.deepcopy(RECIPE)
    for section, values in changes.items():
        if isinstance(values, dict):
            tree[section] |= values
        else:
            tree[section] = values
    return Recipe.model_validate(tree)


@pytest.fixture
def world() -> Iterator[World]:
    single = World(0, 0, 1, "127.0.0.1", free_port())
    with process_group(single):
        yield single


class Line(nn.Module):
    """A linear layer, with a parameter that is multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return logits (B, 2)."""
        return {"out": self.layer(inputs["x"]) + 0 * self.idle}


def state_of(engine: Engine) -> list[Tensor]:
    """Return the parameters and the optimizer state."""
    inner = [value for state in engine._optimizer.state.values() for value in state.values()]
    masters = [p for group in engine._optimizer.param_groups for p in group["params"]]
    return [torch.as_tensor(value).clone() for value in (*engine.full_state().values(), *masters, *inner)]


@pytest.mark.parametrize("loss_is_finite", [True, False])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")]
)
def test_skipped_step_changes_nothing_and_the_next_step_applies(
    world: World, stage: int, precision: str, accumulation: int, loss_is_finite: bool
) -> None:
    torch.manual_seed(0)
    training = {"zero_stage": stage, "precision": precision, "accumulation": accumulation}
    engine = Engine(Line(), recipe(training=training), world)
    x_BC = torch.randn(6, 3).to(engine.dtype)

    def step(bad: bool) -> tuple[Any, list[Tensor], list[Tensor]]:
        for micro in range(accumulation):
            loss = engine.forward({"x": x_BC}, torch.ones(6, 1, dtype=torch.bool))["out"].float().square().sum()
            if bad and micro == 0 and loss_is_finite:
                loss = loss + torch.sqrt(0 * loss).clamp(max=1)  # adds 0; its gradient is inf * 0
            elif bad and micro == 0:
                loss = loss + torch.tensor(torch.inf)  # a gradient that is finite
            assert bool(loss.isfinite()) == (loss_is_finite or not (bad and micro == 0))
            engine.backward(loss)
            before = state_of(engine)
            update = engine.step(0.01)
        return update, before, state_of(engine)

    for bad in (False, True, False, True):
        update, before, after = step(bad)
        assert update.skipped == bad
        assert (update.norm is None) == bad
        same = len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert same == bad


def test_clip_zero_disables_clipping(world: World) -> None:
    """Check that 0 disables clipping, since DeepSpeed clips at 1 by default."""
    moved = {}
    for clip in (0.0, 1.0):
        torch.manual_seed(0)
        model = Line()
        engine = Engine(model, recipe(optimizer={"name": "sgd", "clip": clip}, training={"zero_stage": 1}), world)
        start = engine.full_state()["layer.bias"]
        loss = 1000 * engine.forward({"x": torch.ones(6, 3)}, torch.ones(6, 1, dtype=torch.bool))["out"][:, 0].sum()
        engine.backward(loss)
        update = engine.step(0.01)
        moved[clip] = float((engine.full_state()["layer.bias"] - start).abs().max())
        assert update.norm == pytest.approx(6000 * 2, rel=1e-5)  # three weights and a bias
    assert moved == pytest.approx({0.0: 60.0, 1.0: 0.01 * 0.5}, rel=1e-4)


def rank_step(bad: bool, clips: list[str]) -> RankStep:
    return RankStep(3, not bad, clips)


def test_ranks_with_a_bad_loss_are_named_or_else_all() -> None:
    others = [RankStep(0, True, ["a"]), RankStep(1, False, ["b", "c"])]
    skips = SkippedSteps(5, lambda mine: [*others, *mine])
    event = skips.record_skip(rank_step(False, ["d"]))
    assert describe(event) == "the loss is not finite on rank 1 with b, c"
    skips = SkippedSteps(5, lambda mine: [others[0], *mine])
    event = skips.record_skip(rank_step(False, ["d"]))
    assert describe(event) == "the gradient is not finite on rank 0 with a; rank 3 with d"
    json.dumps(event)


def test_only_consecutive_skips_end_the_run_but_not_loss_scaling() -> None:
    skips = SkippedSteps(2, list, scales_loss=True)
    for _ in range(3):
        skips.give_up_after_too_many(skips.record_skip(rank_step(True, ["a"])))
        skips.record_update()
        skips.give_up_after_too_many(skips.record_skip(rank_step(False, ["a"])))
    assert (skips.num_skipped, skips.num_rescaled) == (3, 3)
    skips.record_skip(rank_step(True, ["a"]))
    with pytest.raises(UserError, match=r"2 optimizer steps in a row were skipped.*allows 1: the loss is not finite"):
        skips.give_up_after_too_many(skips.record_skip(rank_step(True, ["a"])))


def test_run_survives_a_bad_step_but_not_too_many(
    world: World, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a run whose steps 2, and 7 to the end, are bad: 3 consecutive ones are too many, so it ends at step 9."""
    calls: list[list[str]] = []
    honest = CrossEntropy.loss

    def poisoned(self: CrossEntropy, logits: dict[str, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(batch.keys)
        loss, parts = honest(self, logits, batch)
        bad = len(calls) == 2 or len(calls) >= 7
        loss = loss * torch.nan if bad else loss
        return loss, {**parts, "loss": loss.detach()}

    monkeypatch.setattr(CrossEntropy, "loss", poisoned)
    data = {"shards": str(shards)}
    run = recipe(data=data, training={"epochs": 4, "max_skipped_steps": 3}, runs_dir=str(tmp_path))
    with pytest.raises(UserError, match="3 optimizer steps in a row were skipped"):
        train(run, world, validate)
    lines = [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    assert [line["step"] for line in skipped] == [2, 7, 8, 9]
    assert [line["suspects"][0]["clips"] for line in skipped] == [calls[i] for i in (1, 6, 7, 8)]
    losses = {line["step"]: line.get("loss") for line in lines if line["kind"] == "train"}
    assert {step for step, loss in losses.items() if loss is None} == {2, 7, 8}
    steps_per_epoch = len(calls[0]) and 28 // 6
    saved = [path.name for path in sorted((run.run_dir / "checkpoints").glob("step-*"))]
    assert saved == [f"step-{steps_per_epoch:08d}"]  # that of step 8 is due while steps are being skipped
    assert json.loads((run.run_dir / "state.json").read_text())["state"] == "failed"


def test_a_checkpoint_due_at_a_skipped_step_is_saved_after_the_next_update(
    world: World, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a run whose steps 3, 4 and 12, the last, are bad; checkpoints are due after steps 4, 8 and 12."""
    honest, calls = CrossEntropy.loss, []

    def poisoned(self: CrossEntropy, logits: dict[str, Tensor], batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(batch.step)
        loss, parts = honest(self, logits, batch)
        return loss * (torch.nan if len(calls) in (3, 4, 12) else 1.0), parts

    monkeypatch.setattr(CrossEntropy, "loss", poisoned)
    training = {"epochs": 3, "max_skipped_steps": 3, "keep_checkpoints": 9}
    run = recipe(data={"shards": str(shards)}, training=training, runs_dir=str(tmp_path))
    train(run, world, validate)
    saved = [path.name for path in sorted((run.run_dir / "checkpoints").glob("step-*"))]
    assert saved == ["step-00000005", "step-00000008"]
    assert json.loads((run.run_dir / "state.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("moment", ["checkpoint", "validation"])
def test_a_diverged_model_replaces_neither_a_checkpoint_nor_weights(
    world: World, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Check a run with parameters that become NaN in the middle of an epoch, or just before a validation."""
    settings = {"epochs": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 1, "validate_every_epochs": 1}
    run = recipe(data={"shards": str(shards)}, training=settings, runs_dir=str(tmp_path))
    step, counted = Engine.step, []
    at = 5 if moment == "checkpoint" else 8

    def diverging(self: Engine, lr: float) -> Any:
        update = step(self, lr)
        counted.append(lr)
        if len(counted) == at:
            next(iter(self.model.parameters())).data.fill_(torch.nan)
            for flat in self._shards._flats:
                flat.data[0] = torch.nan
        return update

    monkeypatch.setattr(Engine, "step", diverging)
    with pytest.raises(UserError, match=r"not saved, .* diverged: .* holds NaN or infinity|the weights diverged"):
        train(run, world, validate)
    (saved,) = (run.run_dir / "checkpoints").glob("step-*")
    assert saved.name == f"step-{at - 1:08d}"
    assert find_damage(saved) is None
    for folder in (run.run_dir, run.run_dir / "best"):
        assert find_nonfinite(load_file(folder / "weights.safetensors").items()) is None
    assert json.loads((run.run_dir / "state.json").read_text())["state"] == "failed"
