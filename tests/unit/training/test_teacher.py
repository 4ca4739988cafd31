"""The distill stage: the targets of one teacher or several experts, and the teachers that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.models.flops import meta_model
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.losses import cross_entropy
from karmma_dist.models.model_card import save_model
from karmma_dist.recipe import DistillRecipe, Recipe, load_chain
from karmma_dist.streaming.batch import collate
from karmma_dist.training import teacher as teacher_module
from karmma_dist.training.objectives import Distillation, soft_targets_of
from karmma_dist.training.teacher import Teacher, members_of
from kits.experts import (
    EXPERTS,
    HEADS,
    INPUTS,
    MODALITIES,
    UNDROPPED,
    build,
    clips,
    held_out,
    losses,
    make_model,
    make_recipe,
    masks,
    save_run,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "barrier", lambda: None)


@settings(max_examples=25, deadline=None)
@given(masks, losses, losses, st.floats(0.2, 3), st.floats(0.5, 3), st.booleans())
def test_ensemble_is_the_softmin_weighted_mean_of_the_clips_experts(
    mask: list[list[bool]], verb: list[float], noun: list[float], weight_temperature: float, temperature: float,
    of_logits: bool,
) -> None:
    """Compare with one clip, one expert and one head at a time."""
    present_BM = torch.tensor(mask)
    inputs = clips(present_BM)
    recipe = DistillRecipe(
        teachers=["v", "f", "a"], weight_temperature=weight_temperature, temperature=temperature,
        average="logits" if of_logits else "probabilities",
    )
    by_head = {"verb": verb, "noun": noun}
    with torch.no_grad():
        taught = Teacher(EXPERTS, MODALITIES, by_head, recipe)(inputs, present_BM)
        for clip, has in enumerate(mask):
            for head, loss_E in by_head.items():
                total, mixed = 0.0, torch.zeros(HEADS[head], dtype=torch.float64)
                for e in [e for e in range(3) if has[e]]:
                    row = int(present_BM[:clip, e].sum())
                    clip_inputs = {MODALITIES[e]: inputs[MODALITIES[e]][row : row + 1]}
                    logits = EXPERTS[e](clip_inputs, torch.tensor([[True]]))[head][0].double() / temperature
                    weight = float(torch.tensor(-loss_E[e] / weight_temperature, dtype=torch.float64).exp())
                    mixed += weight * (logits if of_logits else logits.softmax(-1))
                    total += weight
                mixed /= total
                expected = mixed.log_softmax(-1) if of_logits else mixed.log()
                torch.testing.assert_close(taught[head][clip].double(), expected, atol=1e-5, rtol=1e-5)


def test_one_teacher_teaches_its_own_softmax_to_the_last_bit() -> None:
    model = make_model(MODALITIES)
    present_BM = torch.tensor([[True, False, True], [False, True, False]])
    inputs = clips(present_BM)
    with torch.no_grad():
        teacher = Teacher([model], MODALITIES, {"verb": [0.0], "noun": [0.0]}, DistillRecipe(teacher="t"))
        taught = teacher(inputs, present_BM)
        for head, logits in model(inputs, present_BM).items():
            assert torch.equal(taught[head], logits.log_softmax(-1))


@pytest.mark.parametrize("present", [[True, True, True], [False, False, True], [False, True, False]])
def test_with_sharded_parameters_every_layer_runs_in_every_call(present: list[bool]) -> None:
    """Check also that the targets stay the same."""
    members = [make_model(["video", "flow"], 1), make_model(["audio"], 2)]
    present_BM = torch.tensor([present, present])
    teacher = Teacher(members, MODALITIES, {"verb": [1.0, 2.0], "noun": [2.0, 1.0]}, DistillRecipe(teachers=["a", "b"]))
    with torch.no_grad():
        expected = teacher(clips(present_BM), present_BM)
        teacher.run_everything()
        layers = [layer for layer in teacher.modules() if list(layer.parameters(recurse=False))]
        ran = set()
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, _: ran.add(module))
        taught = teacher(clips(present_BM), present_BM)
    assert len(layers) > 20
    assert ran == set(layers)
    for head in HEADS:
        torch.testing.assert_close(taught[head], expected[head])


def test_stage_mixes_cross_entropy_and_kl_and_logs_both_models() -> None:
    torch.manual_seed(0)
    present_BM = torch.tensor([[True, True, True], [True, False, False]])
    batch = collate([None, None], MODALITIES, list(HEADS))
    batch.present_BM, batch.inputs = present_BM, clips(present_BM)
    batch.labels = {"verb": torch.tensor([0, 2]), "noun": torch.tensor([3, 1])}
    recipe = DistillRecipe(teachers=["v", "f", "a"], alpha=0.25, temperature=2.0)
    teacher = Teacher(EXPERTS, MODALITIES, {"verb": [1.0, 2.0, 3.0], "noun": [3.0, 2.0, 1.0]}, recipe)
    objective = Distillation(recipe, soft_targets_of(teacher))
    student = {head: torch.randn(2, num, requires_grad=True) for head, num in HEADS.items()}
    loss, parts = objective.loss(student, batch)
    with torch.no_grad():
        taught = teacher(batch.inputs, present_BM)
    kls = []
    for head in HEADS:
        p, q = taught[head].exp(), (student[head] / 2).softmax(-1)
        kls.append((p * (p.log() - q.log())).sum(-1).mean() * 4)
        assert float(parts[f"teacher_entropy_{head}"]) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-6)
    expected = 0.25 * cross_entropy(student, batch.labels) + 0.75 * sum(kls) / 2
    torch.testing.assert_close(loss, expected)
    assert {"kl", "train_accuracy_verb", "teacher_accuracy_noun", "agreement", "train_entropy_verb"} <= set(parts)
    assert members_of(teacher) == EXPERTS


def test_expert_weights_use_held_out_clips_and_survive_a_resume(tmp_path: Path) -> None:
    """Check also that the validation split is not used, and that best weights share the run's held-out clips."""
    for seed, modality in enumerate(MODALITIES):
        expert = save_run(tmp_path, modality, [modality], seed, **held_out([modality], 0.1 + seed / 10))
        save_model(make_model([modality], seed), tmp_path / modality / "best", recipe=expert)
    asked = []

    def measure(model: KarmmaModel, recipe: Recipe) -> dict[str, float]:
        data = recipe.data
        asked.append((model.modalities, recipe.modalities, data.validation_split, data.train_split, data.hold_out))
        return {"verb_loss": float(len(asked)), "noun_loss": 2.0}

    teachers = ["video/best", "flow", "audio/weights.safetensors"]
    recipe = make_recipe(
        tmp_path, distill={"teachers": teachers, "weight_temperature": 0.5}, model={"modalities": ["video"]}
    )
    weights = build(recipe, measure).weights()
    assert asked == [((m,), [m], "train", "train", 0.1) for m in MODALITIES]
    assert weights["verb"] == pytest.approx(torch.tensor([-1.0, -2.0, -3.0]).div(0.5).softmax(0).tolist())
    said = json.loads((tmp_path / "student" / "ensemble.json").read_text())
    assert said["losses"] == {"verb": [1.0, 2.0, 3.0], "noun": [2.0, 2.0, 2.0]}
    assert build(recipe).weights() == weights


@pytest.mark.parametrize("named", ["flow", "flow/weights.safetensors", "lonely.safetensors"])
def test_expert_without_held_out_clips_is_refused(tmp_path: Path, named: str) -> None:
    save_run(tmp_path, "video", ["video"], **held_out(["video"]))
    save_run(tmp_path, "flow", ["flow"])
    if named.startswith("lonely"):
        save_model(make_model(["flow"]), tmp_path / "elsewhere")
        named = str(tmp_path / "elsewhere" / "weights.safetensors")
    distill: dict[str, Any] = {"teachers": ["video", named]}
    with pytest.raises(UserError, match=r"held out no training clips .*data\.hold_out.*distill\.expert_weights"):
        build(make_recipe(tmp_path, ["video", "flow"], distill=distill))
    recipe = make_recipe(tmp_path, ["video", "flow"], distill={**distill, "expert_weights": "equal"})
    assert build(recipe).weights() == {"verb": [0.5, 0.5], "noun": [0.5, 0.5]}


@settings(max_examples=25, deadline=None)
@given(masks, st.floats(0.2, 3), st.booleans(), st.integers(0, 9))
def test_per_sample_weights_follow_from_the_loss_on_the_clip(
    mask: list[list[bool]], weight_temperature: float, of_logits: bool, seed: int
) -> None:
    """Compare with one clip, one expert and one head at a time, in float64."""
    present_BM = torch.tensor(mask)
    inputs = {m: x.double() for m, x in clips(present_BM, seed).items()}
    labels = {head: torch.randint(num, (len(mask),)) for head, num in HEADS.items()}
    experts = [make_model([m], seed).double() for seed, m in enumerate(MODALITIES)]
    recipe = DistillRecipe(
        teachers=["v", "f", "a"], expert_weights="per_sample", weight_temperature=weight_temperature,
        average="logits" if of_logits else "probabilities",
    )
    with torch.no_grad():
        taught = Teacher(experts, MODALITIES, {head: [0.0] * 3 for head in HEADS}, recipe)(inputs, present_BM, labels)
        for clip, has in enumerate(mask):
            for head, num in HEADS.items():
                total, mixed = 0.0, torch.zeros(num, dtype=torch.float64)
                for e in [e for e in range(3) if has[e]]:
                    row = int(present_BM[:clip, e].sum())
                    clip_inputs = {MODALITIES[e]: inputs[MODALITIES[e]][row : row + 1]}
                    logits = experts[e](clip_inputs, torch.tensor([[True]]))[head][0]
                    weight = float(logits.softmax(-1)[labels[head][clip]] ** (1 / weight_temperature))
                    mixed += weight * (logits if of_logits else logits.softmax(-1))
                    total += weight
                expected = (mixed / total).log_softmax(-1) if of_logits else (mixed / total).log()
                torch.testing.assert_close(taught[head][clip], expected, atol=1e-10, rtol=1e-10)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4), st.integers(0, 9))
def test_video_student_of_a_multimodal_teacher_matches_the_formulas(
    others: list[tuple[bool, bool]], seed: int
) -> None:
    """Compare loss and gradients in float64 with one clip at a time."""
    present_BM = torch.tensor([(True, *has) for has in others])
    batch = collate([None] * len(others), MODALITIES, list(HEADS))
    batch.present_BM, batch.inputs = present_BM, {m: x.double() for m, x in clips(present_BM, seed).items()}
    batch.labels = {head: torch.randint(num, (len(others),)) for head, num in HEADS.items()}
    teacher = make_model(MODALITIES, seed).double()
    student = make_model(["video"], seed + 1).double().requires_grad_(True)
    recipe = DistillRecipe(teacher="t", alpha=0.3, temperature=2.0)
    taught_by = Teacher([teacher], MODALITIES, {head: [0.0] for head in HEADS}, recipe)
    objective = Distillation(recipe, soft_targets_of(taught_by))
    objective.loss(student(*batch.only(["video"], MODALITIES)), batch)[0].backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for clip in range(len(others)):
        rows = {m: int(present_BM[:clip, e].sum()) for e, m in enumerate(MODALITIES) if present_BM[clip, e]}
        clip_inputs = {m: batch.inputs[m][row : row + 1] for m, row in rows.items()}
        taught = teacher(clip_inputs, present_BM[clip : clip + 1])
        logits = student({"video": clip_inputs["video"]}, torch.tensor([[True]]))
        for head in HEADS:
            p, q = (taught[head][0] / 2).softmax(-1), (logits[head][0] / 2).softmax(-1)
            hard = -logits[head][0].log_softmax(-1)[batch.labels[head][clip]]
            total = total + (0.3 * hard + 0.7 * 4 * (p * (p.log() - q.log())).sum()) / len(HEADS) / len(others)
    total.backward()
    assert found
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=1e-10)


def test_teachers_that_do_not_fit_are_refused_on_one_line(tmp_path: Path) -> None:
    save_run(tmp_path, "video", ["video"])
    save_run(tmp_path, "all", MODALITIES)
    save_run(tmp_path, "classes", MODALITIES, heads={"verb": 3, "noun": 5})
    save_run(tmp_path, "sizes", ["flow"], inputs={**INPUTS, "video": {**INPUTS["video"], "num_frames": 4}})
    refused = {
        ("classes",): "classes: the teacher's heads .* 'noun': 5.* .*heads of the shards",
        ("video",): "video: the teacher's modalities video are not those of data.modalities, video, flow, audio",
        ("all", "classes"): "classes: the teacher's heads",
        ("all", "sizes"): "sizes: the teacher was trained on other inputs: inputs.video must be equal",
        ("all", "nowhere"): "nowhere: no such run folder",
    }
    for names, message in refused.items():
        distill = {"teacher": names[0]} if len(names) == 1 else {"teachers": list(names)}
        with pytest.raises(UserError, match=message) as error:
            build(make_recipe(tmp_path, distill=distill))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"distill\.teachers: .*flow"):
        build(make_recipe(tmp_path, ["video", "flow"], distill={"teachers": ["video"]}))
    with pytest.raises(UserError, match=r"modalities video, flow, audio are not those of data\.modalities, video"):
        build(make_recipe(tmp_path, ["video"], distill={"teachers": ["video", "all"]}))


@pytest.mark.parametrize(
    ("teachers_dropout", "students_dropout", "num_lines"), [(0.0, 0.5, 1), (0.5, 0.5, 0), (0.0, 0.0, 0)]
)
@pytest.mark.parametrize("weights", ["", "/best", "/weights.safetensors"])
def test_teacher_trained_without_dropout_is_warned_about_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
    teachers_dropout: float, students_dropout: float, num_lines: int, weights: str,
) -> None:  # fmt: skip
    def data(probability: float) -> dict[str, Any]:
        return {"shards": "shards", "modalities": MODALITIES, "modality_dropout": {"probability": probability}}

    run = save_run(tmp_path, "all", MODALITIES, data=data(teachers_dropout))
    save_model(make_model(MODALITIES), run.run_dir / "best", recipe=run)
    build(make_recipe(tmp_path, data=data(students_dropout), distill={"teacher": f"all{weights}"}))
    warnings = [record.getMessage() for record in caplog.records if UNDROPPED in record.getMessage()]
    assert len(warnings) == num_lines
    assert all(line.startswith(f"{tmp_path}/all{weights}: ") and "\n" not in line for line in warnings)


def test_only_multimodal_experts_are_warned_about_missing_dropout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_run(tmp_path, "pictures", ["video", "flow"])
    save_run(tmp_path, "sound", ["audio"])
    data = {"shards": "shards", "modalities": MODALITIES, "modality_dropout": {"probability": 0.5}}
    build(make_recipe(tmp_path, data=data, distill={"teachers": ["pictures", "sound"], "expert_weights": "equal"}))
    (line,) = [record.getMessage() for record in caplog.records if UNDROPPED in record.getMessage()]
    assert line.startswith(f"{tmp_path}/pictures: ")


def test_inputs_that_the_teacher_does_not_use_may_differ(tmp_path: Path) -> None:
    save_run(tmp_path, "video", ["video"], inputs={**INPUTS, "audio": {"num_windows": 2}})
    assert len(build(make_recipe(tmp_path, ["video"], distill={"teacher": "video"})).members) == 1


@pytest.mark.parametrize("distill", [{}, {"teacher": "a", "teachers": ["b"]}, {"teachers": ["a", "a"]}])
def test_a_recipe_names_one_teacher_or_several_experts(tmp_path: Path, distill: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"either 'teacher'|lists 'a' twice"):
        make_recipe(tmp_path, distill=distill)


@pytest.mark.parametrize("dataset", ["epic_kitchens", "grid_epic"])
def test_ensemble_recipes_train_their_experts_first(dataset: str) -> None:
    *experts, student = load_chain(f"{dataset}/distill_ensemble")
    assert student.distill is not None
    assert [expert.name for expert in experts] == student.distill.teachers
    assert [m for expert in experts for m in expert.data.modalities] == student.data.modalities
    assert all(expert.inputs == student.inputs for expert in experts)
    assert student.distill.expert_weights == "equal"  # the experts learned from every training clip


@pytest.mark.parametrize("dataset", ["epic_kitchens", "something_something", "grid_epic"])
def test_the_recipes_of_radevski_et_al_have_their_settings(dataset: str) -> None:
    """Check KL only, on logits; weights from held-out training clips; best epoch; no dropout; mean and linear layer."""
    *experts, student = load_chain(f"{dataset}/radevski")
    assert student.distill is not None
    assert student.distill.teachers == [f"{expert.name}/best" for expert in experts]
    assert (student.distill.alpha, student.distill.average) == (0, "logits")
    assert student.distill.expert_weights == "softmin"
    assert [m for expert in experts for m in expert.data.modalities] == student.data.modalities
    assert student.modalities == ["video"]
    assert student.data.hold_out == 0
    for recipe in (*experts, student):
        assert recipe.model.fusion == "mean"
        assert recipe.data.modality_dropout.probability == 0
        assert recipe.training.validate_every_epochs == 1
        optimizer = recipe.optimizer
        assert (optimizer.schedule, optimizer.warmup_epochs, optimizer.start_lr) == ("linear", 3, 0)
        assert (optimizer.clip, optimizer.weight_decay) == (5.0, 0.02)
    assert all(expert.data.hold_out > 0 for expert in experts)


def test_radevskis_teachers_have_the_published_size() -> None:
    """Compare with 84.65 M, published for three; ours have 84.47 M: three Video Swin-T with a linear layer per head."""
    *experts, _ = load_chain("epic_kitchens/radevski")
    sizes = []
    for expert in experts:
        model = meta_model(expert.model, expert.inputs, expert.data.modalities, {"verb": 97, "noun": 300})
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sum(sizes) == 3 * (27_850_470 + 397 * 769)
    assert sum(sizes) == pytest.approx(84.65e6, rel=0.0025)
