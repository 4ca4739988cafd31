"""A run whose teacher's answers are remembered is the run without a memory, bit for bit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.memory import memory as memories
from karmma_dist.memory.contents import prune, read_contents
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.training.trainer import train
from kits.recipes import tiny_recipe
from kits.students import (
    EXPERTS,
    MODALITIES,
    interrupted_at,
    lines,
    losses,
    never_ask,
    save_teachers,
    student,
    weights,
)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a teacher, and two experts."""
    return save_teachers(tmp_path_factory.mktemp("runs"), shards)


@pytest.fixture(scope="module")
def online(runs: Path, shards: Path, world: World) -> Recipe:
    """A finished run without a memory."""
    run = student(runs, shards, "online")
    train(run, world, validate)
    return run


@pytest.fixture(scope="module")
def filled(
    runs: Path, shards: Path, world: World, tmp_path_factory: pytest.TempPathFactory, online: Recipe
) -> Path:
    """A memory that a run has filled."""
    folder = tmp_path_factory.mktemp("memory")
    run = student(runs, shards, "filling", distill={"memory": str(folder)})
    train(run, world, validate)
    assert weights(run) == weights(online)
    assert {entry["remembered_share"] for entry in lines(run)} == {0.0}
    return folder


@pytest.fixture
def memory(filled: Path, tmp_path: Path) -> Path:
    """A copy of that memory."""
    return Path(shutil.copytree(filled, tmp_path / "filled"))


def test_a_remembered_teacher_is_never_asked_and_teaches_the_same(
    runs: Path, shards: Path, world: World, memory: Path, online: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_ask(monkeypatch)
    run = student(runs, shards, "reading", distill={"memory": str(memory)})
    train(run, world, validate)
    assert (losses(run), weights(run)) == (losses(online), weights(online))
    assert {entry["remembered_share"] for entry in lines(run)} == {1.0}
    assert all(entry["memory_mb_per_s"] > 0 for entry in lines(run))
    assert sum(entry["tflops_per_s"] > 0 for entry in lines(run)) == len(lines(run))


def test_other_students_alphas_and_temperatures_read_the_same_memory(
    runs: Path, shards: Path, world: World, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"distill": {"alpha": 0.8, "temperature": 3.0}, "optimizer": {"lr": 0.3}}
    changes["model"] = {"width": 8, "num_heads": 1}
    alone = student(runs, shards, "alone", **changes)
    train(alone, world, validate)
    never_ask(monkeypatch)
    changes["distill"]["memory"] = str(memory)
    run = student(runs, shards, "other", **changes)
    train(run, world, validate)
    assert (losses(run), weights(run)) == (losses(alone), weights(alone))


def test_what_a_student_does_not_need_is_not_decoded(
    runs: Path, shards: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = student(runs, shards, "video_alone", model={"modalities": ["video"]})
    train(alone, world, validate)
    first = student(runs, shards, "video_first", model={"modalities": ["video"]}, distill={"memory": str(tmp_path)})
    train(first, world, validate)
    never_ask(monkeypatch)
    run = student(runs, shards, "video_only", model={"modalities": ["video"]}, distill={"memory": str(tmp_path)})
    train(run, world, validate)
    assert weights(first) == weights(alone)
    assert (losses(run), weights(run)) == (losses(alone), weights(alone))
    assert all(entry["decode_ms_audio"] > 0 for entry in lines(first) if entry["present_audio"])
    assert {entry["decode_ms_audio"] for entry in lines(run)} == {0.0}
    assert [entry["present_audio"] for entry in lines(run)] == [entry["present_audio"] for entry in lines(alone)]


def test_missing_and_damaged_answers_are_computed_anew_and_stored(
    runs: Path, shards: Path, world: World, memory: Path, online: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    (first, *_), (second, *_) = (sorted((memory / f"epoch-0000{epoch}").iterdir()) for epoch in range(2))
    first.unlink()
    content = bytearray(second.read_bytes())
    content[3] ^= 16
    second.write_bytes(content)
    assert read_contents(memory, verify=True).num_damaged == 1
    assert [epoch.number for epoch in read_contents(memory).epochs if epoch.num_answers < 28] == [0]
    run = student(runs, shards, "mending", distill={"memory": str(memory)})
    with caplog.at_level(logging.WARNING):
        train(run, world, validate)
    assert (losses(run), weights(run)) == (losses(online), weights(online))
    shares = [entry["remembered_share"] for entry in lines(run)]
    assert 0 < sum(shares) < len(shares)
    assert sum("damaged, so this and other damaged answers are computed anew" in text for text in caplog.messages) == 1
    contents = read_contents(memory, verify=True)
    assert contents.num_damaged == 0
    assert prune(contents) == [line for line in prune(contents) if "removed" in line]


def test_a_run_that_ends_early_leaves_its_answers_and_resumes_with_them(
    runs: Path, shards: Path, world: World, online: Recipe, tmp_path: Path
) -> None:
    run = student(runs, shards, "resumed", distill={"memory": str(tmp_path)}, training={"checkpoint_every_steps": 1})
    with interrupted_at(6), pytest.raises(KeyboardInterrupt):
        train(run, world, validate)
    assert sum(epoch.num_answers for epoch in read_contents(tmp_path, verify=True).epochs) == 6 * 6
    train(run, world, validate)
    assert (losses(run), weights(run)) == (losses(online), weights(online))


def test_a_disk_that_is_full_ends_the_memory_and_not_the_run(
    runs: Path, shards: Path, world: World, online: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store, stored = memories.AnswerMemory.store, []

    def until_full(self: memories.AnswerMemory, *arguments: Any) -> None:
        stored.append(arguments)
        if len(stored) > 10:
            raise OSError(28, "No space left on device", str(tmp_path))
        store(self, *arguments)

    monkeypatch.setattr(memories.AnswerMemory, "store", until_full)
    run = student(runs, shards, "full", distill={"memory": str(tmp_path)})
    with caplog.at_level(logging.WARNING):
        train(run, world, validate)
    assert weights(run) == weights(online)
    (text,) = [text for text in caplog.messages if "memory" in text]
    assert "is not extended any more, the run goes on: " in text
    assert "No space left on device" in text
    assert len(stored) == 11


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 4}, "its seed of the views is 3, this run's 4"),
        ({"distill": EXPERTS}, r"its shape of an answer is \[1, 9\], this run's \[2, 9\]"),
        ({"training": {"precision": "bf16"}}, "its precision is 'float32', this run's 'bfloat16'"),
    ],
)
def test_a_memory_of_other_views_or_teachers_is_refused(
    runs: Path, shards: Path, world: World, memory: Path, change: dict[str, Any], difference: str
) -> None:
    changes = {**change, "distill": {**change.get("distill", {}), "memory": str(memory)}}
    with pytest.raises(UserError, match=f"^distill.memory: .*this memory is of something else: {difference}"):
        train(student(runs, shards, "refused", **changes), world, validate, resume="never")


def test_another_teacher_of_the_same_name_is_refused(
    runs: Path, shards: Path, world: World, memory: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "teacher", tmp_path / "teacher")
    kept = (runs / "teacher" / "weights.safetensors").read_bytes()
    classes = ShardFolder(shards).classes
    tree = tiny_recipe(MODALITIES, name="teacher", seed=9, data={"shards": str(shards)})
    tree["model"]["missing"] = "leave_out"
    save_model(build_model(Recipe.model_validate(tree), classes), tmp_path / "teacher", classes=classes)
    assert (tmp_path / "teacher" / "weights.safetensors").read_bytes() != kept
    changes = {"distill": {"teacher": str(tmp_path / "teacher"), "memory": str(memory)}}
    with pytest.raises(UserError, match=r"its teacher \(sha256 of weights and model\.yaml\) is"):
        train(student(runs, shards, "stranger", **changes), world, validate)


def test_experts_are_remembered_one_by_one(
    runs: Path, shards: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = student(runs, shards, "experts", distill=EXPERTS)
    train(alone, world, validate)
    for name in ("experts_first", "experts_then"):
        run = student(runs, shards, name, distill={**EXPERTS, "memory": str(tmp_path)})
        train(run, world, validate)
        assert (losses(run), weights(run)) == (losses(alone), weights(alone))
        never_ask(monkeypatch)


def test_a_clip_that_is_damaged_is_replaced_as_in_a_run_without_a_memory(
    runs: Path, shards: Path, world: World, tmp_path: Path
) -> None:
    """Damage the sound of a clip and the pictures of another, before a memory is filled."""
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    folder = ShardFolder(broken)
    for clip, modality in zip(folder.clips("train")[4:6], ("audio", "video"), strict=True):
        member = clip.members[modality]
        assert member is not None
        with open(broken / clip.shard, "r+b") as file:
            file.seek(member.offset + member.size // 2)
            file.write(b"\xff" * 9)
    data = {"shards": str(broken), "max_damaged_fraction": 0.5}
    outcomes = []
    for name, memory in (("torn", None), ("torn_first", "m"), ("torn_then", "m")):
        distill = {} if memory is None else {"memory": str(tmp_path / memory)}
        run = student(runs, shards, name, data=data, distill=distill)
        train(run, world, validate)
        outcomes.append((losses(run), weights(run)))
    assert outcomes[0] == outcomes[1] == outcomes[2]
