"""Rivals of KARMMA learn the same on any number of ranks: processes, gloo, DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kits.ranks import command, karmma_dist, outcome

RIVALS = {
    "mean and hard combinations": (
        "model.missing=mean", "objective={name: hard_combinations, options: {warmup_epochs: 0}}",
        "training.zero_stage=3", "training.max_micro_batch_size=2",
    ),
    "prompts": ("model.missing=prompts", "model.prompt_length=2", "training.zero_stage=1"),
    "token and bottleneck": (
        "model.missing=token", "model.fusion=bottleneck", "model.num_layers=2", "training.zero_stage=3",
    ),
    "late": (
        "model.missing=leave_out", "model.fusion=late", "data.modality_dropout.probability=1", "training.zero_stage=2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIVALS)
def test_two_ranks_with_different_modalities_learn_what_one_learns(shards: Path, tmp_path: Path, name: str) -> None:
    """Dropout gives each rank other modalities; sums, which are saved with the weights, are of several passes."""
    settings = (*RIVALS[name], "training.epochs=2")
    for num_ranks, folder in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        karmma_dist(folder, "train", *command(folder, shards, *settings), num_ranks=num_ranks)
    (expected, expected_losses), (weights, losses) = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, atol=2e-5, rtol=1e-4, msg=key)
    assert any(key.endswith(".sums") and bool(tensor[-1] > 0) for key, tensor in weights.items()) == ("mean" in name)
