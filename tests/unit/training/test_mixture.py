"""Training on a mixture: each clip trains the heads of its dataset, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.errors import Stopped, UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.models.losses import cross_entropy, distillation
from karmma_dist.training.fault_tolerance.preemption import PreemptionHandler, Stop
from karmma_dist.training.tracking import Averages, accuracies, entropies, labelled_shares, over_labelled
from karmma_dist.training.trainer import train
from kits.mixtures import mixture_recipe, write_actions
from kits.students import lines, weights

SIZES = {"verb": 5, "noun": 3, "action": 7}


@st.composite
def labelled_batches(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Draw logits, a teacher's log-probabilities, and labels of which every clip has some, for up to 8 clips."""
    has = draw(st.lists(st.sampled_from([(1, 1, 0), (0, 0, 1), (1, 1, 1), (0, 1, 0)]), min_size=1, max_size=8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    logits = {head: torch.randn(len(has), num, generator=generator) for head, num in SIZES.items()}
    taught = {head: torch.randn(len(has), num, generator=generator).log_softmax(-1) for head, num in SIZES.items()}
    labels = {}
    for place, (head, num) in enumerate(SIZES.items()):
        drawn = torch.randint(num, (len(has),), generator=generator)
        labels[head] = torch.where(torch.tensor([flags[place] == 1 for flags in has]), drawn, -1)
    return logits, taught, labels


def known(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    return {head: labels_B >= 0 for head, labels_B in labels.items()}


def rows(values: dict[str, Tensor], places: slice) -> dict[str, Tensor]:
    return {head: tensor[places] for head, tensor in values.items()}


@given(labelled_batches())
def test_a_clips_loss_is_the_mean_over_the_heads_it_has(batch: Any) -> None:
    logits, taught, labels = batch
    hard, soft = [], []
    for clip in range(len(labels["verb"])):
        own = [head for head in SIZES if labels[head][clip] >= 0]
        hard.append(sum(-logits[head][clip].log_softmax(-1)[labels[head][clip]] for head in own) / len(own))
        divergences = [
            (taught[head][clip].exp() * (taught[head][clip] - (logits[head][clip] / 2).log_softmax(-1))).sum()
            for head in own
        ]
        soft.append(4 * sum(divergences) / len(own))
    torch.testing.assert_close(cross_entropy(logits, labels, known(labels)), sum(hard) / len(hard))
    torch.testing.assert_close(distillation(logits, taught, 2.0, known(labels)), sum(soft) / len(soft))


@given(labelled_batches())
def test_equal_parts_of_a_batch_have_its_loss_as_their_mean(batch: Any) -> None:
    logits, taught, labels = (
        {head: torch.cat([tensor, tensor.flip(0)]) for head, tensor in values.items()} for values in batch
    )
    half = len(labels["verb"]) // 2
    parts = [[rows(values, part) for values in (logits, taught, labels)] for part in (slice(half), slice(half, None))]
    means = [
        sum(cross_entropy(one, own, known(own)) for one, _, own in parts) / 2,
        sum(distillation(one, other, 1.0, known(own)) for one, other, own in parts) / 2,
    ]
    torch.testing.assert_close(means[0], cross_entropy(logits, labels, known(labels)))
    torch.testing.assert_close(means[1], distillation(logits, taught, 1.0, known(labels)))


def test_a_head_that_no_clip_has_gets_zero_gradients() -> None:
    logits = {head: torch.randn(4, num, requires_grad=True) for head, num in SIZES.items()}
    labels = {"verb": torch.tensor([0, 1, 2, 3]), "noun": torch.tensor([0, 1, 2, 0]), "action": torch.full((4,), -1)}
    cross_entropy(logits, labels, known(labels)).backward()
    assert logits["action"].grad is not None
    assert not logits["action"].grad.any()
    plain = {head: logits[head].detach().clone().requires_grad_() for head in ("verb", "noun")}
    cross_entropy(plain, rows(labels, slice(None))).backward()
    for head, tensor in plain.items():
        torch.testing.assert_close(logits[head].grad, tensor.grad)


@given(st.lists(labelled_batches(), min_size=1, max_size=3))
def test_measurements_of_a_head_are_means_over_the_clips_that_have_it(batches: list[Any]) -> None:
    """Repeat the clips of each pass to the same number, as passes have."""
    passes = [
        [{head: torch.cat([tensor] * (840 // len(tensor))) for head, tensor in values.items()} for values in batch]
        for batch in batches
    ]
    averages = Averages()
    for logits, _, labels in passes:
        averages.add({
            **labelled_shares(known(labels)), **accuracies("train", logits, labels, known(labels)),
            **entropies("train", logits, known(labels)),
        })  # fmt: skip
    means = over_labelled(averages.take())
    right_in_all = []
    for head in SIZES:
        logits_NC, labels_N = (torch.cat([each[place][head] for each in passes]) for place in (0, 2))
        has_N = labels_N >= 0
        right_in_all.append((logits_NC.argmax(-1) == labels_N) | ~has_N)
        assert means[f"labelled_{head}"] == pytest.approx(float(has_N.float().mean()))
        if not has_N.any():
            assert f"train_accuracy_{head}" not in means
            continue
        log_probs = logits_NC[has_N].log_softmax(-1)
        expected = float((log_probs.argmax(-1) == labels_N[has_N]).float().mean())
        assert means[f"train_accuracy_{head}"] == pytest.approx(expected, abs=1e-5)
        expected = float(-(log_probs.exp() * log_probs).sum(-1).mean())
        assert means[f"train_entropy_{head}"] == pytest.approx(expected, abs=1e-4)
    assert means["train_accuracy"] == pytest.approx(float(torch.stack(right_in_all).all(0).float().mean()), abs=1e-5)
    assert not any("/" in name for name in means)


@pytest.fixture
def both(shards: Path, actions: Path) -> dict[str, Any]:
    return {"kitchen": {"shards": str(shards), "weight": 1}, "actions": {"shards": str(actions), "weight": 1}}


def test_a_mixture_of_one_dataset_learns_what_the_dataset_alone_learns(
    shards: Path, tmp_path: Path, world: World
) -> None:
    mixed = mixture_recipe(tmp_path, {"kitchen": {"shards": str(shards), "weight": 2}}, name="mixed")
    alone = mixture_recipe(tmp_path, {}, name="alone", data={"shards": str(shards)})
    metrics = [train(recipe, world, validate) for recipe in (mixed, alone)]
    assert weights(mixed) == weights(alone)
    assert [entry["loss"] for entry in lines(mixed)] == [entry["loss"] for entry in lines(alone)]
    assert metrics[0] == metrics[1] | {f"kitchen/{name}": value for name, value in metrics[1].items()}


class StopAfter(PreemptionHandler):
    """Preemption after a number of steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(0)
        self._left = steps

    def agree(self, run_dir: Path) -> Stop | None:
        self._left -= 1
        return Stop("test", 0) if self._left == 0 else super().agree(run_dir)


def test_a_resumed_run_ends_with_the_same_bits(both: dict[str, Any], tmp_path: Path, world: World) -> None:
    """Stop in the middle of the second of two epochs of 8 steps."""
    dropout = {"modality_dropout": {"probability": 0.5}}
    runs = [mixture_recipe(tmp_path, both, name=name, data=dropout) for name in ("whole", "resumed")]
    train(runs[0], world, validate)
    with pytest.raises(Stopped):
        train(runs[1], world, validate, preemption=StopAfter(11))
    metrics = train(runs[1], world, validate)
    assert weights(runs[0]) == weights(runs[1])
    assert [e["loss"] for e in lines(runs[0])] == [e["loss"] for e in lines(runs[1])]
    expected = {f"{name}/{metric}" for name in both for metric in ("action_top1", "num_clips")}
    assert expected <= set(metrics)


def test_validation_is_by_the_heads_of_each_dataset(both: dict[str, Any], tmp_path: Path, world: World) -> None:
    recipe = mixture_recipe(tmp_path, both, training={"best_metric": "kitchen/noun_loss"})
    metrics = train(recipe, world, validate)
    assert next(iter(metrics)) == "action_top1"
    assert metrics["action_top1"] == (metrics["kitchen/action_top1"] + metrics["actions/action_top1"]) / 2
    assert metrics["verb_top1"] == metrics["kitchen/verb_top1"]
    assert "actions/verb_top1" not in metrics
    assert (metrics["kitchen/num_clips"], metrics["actions/num_clips"], metrics["num_clips"]) == (10, 6, 16)
    best = json.loads((recipe.run_dir / "best/state.json").read_text())
    assert (best["metric"], best["value"]) == ("kitchen/noun_loss", metrics["kitchen/noun_loss"])
    entry = lines(recipe)[0]
    assert entry["labelled_verb"] == entry["labelled_noun"] == 0.5
    assert math.isfinite(entry["train_accuracy_action"])


def test_a_metric_that_no_dataset_has_is_refused(both: dict[str, Any], tmp_path: Path, world: World) -> None:
    recipe = mixture_recipe(tmp_path, both, training={"best_metric": "actions/verb_top1"})
    with pytest.raises(UserError, match=r"training\.best_metric: no metric 'actions/verb_top1'.*actions/action_top1"):
        train(recipe, world, validate)


def test_a_student_is_taught_the_heads_that_its_clips_have(
    both: dict[str, Any], tmp_path: Path, world: World
) -> None:
    train(mixture_recipe(tmp_path, both, name="teacher", training={"epochs": 1}), world, validate)
    student = mixture_recipe(
        tmp_path, both, name="student", stage="distill", distill={"teacher": "teacher"}, training={"epochs": 1}
    )
    train(student, world, validate)
    for entry in lines(student):
        assert entry["kl"] > 0
        assert entry["loss"] == pytest.approx(0.7 * entry["cross_entropy"] + 0.3 * entry["kl"], rel=1e-5)
        assert 0 <= entry["agreement_action"] <= 1


def test_hard_combinations_are_found_by_the_heads_that_clips_have(
    both: dict[str, Any], tmp_path: Path, world: World
) -> None:
    objective = {"name": "hard_combinations", "options": {"warmup_epochs": 0}}
    recipe = mixture_recipe(
        tmp_path, both, objective=objective, data={"modality_dropout": {"probability": 0.5}}, training={"epochs": 1}
    )
    train(recipe, world, validate)
    for entry in lines(recipe):
        assert 1 < entry["cross_entropy"] <= entry["loss"] < 10
    assert any(entry["hard_share"] > 0 for entry in lines(recipe))


def test_a_checkpoint_of_another_mixture_is_refused(
    both: dict[str, Any], shards: Path, tmp_path: Path, world: World
) -> None:
    first = mixture_recipe(tmp_path, both, name="first", training={"epochs": 1})
    train(first, world, validate)
    (checkpoint,) = (first.run_dir / "checkpoints").glob("step-*")
    packed_again = {"shards": str(write_actions(shards, tmp_path / "again", every=4))}
    for changes, message in (
        (packed_again, r"saved with data\.mixture\.actions\.shards manifest sha256 \w+, this run has \w+: resume"),
        ({"weight": 2}, r"saved with data\.mixture\.actions\.weight 1\.0, this run has 2\.0: resume"),
    ):
        other = mixture_recipe(tmp_path, {**both, "actions": {**both["actions"], **changes}}, name="other")
        with pytest.raises(UserError, match=message) as caught:
            train(other, world, validate, resume=str(checkpoint))
        assert "\n" not in str(caught.value)
