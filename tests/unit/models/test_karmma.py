"""Tests of the model: clips are independent, absence is exact, and all ranks get gradients in the same order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import EncoderRecipe, ModelRecipe
from kits.models import HEADS, INPUTS, KINDS, MISSING, MODALITIES, SUBSETS, assert_same, build, clips, gradients, only

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_clips_logits_do_not_depend_on_its_batch_mates(kind: str, training: bool) -> None:
    model = build(kind).train(training)
    present = torch.tensor(SUBSETS)
    whole = clips(len(SUBSETS))
    together = model(only(whole, present), present)
    for row in range(len(SUBSETS)):
        alone = {m: x[row : row + 1] for m, x in whole.items()}
        mask = present[row : row + 1]
        with torch.set_grad_enabled(training):
            assert_same(model(only(alone, mask), mask), {head: x[row : row + 1] for head, x in together.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_clips_only_orders_the_logits(kind: str) -> None:
    model = build(kind).eval()
    present, whole = torch.tensor(SUBSETS), clips(len(SUBSETS))
    order = torch.randperm(len(SUBSETS))
    logits = model(only(whole, present), present)
    shuffled = model(only({m: x[order] for m, x in whole.items()}, present[order]), present[order])
    assert_same({head: x[order] for head, x in logits.items()}, shuffled)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_keeping_a_subset_is_as_if_the_rest_were_absent(kind: str, grad: bool) -> None:
    model = build(kind).eval()
    keep, whole = torch.tensor(SUBSETS), clips(len(SUBSETS))
    present = torch.ones_like(keep)
    with torch.set_grad_enabled(grad):
        kept = model.fuse(model.encode(whole, present), present, keep)
        assert_same(kept, model(only(whole, keep), keep))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", [(True, False, False, False), (False, False, True, True), (True, True, True, True)])
def test_every_parameter_gets_a_finite_gradient_whatever_is_present(kind: str, subset: tuple[bool, ...]) -> None:
    model = build(kind).train()
    present = torch.tensor([subset] * 3)
    whole = clips(3)
    logits = model(only(whole, present), present)
    for name, gradient in gradients(model, logits).items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name
        modality = name.split(".")[1]
        absent = modality in MODALITIES and not subset[MODALITIES.index(modality)]
        of_clips = ("encoders",) if kind == "mean" else ("encoders", "projections")  # a mean is projected, too
        if name.startswith(of_clips) and absent:
            assert not gradient.any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_arrive_in_one_order_whatever_is_present(kind: str) -> None:
    model = build(kind, frozen=("flow",)).train()
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    orders = set()
    for rows in [[subset] for subset in SUBSETS] + [SUBSETS]:
        present = torch.tensor(rows)
        arrived.clear()
        gradients(model, model(only(clips(len(rows)), present), present))
        orders.add(tuple(arrived))
    assert len(orders) == 1
    assert len(orders.pop()) == sum(p.requires_grad for p in model.parameters())


def test_running_an_encoder_without_clips_changes_no_logit() -> None:
    present = torch.tensor([[True, False, False, False]] * 2)
    whole = only(clips(2), present)
    for kind in KINDS:
        model = build(kind)
        trained = model.train()(whole, present)
        with torch.no_grad():
            assert_same(trained, model(whole, present))
            assert_same(trained, model.eval()(whole, present))


def test_encoders_of_absent_modalities_do_not_run_without_gradients() -> None:
    model = build().eval()
    ran: list[str] = []
    for modality, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, modality=modality: ran.append(modality))
    present = torch.tensor([[True, False, False, True]])
    with torch.no_grad():
        tokens = model.encode(only(clips(1), present), present)
    assert ran == list(tokens) == ["video", "detections"]


@pytest.mark.parametrize("subset", [(True, True, True, True), (True, False, True, True)])
def test_frozen_encoders_stay_in_eval_mode_and_get_no_gradient(subset: tuple[bool, ...]) -> None:
    model = build(frozen=("flow", "detections")).train()
    present = torch.tensor([subset])
    before = {name: p.clone() for name, p in model.encoders.named_parameters()}
    gradients(model, model(only(clips(1), present), present))
    for modality in MODALITIES:
        frozen = modality in ("flow", "detections")
        assert all(m.training is not frozen for m in model.encoders[modality].modules())
        assert all((p.grad is None) is frozen for p in model.encoders[modality].parameters())
        assert all(p.grad is not None for p in model.projections[modality].parameters())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    for name, parameter in model.encoders.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert not changed or not name.startswith(("flow", "detections"))


def test_an_absent_modalitys_stand_in_is_what_learns() -> None:
    model = build("stand_in").train()
    present = torch.tensor([[True, False, True, True]])
    found = gradients(model, model(only(clips(1), present), present))
    for name, gradient in found.items():
        if name.startswith("stand_ins.flow"):
            assert gradient is not None
            assert bool(gradient.any())


def test_attention_dropout_acts_in_training_only() -> None:
    model = build(attention_dropout=0.5)
    present, whole = torch.ones(2, 4, dtype=torch.bool), clips(2)
    model.train()
    assert not torch.equal(model(whole, present)["verb"], model(whole, present)["verb"])
    model.eval()
    assert torch.equal(model(whole, present)["verb"], model(whole, present)["verb"])


def test_a_seed_decides_all_weights() -> None:
    first, second = build("stand_in").state_dict(), build("stand_in").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(tensor.isfinite().all()) for tensor in first.values())


def test_the_model_runs_in_bfloat16_with_a_modality_absent() -> None:
    model = build("stand_in").to(torch.bfloat16).train()
    present = torch.tensor([[True, False, False, True]])
    whole = {m: x.to(torch.bfloat16) for m, x in only(clips(1), present).items()}
    logits = model(whole, present)
    assert all(x.dtype == torch.bfloat16 and bool(x.isfinite().all()) for x in logits.values())
    assert all(gradient is not None for gradient in gradients(model, logits).values())


def test_a_unimodal_model_has_nothing_to_stand_in_for() -> None:
    for missing in MISSING:
        model = build(missing, ("audio",))
        logits = model(clips(2, ("audio",)), torch.ones(2, 1, dtype=torch.bool))
        assert {head: tuple(x.shape) for head, x in logits.items()} == {"verb": (2, 5), "noun": (2, 3)}
        assert not len(model.stand_ins)


def test_tau_limits_the_tokens_of_each_modality() -> None:
    model = build(tau=5)
    tokens = model.encode(clips(2), torch.ones(2, 4, dtype=torch.bool))
    assert {m: x.shape[1] for m, x in tokens.items()} == model.num_tokens
    assert model.num_tokens == {"video": 5, "flow": 5, "audio": 3, "detections": 4}


@pytest.mark.parametrize(
    ("present", "keep", "message"),
    [
        ([[1, 1, 1, 1], [0, 0, 0, 0]], None, "clip 1 of the batch keeps no modality"),
        ([[1, 1, 1, 1], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 0, 0, 0]], "clip 1 of the batch keeps no modality"),
        ([[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 0, 0, 1], [1, 0, 0, 0]], "clip 0 of the batch keeps a modality that"),
    ],
)
def test_a_clip_that_cannot_be_predicted_is_named(present: Any, keep: Any, message: str) -> None:
    model = build().eval()
    present_BM = torch.tensor(present) > 0
    tokens = model.encode(only(clips(2), present_BM), present_BM)
    with pytest.raises(ValueError, match=message):
        model.fuse(tokens, present_BM, None if keep is None else torch.tensor(keep) > 0)


def test_inputs_that_contradict_present_are_refused() -> None:
    model = build().eval()
    present = torch.tensor([[True, False, False, False]] * 2)
    with pytest.raises(ValueError, match=r"inputs\['video'\] holds 3 clips, but present_BM says 2"):
        model.encode({"video": clips(3)["video"]}, present)
    with pytest.raises(ValueError, match=r"inputs\['video'\] holds 0 clips, but present_BM says 2"):
        model.encode({}, present)
    with pytest.raises(ValueError, match=r"expected torch.bool \(B, 4\)"):
        model.encode({}, present.float())
    with pytest.raises(ValueError, match=r"tokens\['video'\] are \(0, 5, 16\), expected \(2, 5, 16\)"):
        model.fuse({}, present)


@pytest.mark.parametrize(
    ("modality", "shape", "expected"),
    [
        ("video", (2, 3, 5, 16, 16), r"\(N, 3, 7, 16, 16\), which is float \(N, 3, frames, height, width\)"),
        ("flow", (2, 2, 7, 16, 16), r"\(N, 3, 7, 16, 16\), which is float \(N, 3, frames, height, width\): u, v, 0"),
        ("video", (2, 7, 16, 16, 3), r"\(N, 3, 7, 16, 16\)"),
        ("audio", (2, 2, 16), r"\(N, 2, 16, 41\), which is float \(N, windows, mels, time\)"),
        ("detections", (2, 3, 2, 5), r"\(N, 3, 2, 6\), which is float \(N, frames, boxes, 6\): x0 y0"),
    ],
)
def test_an_input_of_another_shape_is_refused(
    modality: str, shape: tuple[int, ...], expected: str
) -> None:
    model = build().eval()
    present = torch.tensor([[m == modality for m in MODALITIES]] * 2)
    given = re.escape(f"inputs['{modality}'] is {shape}, expected ")
    with pytest.raises(ValueError, match=given + expected):
        model.encode({modality: torch.zeros(shape)}, present)
    empty = torch.zeros(0, *shape[1:])
    with pytest.raises(ValueError, match="expected " + expected):
        model.encode({modality: empty}, torch.zeros(2, 4, dtype=torch.bool))


def test_a_modality_that_the_model_lacks_is_refused_by_name() -> None:
    model = build(modalities=("video", "audio")).eval()
    present = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"inputs\['flow'\]: the model has no such modality; it has video, audio"):
        model.encode(clips(2, ("video", "flow", "audio")), present)


def test_inputs_of_another_dtype_are_refused_without_autocast() -> None:
    model = build(modalities=("audio",)).eval()
    present, whole = torch.ones(2, 1, dtype=torch.bool), clips(2, ("audio",))
    for dtype in (torch.int16, torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"inputs\['audio'\] is {dtype}, expected torch.float32, the parameters'"):
            model.encode({"audio": whole["audio"].to(dtype)}, present)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.encode({"audio": whole["audio"].to(torch.bfloat16)}, present)
        with pytest.raises(ValueError, match="int16"):
            model.encode({"audio": whole["audio"].to(torch.int16)}, present)


def test_checking_inputs_reads_no_value() -> None:
    """Use meta tensors, which have no values: a check that waited for the device would fail on them."""
    with torch.device("meta"):
        model = build(modalities=("video", "audio")).eval()
        inputs = {m: torch.empty(2, *input_shape(m, INPUTS)) for m in model.modalities}
    tokens = model.encode(inputs, torch.ones(2, 2, dtype=torch.bool))
    assert {m: tuple(x.shape) for m, x in tokens.items()} == {m: (2, n, 16) for m, n in model.num_tokens.items()}


def test_a_modality_without_an_encoder_is_named() -> None:
    with pytest.raises(UserError, match="no encoder for modality 'flow'"):
        KarmmaModel(ModelRecipe(encoders={"video": EncoderRecipe(name="small_video")}), INPUTS, MODALITIES, HEADS)


@pytest.mark.parametrize("missing", MISSING)
def test_averaged_probabilities_are_the_mean_over_counted_tokens(missing: str) -> None:
    model = build(missing, average="probabilities").double().eval()
    present = torch.tensor(SUBSETS)
    inputs = {m: x.double() for m, x in only(clips(len(SUBSETS)), present).items()}
    seen: list[Tensor] = []
    gelu, pad = torch.nn.functional.gelu, torch.nn.functional.pad
    hook = model.shared.register_forward_hook(lambda _module, _inputs, hidden: seen.append(gelu(hidden)))
    logits = model(inputs, present)
    hook.remove()
    counts = pad(present if missing == "leave_out" else torch.ones_like(present), (1, 0), value=True)
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    for head, classifier in model.classifiers.items():
        tokens = classifier(seen[0]).softmax(dim=-1)  # (B, M + 1, C)
        expected = (tokens * weights[:, :, None]).sum(dim=1)
        torch.testing.assert_close(logits[head].exp(), expected, atol=1e-12, rtol=1e-12)


def test_averaged_probabilities_give_finite_gradients_for_uncounted_tokens() -> None:
    model = build(average="probabilities").train()
    present = torch.tensor([[True, False, False, False], [False, True, True, False]])
    found = gradients(model, model(only(clips(2), present), present))
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found.values())


def test_a_pooled_model_is_a_linear_layer_on_mean_tokens() -> None:
    """Check the model of Radevski et al.: all tokens have equal weight for any tau, and nothing else is trained."""
    model = build(modalities=("video",), fusion="mean", tau=2).double().eval()
    encoder = model.encoders["video"]
    video = clips(3, ("video",))["video"].double()
    there = torch.ones(3, 1, dtype=torch.bool)
    tokens_BTD = encoder(video)
    logits = model({"video": video}, there)
    for head, num in HEADS.items():
        layer = model.classifiers[head]
        assert isinstance(layer, torch.nn.Linear)
        expected = tokens_BTD.mean(dim=1) @ layer.weight.T + layer.bias
        assert logits[head].shape == (3, num)
        torch.testing.assert_close(logits[head], expected, atol=1e-12, rtol=1e-12)
    of_encoder = {f"encoders.video.{name}" for name, _ in encoder.named_parameters()}
    of_heads = {f"classifiers.{head}.{name}" for head in HEADS for name in ("weight", "bias")}
    assert {name for name, _ in model.named_parameters()} == of_encoder | of_heads


def test_a_pooled_model_takes_one_modality() -> None:
    with pytest.raises(UserError, match=r"model\.fusion mean is for one modality, not for video, flow"):
        build(modalities=("video", "flow"), fusion="mean")
