"""Profiles of the fusion block alone, of any batch and precision, and of the peaks of CUDA's allocator."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from karmma_dist.cli import main
from karmma_dist.modalities import MODALITIES, subsets
from karmma_dist.models.flops import ClipFlops, count_flops, flops_per_clip, meta_model, meta_tokens
from karmma_dist.models.karmma import FusionBlock, KarmmaModel
from karmma_dist.profiling import measure as measuring
from karmma_dist.profiling.costs import (
    Cost,
    Profile,
    ProfiledModel,
    Workload,
    cost,
    find_models,
    fusion_cost,
    profile_recipe,
)
from karmma_dist.profiling.measure import allocator_peaks
from karmma_dist.profiling.memory import FUSION_CLIPS, attention, fusion_peak
from karmma_dist.profiling.report import print_profile
from karmma_dist.recipe import load_recipe
from karmma_dist.studies.costs import Counter
from karmma_dist.studies.study import Column, load_study

V, F, A, *_ = MODALITIES
DEMO = "data.heads={verb: 4, noun: 3}"
PARTS = ("model", "fusion")
Models = dict[str, tuple[ProfiledModel, KarmmaModel, ClipFlops]]


@pytest.fixture(autouse=True)
def _no_shards_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, so that profiles do not depend on shards and runs in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EPIC_KITCHENS_SHARDS", raising=False)


@pytest.fixture(scope="module")
def demo() -> Models:
    """Return profiled models, models without weights, and FLOPs, by role."""
    profiled_models, _ = find_models("demo/distill", [DEMO])
    models = [meta_model(p.model, p.inputs, p.modalities, p.heads).eval() for p in profiled_models]
    return {p.role: (p, model, flops_per_clip(model)) for p, model in zip(profiled_models, models, strict=True)}


def make_block(layers: int = 1, dtype: torch.dtype = torch.float32) -> FusionBlock:
    with torch.device("meta"):
        return FusionBlock(32, 4, layers, 32, attention_dropout=0.3).to(dtype).eval()


def peak(block: FusionBlock, num_tokens: int, clips: int, **form: bool) -> int:
    peak_bytes = fusion_peak(block, meta_tokens(block, num_tokens, clips), **form)
    block.eval()
    return peak_bytes


SIZES = {"num_tokens": st.integers(24, 400), "layers": st.integers(1, 3)}


@given(**SIZES)
@settings(max_examples=8, deadline=None)
def test_fused_and_unfused_attention_compute_as_many_flops(num_tokens: int, layers: int) -> None:
    block = make_block(layers)
    counted = []
    for fused in (True, False):
        with attention(fused=fused):
            counted.append(count_flops(block, meta_tokens(block, num_tokens))[1])
    assert counted[0] == counted[1] > 0


@given(**SIZES, clips=st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_inference_holds_eight_token_tensors_or_seven_and_two_matrices(
    num_tokens: int, layers: int, clips: int
) -> None:
    block = make_block(layers)
    given_bytes, inner_bytes = 4 * clips * num_tokens * 32, 4 * clips * (1 + num_tokens) * 32
    matrix_bytes = 4 * clips * 4 * (1 + num_tokens) ** 2
    assert peak(block, num_tokens, clips) == given_bytes + 7 * inner_bytes
    assert peak(block, num_tokens, clips, fused=False) == given_bytes + 6 * inner_bytes + 2 * matrix_bytes


@pytest.mark.parametrize("training", [False, True])
def test_unfused_memory_is_quadratic_and_fused_memory_linear_in_tokens(training: bool) -> None:
    block = make_block(2)
    plain, fused = (
        [peak(block, num, 2, fused=is_fused, training=training) for num in (1000, 2000, 4000)]
        for is_fused in (False, True)
    )
    assert plain[2] / plain[1] > 3.5
    assert fused[2] / fused[1] < 2.001
    assert all(many > few for many, few in zip(plain, fused, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", PARTS)
def test_only_memory_depends_on_the_batch_and_affinely(demo: Models, part: str, precision: str) -> None:
    for profiled, model, flops in demo.values():
        rows = []
        for batch in (2, 3, 5):
            load = Workload(part, precision, batch)
            row = cost(profiled, (V, A), flops, load) if part == "model" else fusion_cost(profiled, (V, A), model, load)
            assert (row.part, row.precision, row.batch) == (part, precision, batch)
            rows.append(row)
        changing = {"batch"}
        for name in ("activations_bytes", "training_bytes", "unfused_activations_bytes", "unfused_training_bytes"):
            two, three, five = (getattr(row, name) for row in rows)
            changing.add(name)
            if name.startswith("unfused") and part == "model":
                assert two is three is five is None
            elif "training" in name:
                # With few clips the peak may be at another moment, at which gradients take a larger share.
                assert five - three >= 2 * (three - two) > 0, name
            else:
                assert five - three == 2 * (three - two) > 0, name
        kept = [{name: value for name, value in asdict(row).items() if name not in changing} for row in rows]
        assert kept[0] == kept[1] == kept[2]


def test_half_precisions_halve_only_fused_memory() -> None:
    wide = make_block()
    for dtype in (torch.bfloat16, torch.float16):
        narrow = make_block(dtype=dtype)
        assert 2 * peak(narrow, 300, 2) == peak(wide, 300, 2)
        assert peak(narrow, 300, 2, fused=False) > 0.99 * peak(wide, 300, 2, fused=False)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_fusion_block_and_other_parts_add_up_to_the_model(
    demo: Models, role: str
) -> None:
    profiled, whole_model, flops = demo[role]
    recipe = profiled.model
    for subset in subsets(profiled.modalities):
        row = fusion_cost(profiled, subset, whole_model, Workload("fusion"))
        model = meta_model(recipe, profiled.inputs, subset, profiled.heads)
        rest = [p for name, p in model.named_parameters() if not name.startswith("fusion.")]
        assert row.params_total + sum(p.numel() for p in rest) == sum(p.numel() for p in model.parameters())
        assert row.params_trainable + sum(p.numel() for p in rest if p.requires_grad) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        heads = 2 * (1 + len(subset)) * recipe.fc_width * (recipe.width + sum(profiled.heads.values()))
        before = sum(flops.encoders[m] + flops.projections[m] for m in subset)
        assert before + round(1e9 * row.gflops) + heads == flops.alone(subset)
        in_block = subset if whole_model.leaves_out else profiled.modalities
        assert row.gflops_whole_model == fusion_cost(profiled, in_block, whole_model, Workload("fusion")).gflops
        assert row.tokens == model.num_tokens


@pytest.fixture(scope="module")
def teacher() -> FusionBlock:
    """Return the fusion block of the paper's teacher."""
    (profiled,), _ = find_models("epic_kitchens/teacher")
    return meta_model(profiled.model, profiled.inputs, profiled.modalities, profiled.heads).fusion.eval()


@pytest.mark.parametrize(
    ("num_tokens", "unfused", "fused"),
    [
        (3 * 785, 12.99, 1.85),  # Tab. V's 785 tokens
        (3 * 784, 12.96, 1.85),  # the tokens that Video Swin makes from a clip
        (3 * 300, 2.28, 0.71),
    ],
)
def test_memory_of_the_papers_fusion_block(teacher: FusionBlock, num_tokens: int, unfused: float, fused: float) -> None:
    tokens_BTD = meta_tokens(teacher, num_tokens, FUSION_CLIPS)
    assert round(fusion_peak(teacher, tokens_BTD, fused=False) / 1e9, 2) == unfused
    assert round(fusion_peak(teacher, tokens_BTD) / 1e9, 2) == fused


def test_studies_and_profiles_count_the_same_memory() -> None:
    counter = Counter(load_study("epic_kitchens/tab5").study)
    recipe = load_recipe("epic_kitchens/teacher")
    profile, _ = profile_recipe("epic_kitchens/teacher", modalities="V,F,A", workload=Workload("fusion", "fp32", 32))
    (row,) = profile.rows
    columns = {"fusion_memory": row.activations_bytes, "fusion_memory_unfused": row.unfused_activations_bytes}
    for metric, counted in columns.items():
        assert counter.cost_figure(recipe, Column(name=metric, metric=metric)) == counted / 1e9


def test_a_note_compares_published_memory_for_the_papers_block(capsys: pytest.CaptureFixture[str]) -> None:
    def notes(*arguments: str) -> list[str]:
        assert main(["profile", *arguments, "--modalities", "V", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["notes"]

    (note,) = notes("epic_kitchens/teacher", "--part", "fusion")
    assert all(figures in note for figures in ("published 14.28 / 2.65 GB", "12.96 / 2.28 GB", "1.85 / 0.71 GB"))
    assert notes("epic_kitchens/teacher", "--part", "fusion", "--set", "model.tau=100") == [note]
    assert notes("epic_kitchens/unimodal", "--part", "fusion") == []


@pytest.mark.parametrize("part", PARTS)
def test_the_defaults_are_bf16_and_one_clip(capsys: pytest.CaptureFixture[str], part: str) -> None:
    command = ["profile", "demo/distill", "--set", DEMO, "--modalities", "V", "--json", "--part", part]
    profiles = []
    for options in ([], ["--precision", "bf16", "--batch", "1"]):
        assert main([*command, *options]) == 0
        profiles.append(json.loads(capsys.readouterr().out))
    assert profiles[0] == profiles[1]
    for row in profiles[0]["rows"]:
        assert row["inference_bytes"] == row["weights_bytes_bf16"] + row["activations_bytes"]
        assert row["peak_allocated_bytes"] is row["peak_reserved_bytes"] is None
        assert (row["unfused_activations_bytes"] is None) is (part == "model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("part", PARTS)
def test_a_profile_on_a_cpu_notes_the_missing_allocator_peaks(capsys: pytest.CaptureFixture[str], part: str) -> None:
    command = ["profile", "demo/distill", "--set", DEMO, "--modalities", "V,A", "--measure", "--repeats", "1"]
    command += ["--part", part, "--precision", "bf16", "--batch", "2"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [note for note in result["notes"] if "allocator" in note] == [measuring._NO_ALLOCATOR]
    assert result["measured"].keys() == {"device", "precision", "threads", "repeats"}
    assert result["measured"]["precision"] == "bf16"
    for row in result["rows"]:
        assert row["latency_ms"] > 0
        assert all(value is None for name, value in row.items() if "peak_" in name)
        if row["model"] == "teacher":  # without stand-ins the whole model computes the same as the subset's model
            assert row["measured_activations_bytes"] == pytest.approx(row["activations_bytes"], rel=0.05)


@pytest.mark.parametrize("part", PARTS)
def test_allocator_peaks_are_of_a_model_with_the_subset_only(
    demo: Models, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    calls: list[str] = []
    peaks = iter(range(1, 10))
    for name in ("empty_cache", "reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):

        def call(*_: Any, name: str = name) -> int:
            calls.append(name)
            return next(peaks) if name.startswith("max") else 0

        monkeypatch.setattr(torch.cuda, name, call)
    run, built = measuring._Case.run, []
    monkeypatch.setattr(measuring._Case, "run", lambda case: calls.append("run") or run(case))
    build = measuring._build
    monkeypatch.setattr(measuring, "_build", lambda *given: built.append(build(*given)) or built[-1])
    profiled, model, flops = demo["student"]
    load = Workload(part, "fp32", 2)
    row = cost(profiled, (V, A), flops, load) if part == "model" else fusion_cost(profiled, (V, A), model, load)
    allocated = allocator_peaks(row, profiled, torch.device("cpu"), torch.float32)
    once = ["empty_cache", "reset_peak_memory_stats", "run", "max_memory_allocated", "max_memory_reserved"]
    forms = 1 if part == "model" else 2
    assert calls == once * forms
    names = ["peak_allocated_bytes", "peak_reserved_bytes"]
    assert list(allocated) == [*names, *(f"unfused_{name}" for name in names)][: 2 * forms]
    assert list(allocated.values()) == list(range(1, 2 * forms + 1))
    assert [alone.modalities for alone in built] == [(V, A)]
    replace(row, **allocated)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("part", PARTS)
def test_the_allocator_allocates_at_least_the_counted_bytes(capsys: pytest.CaptureFixture[str], part: str) -> None:
    command = ["profile", "demo/distill", "--set", DEMO, "--modalities", "V,A", "--measure", "--repeats", "1", "--json"]
    assert main([*command, "--precision", "fp32", "--batch", "8", "--part", part]) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["peak_reserved_bytes"] >= row["peak_allocated_bytes"] >= 0.95 * row["inference_bytes"]
        if part == "fusion":
            assert row["unfused_peak_allocated_bytes"] >= row["peak_allocated_bytes"]


def test_tables_of_the_fusion_block_fit_a_terminal() -> None:
    def row(model: str, scale: float) -> Cost:
        return Cost(
            model, f"epic_kitchens/{model}", (V, F, A), 17.742 * scale, 17.742, 7_095_552, 7_095_552,
            {V: 784, F: 784, A: 784}, 14_191_104, 28_382_208, int(1_850_376_192 * scale), 5_561_768_712, 1234.56,
            1_850_376_192, "fusion", "fp32", 32, int(12_958_042_112 * scale), 44_321_407_752,
        )  # fmt: skip

    measured = {"device": "cpu", "precision": "fp32", "threads": 2, "repeats": 5}
    rows = [row("teacher", 1.0), row("student", 0.5)]
    profile = Profile("epic_kitchens/distill", rows, ["a remark"], measured, Workload("fusion", "fp32", 32))
    for with_peaks in (False, True):
        peaks = {f.name: 13_000_000_000 for f in fields(Cost) if "peak_" in f.name} if with_peaks else {}
        shown_profile = replace(profile, rows=[replace(row, **peaks) for row in rows])
        console = Console(width=80, record=True, file=io.StringIO())
        print_profile(shown_profile, console)
        shown = console.export_text()
        assert "…" not in shown
        assert max(len(line) for line in shown.splitlines()) <= 80
        assert all(text in shown for text in ("12,958.0", "1,850.4", "6,479.0", "32 clips", "fp32", "unfused"))
        assert ("13,000.0" in shown) is with_peaks
        assert any(line.split()[2:4] == ["-", "-"] for line in shown.splitlines()) is not with_peaks


def test_an_unsupported_precision_is_refused_before_counting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_half(*_: Any) -> None:
        raise RuntimeError("\"slow_conv3d\" not implemented for 'Half'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measuring.F, "conv3d", no_half)
    monkeypatch.setattr("karmma_dist.profiling.costs.profile_recipe", lambda *_: pytest.fail("counted"))
    assert main(["profile", "demo/distill", "--set", DEMO, "--measure", "--precision", "fp16"]) == 2
    error = capsys.readouterr().err
    assert "this device (cpu) does not compute in fp16: use --precision fp32" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--part", "heads"], "'heads' is not one of 'model', 'fusion'"),
        (["--measure", "--batch", "100000000", "--part", "fusion"], "lower --batch"),
    ],
)
def test_invalid_options_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "demo/distill", "--set", DEMO, "--modalities", "V", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_a_fusion_block_is_measured_only_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["profile", "demo/video", "--set", DEMO, "--set", "model.fusion=mean"]
    assert main([*command, "--measure", "--repeats", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["tokens"] == {V: 1}
    assert row["latency_ms"] > 0
    assert main([*command, "--part", "fusion"]) == 2
    assert capsys.readouterr().err == "error: a model with model.fusion mean has no fusion block\n"
