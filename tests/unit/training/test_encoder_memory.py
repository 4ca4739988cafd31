"""A run that remembers the tokens of frozen encoders is the run that encodes them, bit for bit."""

from __future__ import annotations

import itertools
import logging
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.memory.contents import read_contents
from karmma_dist.memory.memory import Source
from karmma_dist.memory.records import AnswerFiles
from karmma_dist.memory.tokens import TokenMemory
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming import loader
from karmma_dist.training.trainer import train
from kits.recipes import tiny_recipe
from kits.students import MODALITIES, lines, weights

EPOCHS = 4


def teacher(runs: Path, shards: Path, name: str, memory: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """Return a recipe with frozen encoders, which are random; with a memory in `runs`, one folder per modality."""
    tree = tiny_recipe(
        MODALITIES, name=name, seed=5, stage="teacher", runs_dir=str(runs),
        data={"shards": str(shards), "modality_dropout": {"probability": 0.5}, "keep_decoded": "100 MB"},
        optimizer={"lr": 0.01},
        training={"epochs": EPOCHS, "batch_size": 6, "log_every_steps": 1},
    )  # fmt: skip
    for modality, encoder in tree["model"]["encoders"].items():
        remembered = {} if memory is None else {"memory": {"path": str(runs / "memory" / modality), **memory}}
        tree["model"]["encoders"][modality] = {**encoder, "frozen": True, **remembered}
    tree["model"]["missing"] = "leave_out"
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return Recipe.model_validate(tree)


def trained(recipe: Recipe, world: World) -> tuple[bytes, list[tuple[float, float]]]:
    """Train; return the weights, and loss and gradient norm of every step."""
    train(recipe, world, validate)
    return weights(recipe), [(e["loss"], e["grad_norm"]) for e in lines(recipe)]


def never_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where training encodes or decodes anything; a validation may."""
    reduce = KarmmaModel._reduce

    def of_validation(self: KarmmaModel, modality: str, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled(), f"{modality} was encoded"
        return reduce(self, modality, x)

    monkeypatch.setattr(KarmmaModel, "_reduce", of_validation)
    read = loader.TrainingClips._read
    monkeypatch.setattr(
        loader.TrainingClips, "_read", lambda self, *rest: pytest.fail("a clip was decoded") if rest else read(self)
    )


def test_an_exact_memory_changes_no_bit(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = trained(teacher(tmp_path, shards, "online"), world)
    exact = {"views": 0, "dtype": "float32"}
    filling = teacher(tmp_path, shards, "filling", exact)
    assert trained(filling, world) == online
    assert {entry["remembered_tokens_share"] for entry in lines(filling)} == {0.0}
    never_encode(monkeypatch)
    reading = teacher(tmp_path, shards, "reading", exact)
    assert trained(reading, world) == online
    assert {entry["remembered_tokens_share"] for entry in lines(reading)} == {1.0}
    assert all(entry["memory_mb_per_s"] > 0 for entry in lines(reading))
    assert lines(reading)[0]["tflops_per_s"] > 0


def test_models_that_mix_tokens_in_other_ways_read_the_same_memory(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"views": 0, "dtype": "float32"}
    mean, bottleneck = {"missing": "mean"}, {"fusion": "bottleneck", "missing": "leave_out", "num_layers": 2}
    online = trained(teacher(tmp_path, shards, "online", model=mean), world)
    trained(teacher(tmp_path, shards, "filling", exact), world)
    never_encode(monkeypatch)
    assert trained(teacher(tmp_path, shards, "mean", exact, model=mean), world) == online
    late = {"fusion": "late", "missing": "leave_out"}
    for name, model in {"bottleneck": bottleneck, "late": late, "prompts": {"missing": "prompts"}}.items():
        trained(teacher(tmp_path, shards, name, exact, model=model), world)


@pytest.mark.parametrize(("views", "dtype"), [(0, "int8"), (2, "bfloat16")])
def test_a_run_is_the_same_whatever_was_stored_before(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, views: int, dtype: str
) -> None:
    """Fill a memory, remove answers at random, train again: bit for bit with a new view per epoch, else to rounding."""
    setting = {"views": views, "dtype": dtype}
    filling = teacher(tmp_path, shards, "filling", setting)
    weights, losses = trained(filling, world)
    shares = [entry["remembered_tokens_share"] for entry in lines(filling)]
    assert max(shares[: 2 * (len(shares) // EPOCHS)]) == 0
    assert (max(shares) > 0) == (views > 0)
    draw = random.Random(4)
    for modality in MODALITIES:
        contents = read_contents(tmp_path / "memory" / modality)
        assert [view.number for view in contents.epochs] == list(range(views or EPOCHS))
        files = AnswerFiles(contents.folder, contents.header.answer_bytes, dict(contents.header.num_clips))
        for view, shard in itertools.product(range(views or EPOCHS), contents.header.num_clips):
            files.remove(view, shard, draw.randrange(contents.header.num_clips[shard]))
        files.close()
    part = teacher(tmp_path, shards, "part", setting)
    weights_of_part, losses_of_part = trained(part, world)
    assert 0 < sum(entry["remembered_tokens_share"] for entry in lines(part)) / len(shares) < 1
    torch.testing.assert_close(losses_of_part, losses, rtol=1e-2, atol=1e-2)
    assert (weights_of_part, losses_of_part) == (weights, losses) or views
    shutil.rmtree(tmp_path / "memory")
    assert trained(teacher(tmp_path, shards, "filling_again", setting), world) == (weights, losses)
    never_encode(monkeypatch)
    assert trained(teacher(tmp_path, shards, "reading", setting), world) == (weights, losses)


def test_every_view_of_a_clip_is_encoded_once(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: Counter[tuple[Path, Source]] = Counter()
    store = TokenMemory.store

    def counting(self: TokenMemory, source: Source, packed_X: torch.Tensor) -> None:
        stored[self.folder, source] += 1
        store(self, source, packed_X)

    monkeypatch.setattr(TokenMemory, "store", counting)
    trained(teacher(tmp_path, shards, "run", {"views": 2}), world)
    assert set(stored.values()) == {1}
    for modality in MODALITIES:
        contents = read_contents(tmp_path / "memory" / modality, verify=True)
        num_stored = sum(folder == contents.folder for folder, _ in stored)
        assert num_stored == sum(view.num_answers for view in contents.epochs) > 0
        assert contents.num_damaged == 0


def test_epochs_take_the_views_in_turn(shards: Path, tmp_path: Path) -> None:
    recipe = teacher(tmp_path, shards, "run", {"views": 3})
    clips = loader.TrainingClips(
        ShardFolder(shards), recipe.data, recipe.inputs, recipe.seed, 6, num_views=recipe.model.num_views
    )
    seen = []
    for epoch in range(7):
        batches = [clips.batch(part) for part in _slices(epoch, 30, 6)]
        samples = {key: view.epoch for batch in batches for key, view in zip(batch.keys, batch.sources, strict=True)}
        assert set(samples.values()) == {epoch % 3}
        seen.append({key: array.sum() for batch in batches for key, array in _video_of(batch)})
    for epoch, other in ((0, 3), (3, 6), (1, 4)):
        both = seen[epoch].keys() & seen[other].keys()
        assert both
        assert all(torch.equal(seen[epoch][key], seen[other][key]) for key in both)
    different = seen[0].keys() & seen[1].keys()
    assert any(not torch.equal(seen[0][key], seen[1][key]) for key in different)


def _slices(epoch: int, num: int, size: int) -> list[Any]:
    return [loader.Slice(epoch, step, step * size, (step + 1) * size) for step in range(num // size)]


def _video_of(batch: loader.Batch) -> list[tuple[str, torch.Tensor]]:
    keys = [key for key, present in zip(batch.keys, batch.present_BM[:, 0].tolist(), strict=True) if present]
    return list(zip(keys, batch.inputs.get("video", torch.zeros(0)), strict=True))


def test_a_run_resumes_in_the_middle_of_a_pass_that_stores(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = {"views": 0}
    whole = trained(teacher(tmp_path, shards, "whole", setting), world)
    shutil.rmtree(tmp_path / "memory")
    run = teacher(tmp_path, shards, "broken", setting, training={
        "epochs": EPOCHS, "batch_size": 6, "log_every_steps": 1, "checkpoint_every_steps": 3,
    })  # fmt: skip
    store, num_left = TokenMemory.store, [40]

    def until_killed(self: TokenMemory, source: Source, packed_X: torch.Tensor) -> None:
        if not num_left[0]:
            raise KeyboardInterrupt
        num_left[0] -= 1
        store(self, source, packed_X)

    with monkeypatch.context() as patch:
        patch.setattr(TokenMemory, "store", until_killed)
        with pytest.raises(KeyboardInterrupt):
            train(run, world, validate)
    assert trained(run, world)[0] == whole[0]


def test_a_students_frozen_encoder_is_remembered_where_its_teacher_is(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the teacher is asked it needs the arrays of every clip; then nothing is decoded any more."""
    classes = ShardFolder(shards).classes
    save_model(build_model(teacher(tmp_path, shards, "t"), classes), tmp_path / "t", classes=classes)

    def student(name: str, *, remembers: bool) -> Recipe:
        distill = {"teacher": "t", **({"memory": str(tmp_path / "answers")} if remembers else {})}
        memory = {"views": 0, "dtype": "float32"} if remembers else None
        return teacher(tmp_path, shards, name, memory, stage="distill", distill=distill)

    online = trained(student("online", remembers=False), world)
    assert trained(student("filling", remembers=True), world) == online
    never_encode(monkeypatch)
    reading = student("reading", remembers=True)
    assert trained(reading, world) == online
    assert {entry["remembered_share"] for entry in lines(reading)} == {1.0}


def test_a_flipped_bit_is_encoded_anew_and_reported_once(
    shards: Path, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    setting = {"views": 1}
    outcome = trained(teacher(tmp_path, shards, "filling", setting), world)
    path = next(path for path in sorted((tmp_path / "memory/video/epoch-00000").iterdir()) if any(path.read_bytes()))
    content = bytearray(path.read_bytes())
    place = next(place for place, byte in enumerate(content) if byte)
    content[place] ^= 8
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        run = teacher(tmp_path, shards, "reading", setting)
        assert trained(run, world) == outcome
    (message,) = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert message.startswith(str(path))
    assert sum(entry["damaged_tokens"] for entry in lines(run)) == 1
    assert read_contents(tmp_path / "memory/video", verify=True).num_damaged == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 6}, "model.encoders.video.memory: .*: its encoder .sha256 of its weights. is"),
        ({"inputs": {"video": {"num_frames": 4, "short_side": 32, "crop": 28}}}, "frames, crop and jitter is"),
        ({"inputs": {"audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16}}},
         "model.encoders.audio.memory: .*: its shape of an answer is"),
    ],
)  # fmt: skip
def test_a_memory_of_other_encoders_or_views_is_refused(
    shards: Path, tmp_path: Path, world: World, sections: dict[str, Any], message: str
) -> None:
    train(teacher(tmp_path, shards, "filling", {"views": 1}, training={"epochs": 1, "batch_size": 6}), world, validate)
    with pytest.raises(UserError, match=message):
        train(teacher(tmp_path, shards, "other", {"views": 1}, **sections), world, validate)
    with pytest.raises(UserError, match="precision is 'bfloat16', this run's 'int8'"):
        train(teacher(tmp_path, shards, "int8", {"views": 1, "dtype": "int8"}), world, validate)
