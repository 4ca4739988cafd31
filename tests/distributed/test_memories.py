"""Memories with several ranks: the same losses and weights as without them, at every ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_dist.memory.contents import read_contents
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.ranks import RECIPE, karmma_dist


@pytest.fixture(scope="module")
def folder(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation of one epoch with modality dropout, and its teacher."""
    folder = tmp_path_factory.mktemp("memory")
    data = {**RECIPE["data"], "shards": str(shards)}
    teacher = {**RECIPE, "data": data, "model": {**RECIPE["model"], "missing": "leave_out"}}
    classes = ShardFolder(shards).classes
    save_model(build_model(Recipe.model_validate(teacher), classes), folder / "runs/teacher", classes=classes)
    training = {**RECIPE["training"], "epochs": 1, "validate_every_epochs": 0}
    student = {**RECIPE, "stage": "distill", "data": data, "training": training, "distill": {"teacher": "teacher"}}
    (folder / "student.yaml").write_text(yaml.safe_dump(student))
    (folder / "frozen.yaml").write_text(yaml.safe_dump({**teacher, "training": training}))
    return folder


def trained(
    folder: Path, name: str, num_ranks: int, *overrides: str, recipe: str = "student.yaml"
) -> tuple[bytes, list[Any]]:
    """Train; return the weights, and the losses of the log."""
    karmma_dist(
        folder, "train", recipe, f"--set=name={name}", *(f"--set={text}" for text in overrides),
        num_ranks=num_ranks,
    )  # fmt: skip
    run = folder / "runs" / name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return (run / "weights.safetensors").read_bytes(), [(line.get("loss"), line.get("kl")) for line in lines]


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_remember_what_two_ranks_were_told(folder: Path, stage: int) -> None:
    settings = (f"training.zero_stage={stage}",)
    online = trained(folder, f"online_{stage}", 2, *settings)
    memory = folder / f"memory_{stage}"
    for name in ("fill", "read"):
        assert trained(folder, f"{name}_{stage}", 2, *settings, f"distill.memory={memory}") == online
        (epoch,) = read_contents(memory, verify=True).epochs
        assert (epoch.num_answers, epoch.num_damaged) == (30, 0)


def test_ranks_that_share_a_teacher_ask_it_together(folder: Path) -> None:
    """Remove the answers of one shard: some batches of one rank are remembered while the other asks the teacher."""
    settings = ("distill.shard_teacher=true",)
    online = trained(folder, "sharded", 2, *settings)
    memory = folder / "memory_sharded"
    assert trained(folder, "sharded_fill", 2, *settings, f"distill.memory={memory}") == online
    first = min((memory / "epoch-00000").iterdir())
    first.unlink()
    assert trained(folder, "sharded_read", 2, *settings, f"distill.memory={memory}") == online
    assert first.exists()
    shutil.rmtree(memory)


def test_ranks_that_share_a_teacher_ask_it_together_about_all_subsets(folder: Path) -> None:
    memory = folder / "memory_subsets"
    settings = ("distill.shard_teacher=true", f"distill.memory={memory}", "distill.memory_subsets=all")
    filled = trained(folder, "subsets_fill", 2, *settings)
    first = min((memory / "epoch-00000").iterdir())
    first.unlink()
    assert trained(folder, "subsets_read", 2, *settings) == filled
    (epoch,) = read_contents(memory, verify=True).epochs
    assert (epoch.num_answers, epoch.num_damaged) == (30, 0)


def test_ranks_encode_together_what_one_of_them_does_not_know(folder: Path) -> None:
    """Remove a shard's tokens: one rank then knows the tokens of a batch that the other encodes."""
    settings = ["training.zero_stage=3"]
    for modality in RECIPE["data"]["modalities"]:
        settings += [f"model.encoders.{modality}.frozen=true"]
    online = trained(folder, "encoding", 2, *settings, recipe="frozen.yaml")
    for modality in RECIPE["data"]["modalities"]:
        setting = f"model.encoders.{modality}.memory"
        settings += [f"{setting}.path={folder}/tokens/{modality}"]
        settings += [f"{setting}.views=0", f"{setting}.dtype=float32"]
    assert trained(folder, "encoding_fill", 2, *settings, recipe="frozen.yaml") == online
    for epoch in (folder / "tokens").glob("*/epoch-*"):
        min(epoch.iterdir()).unlink()
    assert trained(folder, "encoding_read", 2, *settings, recipe="frozen.yaml") == online
