"""A memory of the answers for all subsets of a clip's modalities serves students with any modality dropout."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from karmma_dist.cli import main
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.memory.contents import read_contents
from karmma_dist.memory.header import MemoryHeader
from karmma_dist.memory.memory import AnswerMemory, set_of, sets_of
from karmma_dist.models.flops import count_flops, flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import DistillRecipe, Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import Batch, collate
from karmma_dist.streaming.loader import Slice, TrainingClips
from karmma_dist.training.memories.teacher_answers import open_answers
from karmma_dist.training.teacher import Teacher
from karmma_dist.training.throughput import Throughput
from karmma_dist.training.trainer import train
from kits import experts
from kits.students import EXPERTS, MODALITIES, lines, losses, never_ask, save_teachers, student, weights

MEMBERS = [experts.make_model(MODALITIES[:2], 1), experts.make_model(["audio"], 2), experts.make_model(MODALITIES, 3)]


def all_subsets(memory: Path, **settings: Any) -> dict[str, Any]:
    return {"memory": str(memory), "memory_subsets": "all", **settings}


def close(run: Recipe, other: Recipe) -> None:
    """Check that two runs learned the same to rounding."""
    torch.testing.assert_close(losses(run), losses(other), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a teacher, and two experts."""
    return save_teachers(tmp_path_factory.mktemp("runs"), shards)


@pytest.fixture(scope="module")
def filling(runs: Path, shards: Path, world: World, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run that has filled a memory."""
    run = student(runs, shards, "filling", distill=all_subsets(tmp_path_factory.mktemp("memory")))
    train(run, world, validate)
    assert {entry["remembered_share"] for entry in lines(run)} == {0.0}
    return run


@pytest.fixture
def memory(filling: Recipe, tmp_path: Path) -> Path:
    """A copy of that memory."""
    assert filling.distill is not None
    return Path(shutil.copytree(str(filling.distill.memory), tmp_path / "filled"))


def test_reading_is_filling_bit_for_bit_and_the_run_without_a_memory_to_rounding(
    runs: Path, shards: Path, world: World, filling: Recipe, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = student(runs, shards, "online")
    train(online, world, validate)
    close(filling, online)
    never_ask(monkeypatch)
    run = student(runs, shards, "reading", distill=all_subsets(memory))
    train(run, world, validate)
    assert (losses(run), weights(run)) == (losses(filling), weights(filling))
    assert {entry["remembered_share"] for entry in lines(run)} == {1.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"modality_dropout": {"probability": 0.8, "draw": "independent"}}},
        {"data": {"modality_dropout": {"probability": 0.3}}, "model": {"modalities": ["flow"]}},
    ],
)
def test_any_modality_dropout_reads_the_same_memory(
    runs: Path, shards: Path, world: World, memory: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    online = student(runs, shards, "online", **changes)
    train(online, world, validate, resume="never")
    never_ask(monkeypatch)
    run = student(runs, shards, "other", distill=all_subsets(memory), **changes)
    train(run, world, validate, resume="never")
    close(run, online)
    assert {entry["remembered_share"] for entry in lines(run)} == {1.0}
    if "model" in changes:
        assert {entry["decode_ms_audio"] for entry in lines(run)} == {0.0}


def test_experts_and_frozen_encoders_are_remembered_with_all_subsets(
    runs: Path, shards: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While experts are asked they need the arrays of every clip; then nothing of a frozen encoder is decoded."""

    def frozen(name: str, probability: float, **distill: Any) -> Recipe:
        encoders = dict(student(runs, shards, name).model.model_dump(mode="json")["encoders"])
        for modality in MODALITIES:
            tokens = {"path": str(tmp_path / modality), "views": 0, "dtype": "float32"}
            encoders[modality] |= {"frozen": True, "memory": tokens if distill else None}
        dropout = {"modality_dropout": {"probability": probability}}
        return student(runs, shards, name, model={"encoders": encoders}, data=dropout, distill={**EXPERTS, **distill})

    outcomes = []
    online, alone = frozen("frozen", 0.0), frozen("frozen_half", 0.5)
    for run in (online, alone):
        train(run, world, validate)
    for name in ("frozen_first", "frozen_then"):
        run = frozen(name, 0.0, **all_subsets(tmp_path / "answers"))
        train(run, world, validate)
        close(run, online)
        outcomes.append((losses(run), weights(run)))
        never_ask(monkeypatch)
    assert outcomes[0] == outcomes[1]
    monkeypatch.setattr(TrainingClips, "_read", lambda *_: pytest.fail("a clip was decoded"))
    run = frozen("frozen_other", 0.5, **all_subsets(tmp_path / "answers"))
    train(run, world, validate)
    close(run, alone)


def test_damage_of_what_dropout_takes_changes_nothing_and_is_not_stored(
    runs: Path, shards: Path, world: World, tmp_path: Path
) -> None:
    """Damage a modality of every fourth clip: in some epochs dropout takes it, in others the clip is replaced."""
    broken = tmp_path / "shards"
    shutil.copytree(shards, broken)
    folder = ShardFolder(broken)
    damaged = folder.clips("train")[::4]
    for number, clip in enumerate(damaged):
        member = next(m for name in (MODALITIES * 2)[number % 3 :] if (m := clip.members[name]) is not None)
        with open(broken / clip.shard, "r+b") as file:
            file.seek(member.offset + member.size // 2)
            file.write(b"\xff" * 9)
    data = {"shards": str(broken), "max_damaged_fraction": 1.0}
    found = []
    for name, distill in (("torn", {}), ("torn_first", all_subsets(tmp_path)), ("torn_then", all_subsets(tmp_path))):
        run = student(runs, shards, name, data=data, distill=distill)
        train(run, world, validate)
        found.append((run, (run.run_dir / "damage.jsonl").read_text().count("\n")))
    (online, num_reported), (first, _), (then, _) = found
    assert {num for _, num in found} == {num_reported}
    close(first, online)
    assert losses(then) == losses(first)
    assert 0 < num_reported < len(damaged)
    assert [epoch.num_answers for epoch in read_contents(tmp_path, verify=True).epochs] == [30 - len(damaged)] * 2


def test_other_memories_are_refused_with_the_name_of_the_setting(
    runs: Path, shards: Path, world: World, memory: Path, tmp_path: Path
) -> None:
    drawn = student(runs, shards, "drawn", distill={"memory": str(tmp_path / "drawn")})
    train(drawn, world, validate)
    for path, subsets, stored in ((memory, "drawn", "all"), (tmp_path / "drawn", "all", "drawn")):
        refused = student(runs, shards, "refused", distill={"memory": str(path), "memory_subsets": subsets})
        message = f"^distill.memory: .*something else: its memory_subsets is '{stored}', this run's '{subsets}': name"
        with pytest.raises(UserError, match=message):
            train(refused, world, validate, resume="never")


def test_the_setting_without_a_memory_is_said_to_have_no_effect(
    runs: Path, shards: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = student(runs, shards, "none", distill={"memory_subsets": "all"})
    assert open_answers(recipe, ShardFolder(shards), torch.float32, 30, world) is None
    assert caplog.messages == ["distill.memory_subsets has no effect: name a folder in distill.memory"]


def test_a_memory_of_all_subsets_is_shown_as_one(memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(memory), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "logits, an answer is for all 7 subsets of the modalities" in out
    assert "2 of 2 epochs are complete" in out
    assert f"{7 * 9 * 4} bytes per answer (float32)" in out


def batches(recipe: Recipe, memory: AnswerMemory | None = None) -> list[Batch]:
    clips = TrainingClips(ShardFolder(Path(recipe.data.shards)), recipe.data, recipe.inputs, recipe.seed, 6)
    clips.remember(memory, {}, is_taught=True)
    return [clips.batch(Slice(1, step, 6 * step, 6 * step + 6)) for step in range(5)]


def test_a_batch_brings_what_dropout_takes_apart_from_what_the_student_sees(
    runs: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = student(runs, shards, "run")
    complete = student(runs, shards, "run", data={"modality_dropout": {"probability": 0.0}})
    header = MemoryHeader("logits", "float32", (7, 1, 9), {}, 30, {})
    asking = batches(recipe, AnswerMemory(tmp_path, header))
    for batch, plain, whole in zip(asking, batches(recipe), batches(complete), strict=True):
        assert (batch.keys, plain.dropped, whole.dropped) == (whole.keys, None, None)
        inputs, present_BM = batch.with_dropped(MODALITIES)
        for (found, found_BM), expected in (((batch.inputs, batch.present_BM), plain), ((inputs, present_BM), whole)):
            assert torch.equal(found_BM, expected.present_BM)
            assert found.keys() == expected.inputs.keys()
            assert all(torch.equal(found[name], expected.inputs[name]) for name in found)


def teacher_of(members: list[KarmmaModel]) -> Teacher:
    """Return a teacher that asks some models."""
    named = {head: [0.0] * len(members) for head in experts.HEADS}
    return Teacher(members, MODALITIES, named, DistillRecipe(teachers=[str(e) for e in range(len(members))]))


@settings(max_examples=25, deadline=None)
@given(experts.masks, st.integers(0, 9))
def test_the_answer_for_a_subset_is_that_for_a_clip_with_these_modalities(mask: list[list[bool]], seed: int) -> None:
    present_BM = torch.tensor(mask)
    inputs, teacher = experts.clips(present_BM, seed), teacher_of(MEMBERS)
    with torch.no_grad():
        answers = teacher(inputs, present_BM, answers_for="all")
        for row, subset_M in [(row, subset_M) for row in range(len(mask)) for subset_M in sets_of(3)[1:]]:
            found_EA = answers[row, set_of(subset_M.numpy()) - 1]
            if bool((subset_M & ~present_BM[row]).any()):
                assert not found_EA.any()
                continue
            places_M = present_BM[:row].sum(dim=0).tolist()
            own = {m: inputs[m][places_M[c]][None] for c, m in enumerate(MODALITIES) if subset_M[c]}
            torch.testing.assert_close(found_EA, teacher(own, subset_M[None], answers_for="drawn")[0])


def layers_run(teacher: Teacher, inputs: dict[str, Tensor], present_BM: Tensor) -> Counter[str]:
    """Return how often each layer with parameters runs while a teacher is asked about all subsets."""
    counts: Counter[str] = Counter()
    handles = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: counts.update([name]))
        for name, layer in teacher.named_modules() if any(True for _ in layer.parameters(recurse=False))
    ]  # fmt: skip
    with torch.no_grad():
        teacher(inputs, present_BM, answers_for="all")
    for handle in handles:
        handle.remove()
    return counts


def test_ranks_that_share_a_teacher_run_the_same_layers_whatever_their_clips_have() -> None:
    teacher = teacher_of([experts.make_model(list(member.modalities)) for member in MEMBERS])
    teacher.run_everything()
    for present_BM in (torch.ones(2, 3) > 0, torch.eye(3)[1:] > 0, torch.eye(3)[:1] > 0):
        counts = layers_run(teacher, experts.clips(present_BM), present_BM)
        assert counts == layers_run(teacher, {}, teacher.nothing())
        assert set(counts.values()) == {1, 3, 7}


@pytest.mark.parametrize("missing", ["leave_out", "stand_in"])
def test_flops_of_all_subsets_are_those_that_the_teacher_computes(tmp_path: Path, missing: str) -> None:
    recipe = experts.make_recipe(tmp_path, model={"missing": missing})
    model = KarmmaModel(recipe.model, recipe.inputs, MODALITIES, experts.HEADS).eval()
    present_BM = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])
    inputs = {name: x.to("meta") for name, x in experts.clips(present_BM).items()}
    teacher = teacher_of([KarmmaModel(recipe.model, recipe.inputs, MODALITIES, experts.HEADS).eval().to("meta")])
    computed = count_flops(lambda: teacher(inputs, present_BM, answers_for="all"))[1]
    assert flops_per_clip(model).all_subsets(present_BM) == computed > 0
    batch, dropped = collate([None] * 3, MODALITIES, []), collate([None] * 3, MODALITIES, [])
    dropped.present_BM = present_BM & torch.tensor([True, True, False])
    batch.present_BM, batch.inputs = present_BM & ~dropped.present_BM, {"audio": torch.zeros(3, 1)}
    counted = Throughput(model, [model], MODALITIES, torch.device("cpu"), torch.float32, peak=1.0, verbose=False)
    asked_once, batch.dropped = counted.flops(batch), dropped
    student = flops_per_clip(model).training({"audio": 3}, 3)
    assert counted.flops(batch) == student + computed > asked_once > student
