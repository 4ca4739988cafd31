"""Profiling reproduces published costs, parts add up to the whole, and memory is what PyTorch allocates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from karmma_dist.cli import main
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.modalities import MODALITIES, subsets
from karmma_dist.models.flops import ClipFlops, flops_per_clip, meta_clip, meta_model
from karmma_dist.models.karmma import FusionBlock, KarmmaModel
from karmma_dist.models.model_card import save_model
from karmma_dist.profiling.costs import Cost, Profile, ProfiledModel, cost, find_models, profile_recipe
from karmma_dist.profiling.memory import FusedAttention, PeakMemory, inference_peak
from karmma_dist.profiling.report import print_profile
from karmma_dist.recipe import load_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.loader import check_heads
from karmma_dist.training.trainer import train

V, F_, A, D, *_ = MODALITIES
ALL = ((V,), (F_,), (A,), (V, F_), (V, A), (F_, A), (V, F_, A))


@pytest.fixture(autouse=True)
def _no_shards_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, so that profiles do not depend on shards and runs in the working directory."""
    monkeypatch.chdir(tmp_path)
    for variable in ("EPIC_KITCHENS_SHARDS", "SSV2_SHARDS"):
        monkeypatch.delenv(variable, raising=False)


def profiled_model(name: str, role: str, *overrides: str) -> ProfiledModel:
    profiled_models, _ = find_models(name, overrides)
    return next(profiled for profiled in profiled_models if profiled.role == role)


def on_meta(profiled: ProfiledModel, modalities: tuple[str, ...] | None = None) -> KarmmaModel:
    return meta_model(profiled.model, profiled.inputs, modalities or profiled.modalities, profiled.heads)


@pytest.fixture(scope="module")
def published() -> dict[str, ClipFlops]:
    return {
        f"{folder} {role}": flops_per_clip(on_meta(profiled_model(f"{folder}/distill", role)))
        for folder in ("epic_kitchens", "something_something")
        for role in ("teacher", "student")
    }


@pytest.mark.parametrize(
    ("role", "subset", "gflops"),
    [
        ("teacher", (V,), 567.961),
        ("teacher", (V, F_), 1137.011),
        ("teacher", (V, F_, A), 1707.166),
        ("student", (V,), 176.379),
    ],
)
def test_published_gflops_are_reproduced(
    published: dict[str, ClipFlops], role: str, subset: tuple[str, ...], gflops: float
) -> None:
    assert published[f"epic_kitchens {role}"].alone(subset) / 1e9 == pytest.approx(gflops, abs=1e-3)


@pytest.mark.parametrize(("tau", "gflops"), [(784, 1759), (500, 1725), (100, 1693)])
def test_published_gflops_of_other_token_limits_are_reproduced(tau: int, gflops: float) -> None:
    teacher = profiled_model("epic_kitchens/teacher", "teacher", f"model.tau={tau}")
    assert flops_per_clip(on_meta(teacher)).alone((V, F_, A)) / 1e9 == pytest.approx(gflops, abs=0.5)


@pytest.mark.parametrize(
    ("role", "subset", "millions"), [("teacher", (V, F_, A), 11.25), ("student", (V,), 29.64)]
)
def test_published_trainable_parameters_are_reproduced(role: str, subset: tuple[str, ...], millions: float) -> None:
    model = on_meta(profiled_model("epic_kitchens/distill", role), subset)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable / 1e6 == pytest.approx(millions, rel=5e-4)


def test_the_student_takes_at_most_half_of_the_teachers_flops(
    published: dict[str, ClipFlops],
) -> None:
    for folder in ("epic_kitchens", "something_something"):
        teacher, student = published[f"{folder} teacher"], published[f"{folder} student"]
        for subset in teacher.fusion:
            # On boxes alone both run the same encoder, the student with 9 layers and the teacher with 12.
            assert student.alone(subset) <= (0.75 if subset == (D,) else 0.5) * teacher.alone(subset), subset


@pytest.mark.parametrize(
    ("folder", "bounds"),
    [
        ("epic_kitchens", {(V,): 0.53, (A,): 0.1, (V, F_, A): 0.4}),
        # Half of the student's parameters are in STLT, as wide as the teacher's, with 9 layers instead of 12.
        ("something_something", {(V,): 0.53, (D,): 0.71, (V, F_, D): 0.54}),
    ],
)
def test_the_student_takes_about_half_of_the_teachers_memory(
    folder: str, bounds: dict[tuple[str, ...], float]
) -> None:
    profiled_models, _ = find_models(f"{folder}/distill")
    for subset, bound in bounds.items():
        teacher, student = (_inference_bytes(s, subset) for s in profiled_models)
        assert student <= bound * teacher, subset


def _inference_bytes(profiled: ProfiledModel, subset: tuple[str, ...]) -> int:
    model = on_meta(profiled, subset).to(torch.bfloat16).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    clip = meta_clip(profiled.inputs, subset, torch.bfloat16)
    return weights + inference_peak(model, clip, torch.ones(1, len(subset), dtype=torch.bool))


def counted(model: KarmmaModel, present: tuple[str, ...], backward: bool = False) -> int:
    """Count the FLOPs of the whole model at once with PyTorch's counter."""
    clip = meta_clip(model.inputs, present)
    mask = torch.tensor([[m in present for m in model.modalities]])
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(clip, mask)
        if backward:
            sum(logit.sum() for logit in logits.values()).backward()  # type: ignore[union-attr]
    return int(counter.get_total_flops())


DEMO = ("data.heads={verb: 4, noun: 3}",)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_parts_add_up_to_the_whole_models_flops(role: str) -> None:
    demo = profiled_model("demo/distill", role, *DEMO)
    flops = flops_per_clip(on_meta(demo))
    for subset in subsets(demo.modalities):
        assert flops.alone(subset) == counted(on_meta(demo, subset).eval(), subset)
        assert flops.forward(dict.fromkeys(subset, 1), 1) == counted(on_meta(demo).eval(), subset)


def test_flops_are_counted_on_any_device_without_changing_the_model() -> None:
    demo = profiled_model("demo/distill", "student", *DEMO)
    model = KarmmaModel(demo.model, demo.inputs, demo.modalities, demo.heads).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flops_per_clip(model) == flops_per_clip(on_meta(demo))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_training_step_costs_three_forward_passes_of_trained_parts(role: str) -> None:
    demo = profiled_model("demo/distill", role, *DEMO)
    flops = flops_per_clip(on_meta(demo))
    for subset in subsets(demo.modalities):
        estimate = flops.training(dict.fromkeys(subset, 1), 1)
        # The first layers compute no gradient of their input, so the real count is a little lower.
        assert 0.8 * estimate < counted(on_meta(demo).train(), subset, backward=True) <= estimate


def test_flops_grow_with_the_clips_that_have_a_modality() -> None:
    flops = ClipFlops({"video": 100, "audio": 10}, {"video": 2, "audio": 1}, {}, frozenset({"video"}), False)
    flops.fusion[("video", "audio")] = 5
    assert flops.forward({"video": 3, "audio": 1}, 4) == 3 * 102 + 11 + 4 * 5
    assert flops.training({"video": 3}, 4) == 3 * (100 + 3 * 2) + 3 * 11 + 3 * 4 * 5  # audio: one clip of zeros


@given(sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=8), keep=st.booleans())
@settings(max_examples=50, deadline=None)
def test_peak_memory_is_the_most_bytes_alive_at_once(sizes: list[int], keep: bool) -> None:
    for device in ("cpu", "meta"):
        kept: list[Tensor] = []
        with PeakMemory(device) as memory:
            for size in sizes:
                tensor = torch.empty(size, device=device)
                tensor.view(-1).add_(1)  # a view and a change in place allocate nothing
                kept += [tensor] if keep else []
                del tensor
            assert memory.live_bytes == 4 * sum(x.numel() for x in kept)
        assert memory.peak_bytes == 4 * (sum(sizes) if keep else max(sizes))


def test_peak_memory_is_what_pytorch_allocates() -> None:
    torch.manual_seed(0)
    block = FusionBlock(width=32, num_heads=4, num_layers=2, feedforward=64).eval()
    tokens = torch.randn(2, 19, 32)
    with torch.no_grad(), PeakMemory("cpu") as memory:
        memory.ignore(block.parameters())
        block(tokens)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as allocations:
        block(tokens)
    live = peak = 0
    for event in sorted(allocations.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert memory.peak_bytes == pytest.approx(peak, rel=0.02)
    meta, without_values = block.to("meta"), tokens.to("meta")
    with torch.no_grad(), FusedAttention(), PeakMemory("meta") as counted_memory:
        counted_memory.ignore(meta.parameters())
        meta(without_values)
    assert counted_memory.peak_bytes == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_fused_attention_makes_no_matrix_and_counts_the_same_flops(mask: str | None) -> None:
    q = torch.empty(2, 4, 512, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    bias = None
    if mask is not None:
        dtype = torch.bool if mask == "bool" else torch.bfloat16
        bias = torch.empty(1, 1, 512, 512, device="meta", dtype=dtype, requires_grad=mask == "bias")
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        F.scaled_dot_product_attention(q, q, q, attn_mask=bias)
    with FusedAttention(), PeakMemory("meta") as memory, FlopCounterMode(display=False) as fused:
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=bias)
        assert memory.peak_bytes < 2 * 4 * 512 * 512 * 2
        assert fused.get_total_flops() == plain.get_total_flops() == 2 * 2 * 2 * 4 * 512 * 512 * 8
        out.sum().backward()
    assert q.grad is not None
    assert bias is None or mask == "bool" or bias.grad is not None


def test_a_training_step_holds_more_than_inference() -> None:
    demo = profiled_model("demo/distill", "student", *DEMO)
    row = cost(demo, (V, A), flops_per_clip(on_meta(demo)))
    assert row.training_bytes > row.activations_bytes > 0
    gradients = 2 * row.params_trainable
    assert row.training_bytes > gradients


def test_classes_come_from_local_shards(shards: Path) -> None:
    (profiled,), _ = find_models("demo/video", [f"data.shards={shards}"])
    assert profiled.heads == {head: len(names) for head, names in ShardFolder(shards).classes.items()}


def test_classes_of_a_mixture_are_those_of_all_its_datasets(shards: Path, actions: Path) -> None:
    both = f"data.mixture={{a: {{shards: {actions}, weight: 1}}, b: {{shards: {shards}, weight: 1}}}}"
    (profiled,), _ = find_models("demo/video", ["data.shards=null", both])
    classes = ShardFolder(actions).classes | ShardFolder(shards).classes
    assert profiled.heads == {head: len(names) for head, names in classes.items()}
    with pytest.raises(UserError, match=r"no shards in demo/shards or demo_second/shards, and data\.heads is"):
        find_models("demo/mixture")


def test_shards_with_other_classes_than_the_recipe_are_refused(shards: Path, tmp_path: Path) -> None:
    changes = [f"data.shards={shards}", "data.heads={verb: 97}", f"runs_dir={tmp_path}"]
    recipe = load_recipe("demo/video", changes)
    for refuse in (
        lambda: check_heads(recipe.data, ShardFolder(shards)),
        lambda: train(recipe, World(0, 0, 1, "localhost", 1), validate),
        lambda: find_models("demo/video", changes),
    ):
        with pytest.raises(UserError, match=r"the shards' classes are verb \d+, noun \d+; data\.heads says verb 97"):
            refuse()
    assert not (tmp_path / "demo").exists()


def test_unknown_classes_are_an_error() -> None:
    with pytest.raises(UserError, match=r"there are no shards in demo/shards, and data\.heads is empty"):
        find_models("demo/distill")


def test_the_teacher_is_a_finished_run_a_recipe_or_noted(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo" / "teacher"
    overrides = [*DEMO, f"runs_dir={tmp_path}/runs"]
    profiled_models, notes = find_models("demo/distill", overrides)
    assert [(s.role, s.run) for s in profiled_models] == [("teacher", "demo/teacher"), ("student", "demo/distill")]
    assert notes == []
    other = load_recipe("demo/teacher").model.model_copy(update={"fc_width": 12})
    save_model(KarmmaModel(other, profiled_models[0].inputs, (V, F_, A), profiled_models[0].heads), run)
    (teacher, _), notes = find_models("demo/distill", overrides)
    assert (teacher.role, teacher.run, teacher.model.fc_width) == ("teacher", str(run), 12)
    (student,), notes = find_models("demo/distill", [*overrides, "after=[]", "distill.teacher=gone"])
    assert student.role == "student"
    assert "only the student" in notes[0]
    assert "gone" in notes[0]


def test_rows_of_equal_sizes_are_as_if_counted_separately() -> None:
    counts, profiled_models = profile_recipe("demo/distill", DEMO)
    assert [(row.modalities, row.model) for row in counts.rows] == [(s, m) for s in ALL for m in ("teacher", "student")]
    for profiled in profiled_models:
        row = next(row for row in counts.rows if (row.model, row.modalities) == (profiled.role, (F_, A)))
        assert row == cost(profiled, (F_, A), flops_per_clip(on_meta(profiled)))


def test_json_holds_the_promised_fields(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "demo/distill", "--set", DEMO[0], "--modalities", "V,A", "--json", "--plot", "bars.png"]
    assert main(command) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["model"] for row in rows] == ["teacher", "student"]
    for row in rows:
        assert row["modalities"] == ["video", "audio"]
        assert row["gflops"] > 0
        assert row["params_total"] >= row["params_trainable"] > 0
        assert set(row["tokens"]) == {"video", "audio"}
        assert row["latency_ms"] is None
    assert Path("bars.png").read_bytes().startswith(b"\x89PNG")


def test_measured_rows_have_latency_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "demo/distill", "--set", DEMO[0], "--modalities", "A", "--measure", "--repeats", "2"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured"].keys() == {"device", "precision", "threads", "repeats"}
    assert result["measured"]["repeats"] == 2
    assert all(row["latency_ms"] > 0 and row["measured_activations_bytes"] > 0 for row in result["rows"])


def test_tables_of_full_sized_models_fit_a_terminal() -> None:
    def row(model: str, scale: float) -> Cost:
        return Cost(
            model, f"epic_kitchens/{model}", (V, F_, A), 1707.166 * scale, 1707.166, int(274_165_133 * scale),
            11_249_037, {V: 300, F_: 300, A: 253}, int(548_330_266 * scale), 1_096_660_532, 483_300_000, 2_767_500_000,
            1234.56, 483_300_000,
        )  # fmt: skip

    settings_ = {"device": "cpu", "precision": "fp32", "threads": 2, "repeats": 5}
    rows = [row("teacher", 1.0), row("student", 0.21)]
    for shown_rows, ratio in ((rows, True), (rows[1:], False)):
        console = Console(width=80, record=True, file=io.StringIO())
        print_profile(Profile("epic_kitchens/distill", shown_rows, ["a remark"], settings_), console)
        shown = console.export_text()
        assert "…" not in shown
        assert max(len(line) for line in shown.splitlines()) <= 80
        expected = ("358.505", "57.57", "2,767.5", "1,234.6", "V+F+A", "median of 5", "note: a remark")
        assert all(text in shown for text in expected)
        assert ("ratio" in shown) is ratio
        assert ("0.21" in shown) is ratio


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kitchens/distill"], "no such file"),
        (["epic_kitchens/distill", "--modalities", "V,X"], "unknown modality 'X'"),
        (["epic_kitchens/distill", "--modalities", "D"], "modality 'detections' is not one of this model's"),
        (["demo/distill"], "--set data.heads.HEAD=NUMBER"),
        (["demo/distill", "--set", "data.heads.verb=0"], "data.heads.verb"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
