"""Tests, without a GPU, that code for a GPU never mixes its tensors with the CPU's and computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.corruptions.batches import Sensors
from karmma_dist.evaluation.corruptions.kinds import KINDS
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector
from karmma_dist.evaluation.predict.predict import _RunPredictor
from karmma_dist.memory.header import MemoryHeader, open_header
from karmma_dist.memory.memory import AnswerMemory, Source
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.losses import cross_entropy
from karmma_dist.models.model_card import ModelCard
from karmma_dist.recipe import DataRecipe, DistillRecipe, InputRecipe, ModelRecipe, ViewsRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import Batch, collate, prepare
from karmma_dist.streaming.loader import EvaluationClips, TrainingClips, evaluation_batches, training_batches
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.training.memories.teacher_answers import TeacherMemory
from karmma_dist.training.objectives import Distillation, soft_targets_of
from karmma_dist.training.teacher import Teacher
from karmma_dist.training.tracking import Averages
from kits import real_encoders
from kits.experts import EXPERTS, HEADS, MODALITIES, clips, make_model
from kits.other_device import DEVICE, OtherDevice

pytestmark = pytest.mark.usefixtures("one_thread")

PRESENT = {
    "all that there is": [[1, 1, 1, 1], [1, 1, 1, 1]],
    "each clip something": [[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]],
    "nobody has the rest": [[0, 0, 1, 0], [0, 0, 1, 0]],
}


def here_and_there(work: Callable[[torch.device], Any]) -> tuple[Any, Any]:
    """Return the results of `work` on the CPU and on the other device."""
    here = work(torch.device("cpu"))
    with OtherDevice():
        return here, work(DEVICE)


def test_the_other_device_refuses_what_a_gpu_would() -> None:
    with OtherDevice():
        there, here = torch.arange(3.0).to(DEVICE), torch.arange(3.0)
        assert there.device == (there + 1).device == torch.ones(2, device=DEVICE).device == DEVICE
        assert (there * torch.tensor(2.0)).sum().item() == 6.0
        assert there[torch.tensor([True, False, True])].cpu().tolist() == [0.0, 2.0]
        assert here.copy_(there).device.type == "cpu"
        for mix in (lambda: there + here, lambda: here[there > 0], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="tensors on both devices"):
                mix()


@pytest.mark.parametrize("missing", ["leave_out", "stand_in"])
@pytest.mark.parametrize("present", PRESENT.values(), ids=PRESENT)
def test_training_steps_stay_on_the_models_device(missing: str, present: list[list[int]]) -> None:
    present_BM = torch.tensor(present, dtype=torch.bool)
    whole = real_encoders.clips(len(present))
    given = {name: whole[name][has] for name, has in zip(whole, present_BM.T, strict=True)}

    def step(device: torch.device) -> tuple[float, list[float]]:
        model = real_encoders.build(missing).to(device)
        moved = {name: of.to(device) for name, of in given.items()}
        logits = model(moved, present_BM.to(device))
        loss = cross_entropy(logits, {head: torch.zeros(len(present), dtype=torch.int64).to(device) for head in logits})
        loss.backward()
        norms = [float(parameter.grad.norm().cpu()) for parameter in model.parameters() if parameter.grad is not None]
        return loss.detach().item(), norms

    (loss, norms), (loss_there, norms_there) = here_and_there(step)
    assert loss_there == pytest.approx(loss, rel=1e-4)
    assert len(norms) == len(norms_there) > 100
    assert norms_there == pytest.approx(norms, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_teaching_by_several_experts_stays_on_the_device(sharded: bool) -> None:
    present_BM = torch.tensor([[True, True, True], [True, False, False]])
    batch = collate([None, None], MODALITIES, list(HEADS))
    batch.present_BM, batch.inputs = present_BM, clips(present_BM)
    batch.labels = {"verb": torch.tensor([0, 2]), "noun": torch.tensor([3, 1])}
    recipe = DistillRecipe(teachers=["v", "f", "a"], alpha=0.25, temperature=2.0)

    def lesson(device: torch.device) -> dict[str, float]:
        losses = {"verb": [1.0, 2.0, 3.0], "noun": [3.0, 2.0, 1.0]}
        teacher = Teacher(copy.deepcopy(EXPERTS), MODALITIES, losses, recipe).to(device)
        if sharded:
            teacher.run_everything()
        objective = Distillation(recipe, soft_targets_of(teacher))
        student, averages = make_model(MODALITIES, 4).to(device), Averages()
        moved = batch.map(lambda tensor: tensor.to(device))
        for _ in range(2):
            loss, parts = objective.loss(student(moved.inputs, moved.present_BM), moved)
            averages.add({"loss": loss.detach(), **parts, "present": moved.present_BM.float().mean()})
        return averages.take()

    here, there = here_and_there(lesson)
    assert there == pytest.approx(here, rel=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_teaching_with_a_memory_of_all_subsets_stays_on_the_device(tmp_path: Path, sharded: bool) -> None:
    batch, dropped = (collate([None, None], MODALITIES, list(HEADS)) for _ in range(2))
    batch.present_BM, dropped.present_BM = torch.tensor([[1, 0, 1], [1, 0, 0]]) > 0, torch.tensor([[0, 1, 0]] * 2) > 0
    batch.inputs, dropped.inputs = clips(batch.present_BM, 1), clips(dropped.present_BM, 2)
    batch.dropped, dropped.valid_B = dropped, torch.tensor([True, False])
    batch.sources = [Source(0, "train-000000.tar", row) for row in range(2)]
    recipe = DistillRecipe(teachers=["v", "f", "a"])
    header = MemoryHeader("logits", "float32", (7, 3, 7), {"train-000000.tar": 2}, 2, {})

    def taught(device: torch.device) -> list[torch.Tensor]:
        teacher = Teacher(copy.deepcopy(EXPERTS), MODALITIES, {head: [1.0] * 3 for head in HEADS}, recipe).to(device)
        if sharded:
            teacher.run_everything()
        open_header(tmp_path / device.type, header)
        answers = AnswerMemory(tmp_path / device.type, header)
        memory = TeacherMemory(answers, None)
        targets = soft_targets_of(teacher, memory)(batch.map(lambda tensor: tensor.to(device)))
        memory.close()
        stored_EA = answers.find(batch.sources[0], torch.tensor([0, 1, 1]).numpy(), np.ones(3))
        assert stored_EA is not None
        assert answers.find(batch.sources[1], torch.tensor([1, 0, 0]).numpy(), np.ones(3)) is None
        return [*(log_probs.cpu() for log_probs in targets.values()), stored_EA]

    here, there = here_and_there(taught)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def inputs() -> InputRecipe:
    sizes = {"num_frames": 4, "short_side": 32, "crop": 24, "jitter": 0.3}
    return InputRecipe.model_validate(
        {"video": sizes, "audio": {"num_windows": 2, "window_s": 0.5, "num_mels": 16}}
    )


@pytest.fixture(scope="module")
def model(shards: Path, inputs: InputRecipe) -> KarmmaModel:
    names = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
    encoders = {name: {"name": kind, "options": {"width": 4}} for name, kind in names.items()}
    sizes = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}
    heads = {head: len(of) for head, of in ShardFolder(shards).classes.items()}
    torch.manual_seed(0)
    recipe = ModelRecipe.model_validate({"encoders": encoders, **sizes, "missing": "stand_in"})
    return KarmmaModel(recipe, inputs, list(names), heads)


def test_training_inputs_are_prepared_on_the_device(shards: Path, inputs: InputRecipe) -> None:
    data = DataRecipe(shards=str(shards), modalities=["video", "flow", "audio"], num_workers=0)
    clips_of = TrainingClips(ShardFolder(shards), data, inputs, seed=3, batch_size=8)
    raw = next(iter(training_batches(clips_of, Schedule(len(clips_of.clips), 8, 1), 0, Position(0, 0), 1)))
    assert raw.jitter

    def made(device: torch.device) -> Batch:
        return prepare(raw, inputs, device).map(lambda tensor: tensor.cpu())

    here, there = here_and_there(made)
    assert here.inputs.keys() == there.inputs.keys() == {"video", "flow", "audio"}
    for name, expected in here.inputs.items():
        torch.testing.assert_close(there.inputs[name], expected, rtol=1e-4, atol=1e-4)


def test_evaluation_with_broken_sensors_runs_on_the_device(
    shards: Path, inputs: InputRecipe, model: KarmmaModel
) -> None:
    data = DataRecipe(shards=str(shards), modalities=list(model.modalities), num_workers=0)
    seen = EvaluationClips(ShardFolder(shards), data, inputs, "validation", ViewsRecipe(temporal=2))
    seen.uncut = ["audio"]
    every_kind = [f"{name}:3" for name, kind in KINDS.items() if set(kind.effects) <= set(model.modalities)]
    conditions = build_conditions(model.modalities, subsets=True, sweep=True, corrupt=every_kind)
    whole = [condition for condition in conditions if condition.corrupt is None]

    def figures(device: torch.device) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        collector = PredictionCollector(model.modalities, whole)

        def batches() -> Iterator[Batch]:
            with evaluation_batches(seen, 4) as loaded:
                yield from (batch.map(lambda tensor: tensor.to(device)) for batch in loaded)

        results = evaluate(
            model.to(device), batches(), conditions, device=device, num_views=2, predictions=collector,
            sensors=Sensors(model.modalities, seen.inputs, device),
        )  # fmt: skip
        model.to("cpu")
        return results.rows, collector.finish().log_probs

    (rows, log_probs), (rows_there, log_probs_there) = here_and_there(figures)
    assert len(rows) == len(rows_there) > 100
    for row, expected in zip(rows_there, rows, strict=True):
        assert row.num_kept == expected.num_kept
        assert row.figures["verb_loss"] == pytest.approx(expected.figures["verb_loss"], abs=1e-4)
    for head, values in log_probs.items():
        np.testing.assert_allclose(log_probs_there[head], values, atol=1e-4)


def test_prediction_runs_on_the_device(shards: Path, inputs: InputRecipe, model: KarmmaModel) -> None:
    classes = ShardFolder(shards).classes
    card = ModelCard(
        modalities=list(model.modalities), heads=model.heads, classes=classes, model=model.recipe, inputs=inputs
    )
    data = DataRecipe(shards=str(shards), modalities=list(model.modalities), num_workers=0)
    key = ShardFolder(shards).clips("validation")[0].key

    def actions(device: torch.device) -> list[tuple[list[str], list[dict[str, str]]]]:
        predictor = _RunPredictor(model.to(device).eval(), card, data, list(model.modalities), device)
        guesses = predictor.predict([key], None, None)[0].guesses
        model.to("cpu")
        return [(guess.modalities, [action.names for action in guess.actions]) for guess in guesses]

    here, there = here_and_there(actions)
    assert len(here) > 1
    assert there == here
