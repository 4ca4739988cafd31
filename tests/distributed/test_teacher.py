"""A teacher that is sharded over the ranks teaches as a whole one does: processes, gloo, DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.ranks import RECIPE, karmma_dist

EXPERTS = {"pictures": ["video", "flow"], "sound": ["audio"]}


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """A distillation from two experts, of which one knows two modalities."""
    classes = ShardFolder(shards).classes
    for seed, (name, modalities) in enumerate(EXPERTS.items(), start=1):
        tree: dict[str, Any] = {**RECIPE, "seed": seed, "data": {"shards": str(shards), "modalities": modalities}}
        expert = Recipe.model_validate({**tree, "model": {**RECIPE["model"], "missing": "leave_out"}})
        save_model(build_model(expert, classes), tmp_path / "runs" / name, classes=classes)
    distill = {"teachers": list(EXPERTS), "alpha": 0.3, "temperature": 2.0, "expert_weights": "equal"}
    data, training = {**RECIPE["data"], "shards": str(shards)}, {**RECIPE["training"], "epochs": 2}
    student = {**RECIPE, "stage": "distill", "data": data, "training": training, "distill": distill}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    return tmp_path


def logged(folder: Path, name: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_a_teacher_sharded_over_ranks_teaches_as_a_whole_one(folder: Path) -> None:
    """The ranks lack different modalities: one runs an encoder, or a whole expert, for which the other has no clip."""
    karmma_dist(folder, "train", "student.yaml", "--set=name=whole")
    flags = ["--set=name=pieces", "--set=distill.shard_teacher=true"]
    karmma_dist(folder, "train", "student.yaml", *flags, num_ranks=2)
    whole, sharded = logged(folder, "whole"), logged(folder, "pieces")
    for name in ("loss", "kl", "teacher_entropy_verb", "teacher_accuracy", "agreement_noun"):
        assert [line[name] for line in sharded] == pytest.approx([line[name] for line in whole], abs=1e-6)
    assert any(0 < line["present_audio"] < 1 for line in whole)

    (checkpoint,) = (folder / "runs" / "whole" / "checkpoints").glob("step-*10")
    pieces = [key for part in checkpoint.glob("*.safetensors") for key in load_file(part)]
    saved = {key.split(":", 2)[2] for key in pieces}  # KIND:START:NAME
    student = Recipe.model_validate(yaml.safe_load((folder / "runs" / "whole" / "recipe.yaml").read_text()))
    assert set(saved) == set(build_model(student, ShardFolder(Path(student.data.shards)).classes).state_dict())
