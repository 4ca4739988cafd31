"""Tiny students, their teachers, and the facts about a trained student that tests compare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.training.engine import Engine
from karmma_dist.training.teacher import Teacher
from kits.recipes import tiny_recipe

MODALITIES = ["video", "flow", "audio"]
EPOCHS = 2
EXPERTS = {"teacher": None, "teachers": ["pictures", "sound"], "expert_weights": "equal"}


def save_teachers(runs: Path, shards: Path) -> Path:
    """Save a teacher and two experts to a folder of runs; return the folder."""
    models = {"teacher": MODALITIES, "pictures": MODALITIES[:2], "sound": ["audio"]}
    for seed, (name, modalities) in enumerate(models.items()):
        tree = tiny_recipe(modalities, name=name, seed=seed, data={"shards": str(shards)})
        tree["model"]["missing"] = "leave_out"
        classes = ShardFolder(shards).classes
        save_model(build_model(Recipe.model_validate(tree), classes), runs / name, classes=classes)
    return runs


def student(runs: Path, shards: Path, name: str, **sections: Any) -> Recipe:
    """Return a student's recipe with modality dropout, with `sections` merged into it field by field."""
    distill = {"teacher": "teacher", "alpha": 0.3, **sections.pop("distill", {})}
    tree = tiny_recipe(
        MODALITIES, name=name, seed=3, stage="distill", distill=distill, runs_dir=str(runs),
        data={"shards": str(shards), "modality_dropout": {"probability": 0.5}, "keep_decoded": "100 MB"},
        optimizer={"lr": 0.01}, training={"epochs": EPOCHS, "batch_size": 6, "log_every_steps": 1},
    )  # fmt: skip
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return Recipe.model_validate(tree)


def weights(run: Recipe) -> bytes:
    """Return a finished run's file of weights."""
    return (run.run_dir / "weights.safetensors").read_bytes()


def lines(run: Recipe) -> list[dict[str, Any]]:
    """Return a run's log of training, an entry per step."""
    entries = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in entries if entry["kind"] == "train"]


def losses(run: Recipe) -> list[tuple[float, float, float]]:
    """Return loss, divergence from the teacher and its accuracy, per step."""
    return [(entry["loss"], entry["kl"], entry["teacher_accuracy"]) for entry in lines(run)]


def never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a teacher is asked from now on."""
    monkeypatch.setattr(Teacher, "forward", lambda *_, **__: pytest.fail("the teacher was asked"))


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Interrupt training instead of its step of this number, counted from 1."""
    step, calls = Engine.step, []

    def die(self: Engine, lr: float) -> Any:
        calls.append(lr)
        if len(calls) == number:
            raise KeyboardInterrupt
        return step(self, lr)

    with mock.patch.object(Engine, "step", die):
        yield
