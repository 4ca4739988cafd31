"""The records of a run: metrics of its batches, throughput, best weights and trace; also its memory settings."""

from __future__ import annotations

import gzip
import json
import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.plan import plan_evaluation
from karmma_dist.evaluation.run import carry_out
from karmma_dist.evaluation.run import validate as measure
from karmma_dist.models.flops import flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import read_state
from karmma_dist.streaming.batch import collate
from karmma_dist.training.checkpoint.best import BestWeights
from karmma_dist.training.throughput import Throughput, peak_tflops
from karmma_dist.training.tracking import Averages, accuracies, agreements, entropies
from karmma_dist.training.trainer import train

CLASSES = {"verb": ["a", "b"], "noun": ["c", "d", "e"]}


def make_recipe(folder: Path, shards: Path | str = "shards", **training: Any) -> Recipe:
    settings = {"batch_size": 10, "epochs": 1, "log_every_steps": 1, "validate_every_epochs": 1, "threads": 1}
    return Recipe.model_validate(
        {
            "name": "run",
            "runs_dir": str(folder),
            "stage": "supervised",
            "data": {"shards": str(shards), "modalities": ["audio"], "num_workers": 0},
            "inputs": {"audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16}},
            "model": {
                "encoders": {"audio": {"name": "small_audio", "options": {"width": 4}}},
                "width": 8, "num_heads": 2, "feedforward": 8, "fc_width": 8,
            },
            "optimizer": {"warmup_epochs": 0},
            "training": {**settings, **training},
        }
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (3, 2), (4, 4)])
@pytest.mark.parametrize("num_saved", [1, 3])
def test_steps_before_and_after_a_change_of_accumulation_weigh_equally(before: int, after: int, num_saved: int) -> None:
    saved, resumed = Averages(), Averages()
    for averages, passes, loss in ((saved, before, 1.0), (saved, before, 2.0), (resumed, after, 6.0)):
        if averages is resumed:
            resumed.restore([saved.state()] * num_saved, 0, 1, Fraction(after, before))
        for _ in range(passes):
            averages.add({"loss": loss})
        averages.add({"step_s": loss, "grad_norm": loss})
    assert resumed.take() == pytest.approx({"loss": 3.0, "step_s": 3.0, "grad_norm": 3.0})


@pytest.fixture(scope="module")
def one_rank_world() -> Iterator[World]:
    """Open a process group of one rank."""
    world = find_world({})
    with process_group(world):
        yield world


def test_accuracy_and_agreement_are_shares_of_clips() -> None:
    labels = {"verb": torch.tensor([0, 1, 1, 0]), "noun": torch.tensor([2, 2, 0, 1])}
    right = {head: nn.functional.one_hot(of).float() for head, of in labels.items()}
    scores = {"verb": right["verb"].clone(), "noun": right["noun"].clone()}
    scores["verb"][0] = torch.tensor([0.0, 1.0])  # wrong
    scores["noun"][1] = torch.tensor([1.0, 0.0, 0.5])  # wrong
    result = {name: float(share) for name, share in accuracies("train", scores, labels).items()}
    assert result == {"train_accuracy": 0.5, "train_accuracy_verb": 0.75, "train_accuracy_noun": 0.75}
    result = {name: float(share) for name, share in agreements(scores, right).items()}
    assert result == {"agreement": 0.5, "agreement_verb": 0.75, "agreement_noun": 0.75}


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.floats(-5, 5))
def test_entropy_is_equal_for_logits_and_log_probabilities(
    weights: list[float], shift: float
) -> None:
    p = torch.tensor(weights) / sum(weights)
    expected = -sum(float(x) * math.log(float(x)) for x in p)
    for scores in (p.log()[None], p.log()[None] + shift):
        result = entropies("teacher", {"verb": scores})
        assert float(result["teacher_entropy_verb"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0), ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A10", 125.0), ("NVIDIA L4", 121.0), ("NVIDIA GeForce GTX 750", None),
    ],
)  # fmt: skip
def test_peak_of_common_gpus_is_known_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_flops_count_present_clips_and_the_teachers_forward_pass(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    student = KarmmaModel(recipe.model, recipe.inputs, ["audio"], {"verb": 2})
    teacher = KarmmaModel(recipe.model, recipe.inputs, ["audio"], {"verb": 2})
    throughput = Throughput(student, [teacher], ["audio"], torch.device("cpu"), torch.float32, peak=2e-3, verbose=True)
    batch = collate([None] * 5, ["audio"], ["verb"])
    counted = flops_per_clip(student)
    encoder, projection, fusion = counted.encoders["audio"], counted.projections["audio"], counted.fusion[("audio",)]
    batch.inputs["audio"] = torch.zeros(2, 1)
    trained = 3 * (2 * (encoder + projection) + 5 * fusion)
    assert throughput.flops(batch) == trained + 2 * (encoder + projection + fusion)
    batch.inputs.clear()
    assert throughput.flops(batch) == 3 * (encoder + projection + 5 * fusion)
    assert throughput.metrics(5e9, 10.0) == {"tflops_per_s": 5e-4, "mfu": 0.25}
    unknown = Throughput(student, [], ["audio"], torch.device("cpu"), torch.float32, peak=None, verbose=True)
    assert unknown.metrics(5e9, 10.0) == {"tflops_per_s": 5e-4}


def test_best_weights_are_replaced_only_by_better_ones(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, best_metric="verb_loss")
    kept = []
    for step, loss in enumerate([2.0, 1.0, 1.5, 1.0, 0.5], start=1):
        torch.manual_seed(step)
        model = KarmmaModel(recipe.model, recipe.inputs, ["audio"], {"verb": 2, "noun": 3})
        # A resumed run constructs it anew, with the folder as its only state.
        best = BestWeights(recipe, CLASSES, measure.metrics(CLASSES))
        if best.save_if_better(model, {"verb_loss": loss}, step, step - 1):
            kept.append(step)
            assert torch.equal(load_file(best.folder / "weights.safetensors")["shared.weight"], model.shared.weight)
    assert kept == [1, 2, 5]
    record = BestWeights(recipe, CLASSES, measure.metrics(CLASSES)).record
    assert record == {"metric": "verb_loss", "value": 0.5, "step": 5, "epoch": 4}


def test_unknown_best_metric_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"best_metric.*'verb_top2'.*did you mean.*action_top1"):
        BestWeights(make_recipe(tmp_path, best_metric="verb_top2"), CLASSES, measure.metrics(CLASSES))


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 0), ("parameters", 2)])
def test_offloading_requires_a_zero_stage_that_shards(tmp_path: Path, offload: str, stage: int) -> None:
    with pytest.raises(ValueError, match=f"offload {offload} needs zero_stage {stage + 1}"):
        make_recipe(tmp_path, offload=offload, zero_stage=stage)


def test_trace_that_stops_before_it_starts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile_steps \[5, 5\]: start must come before stop"):
        make_recipe(tmp_path, profile_steps=[5, 5])


@pytest.fixture(scope="module")
def run(one_rank_world: World, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, str]:
    """Train two epochs with a trace and a setting that has no effect; return the recipe and the log messages."""
    recipe = make_recipe(
        tmp_path_factory.mktemp("runs"), shards, epochs=2, profile_steps=[1, 3], peak_tflops=1.0,
        offload="optimizer", best_metric="noun_loss",
    )  # fmt: skip
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("karmma_dist").addHandler(handler)
    try:
        train(recipe, one_rank_world, measure)
    finally:
        logging.getLogger("karmma_dist").removeHandler(handler)
    return recipe, "\n".join(messages)


def test_log_has_every_metric(run: tuple[Recipe, str]) -> None:
    recipe, _ = run
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "validation"] * 2
    wanted = {
        "loss", "lr", "grad_norm", "clips_per_s", "data_wait_share", "peak_memory_gb", "present_audio",
        "tflops_per_s", "mfu", "train_accuracy", "train_accuracy_verb", "train_entropy_noun",
    }  # fmt: skip
    assert wanted <= set(lines[0])
    assert lines[0]["mfu"] == pytest.approx(lines[0]["tflops_per_s"])
    assert lines[0]["peak_memory_gb"] > 0.05
    assert {"verb_loss", "noun_loss", "action_top1"} <= set(lines[2])
    assert list(recipe.run_dir.glob("events.out.tfevents.*"))


def test_trace_holds_the_requested_steps(run: tuple[Recipe, str]) -> None:
    recipe, messages = run
    with gzip.open(recipe.run_dir / "trace" / "rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("step ")}
    assert steps == {"step 1", "step 2"}
    assert "trace written to" in messages


def test_setting_without_effect_on_a_cpu_is_logged_once(run: tuple[Recipe, str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("offloading has an effect here")
    assert run[1].count("training.offload optimizer has no effect") == 1


def test_best_weights_are_recorded_and_evaluated_like_a_run(run: tuple[Recipe, str]) -> None:
    recipe, _ = run
    lines = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["noun_loss"] for line in lines if line["kind"] == "validation"}
    step = min(losses, key=lambda step: losses[step])
    best = read_state(recipe.run_dir)["best"]
    assert best == {"metric": "noun_loss", "value": losses[step], "step": step, "epoch": step // 2 - 1}
    done = carry_out(plan_evaluation(recipe.run_dir / "best", lambda modalities: [Condition(tuple(modalities))]))
    assert done.results.rows[0].figures["noun_loss"] == pytest.approx(losses[step], abs=1e-5)
    assert (done.name, done.folder) == ("run/best", recipe.run_dir / "best" / "eval")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_precision_trains_or_is_refused_on_one_line(
    one_rank_world: World, shards: Path, tmp_path: Path, precision: str
) -> None:
    """Train in each precision but float32, which other tests use; not every CPU supports float16. Some batches of one
    clip lack a modality, whose encoder then runs on zeros of the right precision."""
    settings = make_recipe(tmp_path, shards, precision=precision, validate_every_epochs=0, batch_size=1).model_dump()
    settings["data"] |= {"modalities": ["video", "audio"], "modality_dropout": {"probability": 0.5}}
    settings["inputs"]["video"] = {"num_frames": 2, "short_side": 16, "crop": 16}
    settings["model"]["encoders"]["video"] = {"name": "small_video", "options": {"width": 4}}
    recipe = Recipe.model_validate(settings)
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        with pytest.raises(UserError, match=r"training\.precision fp16: .*bf16 or fp32"):
            train(recipe, one_rank_world, measure)
        return
    train(recipe, one_rank_world, measure)
    written = [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in written if line["kind"] == "train"]
    assert lines
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert min(line["present_video"] for line in lines) == min(line["present_audio"] for line in lines) == 0
