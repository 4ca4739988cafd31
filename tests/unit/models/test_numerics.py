"""Tests of the model's arithmetic with the real encoders: precision, gradients, and exact absence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from karmma_dist.models.karmma import FusionBlock, KarmmaModel, tau_average
from karmma_dist.recipe import EncoderRecipe, ModelRecipe
from kits.real_encoders import INPUTS, MISSING, MODALITIES, SUBSETS, build, clips, joined, only

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("missing", MISSING)
def test_a_clips_logits_ignore_other_clips_for_any_subset(missing: str) -> None:
    model = build(missing).eval()
    present, whole = torch.tensor(SUBSETS), clips(len(SUBSETS))
    with torch.no_grad():
        together = joined(model(only(whole, present), present))
        for row, subset in enumerate(SUBSETS):
            mine = {m: x[row : row + 1] for m, x in whole.items()}
            mask = torch.tensor([subset])
            alone = joined(model(only(mine, mask), mask))
            torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-5)
        others = {m: x.clone() for m, x in clips(len(SUBSETS), seed=2).items()}
        for m in MODALITIES:
            others[m][4] = whole[m][4]
        among_others = joined(model(only(others, present), present))
    torch.testing.assert_close(among_others[4], together[4], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(among_others[5], together[5], atol=1e-3)


@pytest.mark.parametrize("missing", MISSING)
def test_a_batch_of_all_subsets_gives_every_parameter_a_gradient(missing: str) -> None:
    model = build(missing).train()
    present = torch.tensor(SUBSETS)
    joined(model(only(clips(len(SUBSETS)), present), present)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("absent", MODALITIES)
def test_no_gradient_is_nan_if_no_clip_has_a_modality(missing: str, absent: str) -> None:
    model = build(missing).train()
    present = torch.tensor([[m != absent for m in MODALITIES]] * 2)
    joined(model(only(clips(2), present), present)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        if name.startswith((f"encoders.{absent}.", f"projections.{absent}.")):
            assert not parameter.grad.any(), name
        else:
            assert bool(parameter.grad.any()), name


def rounded(output: Any) -> Any:
    """Round to the nearest bfloat16 numbers, keeping the dtype."""
    if isinstance(output, dict):
        return {key: rounded(value) for key, value in output.items()}
    if not isinstance(output, Tensor):
        return output  # how tokens are arranged, and no number of theirs
    return output.bfloat16().to(output.dtype)


def as_ideal_bfloat16(model: KarmmaModel) -> KarmmaModel:
    """A float64 model whose weights, and whatever its modules hand on, are rounded to bfloat16.

    That is what bfloat16 costs at the least: kernels sum in a wider type and round what they hand on.
    """
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter))
    for module in model.modules():
        module.register_forward_hook(lambda _module, _inputs, output: rounded(output))
    return model


def root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def sharp(missing: str, seed: int) -> KarmmaModel:
    """Attention that starts almost even would hide how exactly it is computed."""
    model = build(missing, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("qkv.weight"):
                parameter *= 2
    return model


LONGEST_SUM = 1024
"""Terms: a patch of 4 windows x 16 x 16."""


@pytest.mark.parametrize("missing", MISSING)
def test_errors_of_bfloat16_and_float32_logits_are_those_of_rounding(missing: str) -> None:
    """bfloat16: at most twice the error of a model that rounds only weights and what modules hand on.

    float32 has 16 bits more, but adds up in float32 too: each of the n terms of a sum is rounded, not only the sum, and
    independent errors grow with the square root of n.
    """
    present = torch.tensor(SUBSETS)

    def errors(seed: int) -> Iterator[Tensor]:
        inputs = {m: x.bfloat16() for m, x in only(clips(len(SUBSETS), seed), present).items()}

        def logits(model: KarmmaModel, dtype: torch.dtype) -> Tensor:
            with torch.no_grad():
                return joined(model.to(dtype).eval()({m: x.to(dtype) for m, x in inputs.items()}, present))

        exact = logits(sharp(missing, seed), torch.float64)
        yield exact
        yield logits(as_ideal_bfloat16(sharp(missing, seed)), torch.float64) - exact
        yield logits(sharp(missing, seed), torch.bfloat16) - exact
        yield logits(sharp(missing, seed), torch.float32) - exact

    runs = zip(*map(errors, range(3)), strict=True)
    exact, ideal, bf16, fp32 = (root_mean_square(torch.stack(all_seeds)) for all_seeds in runs)
    assert ideal < 0.02 * exact, "rounding is small here, so a bound in terms of it means something"
    assert ideal / 2 < bf16 < 2 * ideal
    assert fp32 < 2**-16 * LONGEST_SUM**0.5 * ideal


SMALL = {"width": 4, "num_heads": 2, "feedforward": 3, "fc_width": 3, "tau": 2, "num_layers": 1}
SMALL_ENCODERS = {m: EncoderRecipe(name="small_video", options={"width": 4}) for m in ("video", "flow")}
MIXED = torch.tensor([[True, True], [True, False], [False, True]])


@pytest.mark.parametrize("missing", MISSING)
def test_gradients_of_fusion_and_heads_match_finite_differences(missing: str) -> None:
    """Check it in float64, for the tokens and all later parameters, in a batch that mixes all subsets."""
    torch.manual_seed(0)
    recipe = ModelRecipe(encoders=SMALL_ENCODERS, missing=missing, **SMALL)  # type: ignore[arg-type]
    model = KarmmaModel(recipe, INPUTS, ("video", "flow"), {"verb": 2, "noun": 2}).double()
    behind = {
        name: torch.randn_like(parameter).requires_grad_()
        for name, parameter in model.named_parameters()
        if not name.startswith(("encoders.", "projections."))
    }
    assert any(name.startswith("stand_ins.") for name in behind) is (missing == "stand_in")
    tokens = [torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def predict(video: Tensor, flow: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = {"video": video, "flow": flow}
        fuse = _Fuse(model)
        state = {f"model.{name}": value for name, value in zip(behind, parameters, strict=True)}
        logits: dict[str, Tensor] = functional_call(fuse, state, (given, MIXED))
        return tuple(logits.values())

    inputs = (*tokens, *behind.values())
    total = torch.cat(predict(*inputs)).square().sum()
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(total, inputs)), "each has one to check"
    assert torch.autograd.gradcheck(predict, inputs)


class _Fuse(nn.Module):
    """`KarmmaModel.fuse` as a forward pass."""

    def __init__(self, model: KarmmaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        return self.model.fuse(tokens, present_BM)


@pytest.mark.parametrize("missing", MISSING)
def test_gradients_through_tau_average_match_finite_differences(missing: str) -> None:
    torch.manual_seed(0)
    recipe = ModelRecipe(encoders=SMALL_ENCODERS, missing=missing, **SMALL)  # type: ignore[arg-type]
    model = KarmmaModel(recipe, INPUTS, ("video", "flow"), {"verb": 2}).double()
    encoded = {m: torch.randn(2, 5, model.encoders[m].width, dtype=torch.float64) for m in model.modalities}

    def predict(video: Tensor, flow: Tensor) -> Tensor:
        given = {"video": video, "flow": flow}
        tokens = {m: model.projections[m](tau_average(x, recipe.tau)) for m, x in given.items()}
        return model.fuse(tokens, MIXED)["verb"]

    assert torch.autograd.gradcheck(predict, tuple(x.requires_grad_() for x in encoded.values()))


NOISE = {"large": 1e4, "infinite": float("inf"), "not a number": float("nan")}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("noise", list(NOISE))
@pytest.mark.parametrize("grad", [False, True])
def test_tokens_of_a_dropped_modality_have_no_influence(missing: str, noise: str, grad: bool) -> None:
    """Check it bit for bit, for any values of the tokens."""
    model = build(missing).eval()
    keep = torch.tensor(SUBSETS)
    present = torch.ones_like(keep)
    tokens = {m: torch.randn(len(keep), num, 32) for m, num in model.num_tokens.items()}
    noisy = {m: x.clone() for m, x in tokens.items()}
    for i, m in enumerate(MODALITIES):
        noisy[m][~keep[:, i]] = NOISE[noise]
    with torch.set_grad_enabled(grad):
        assert torch.equal(joined(model.fuse(noisy, present, keep)), joined(model.fuse(tokens, present, keep)))


@pytest.mark.parametrize("missing", MISSING)
def test_dropped_tokens_get_a_gradient_of_exactly_zero(missing: str) -> None:
    model = build(missing).train()
    keep = torch.tensor(SUBSETS)
    tokens = {m: torch.randn(len(keep), num, 32, requires_grad=True) for m, num in model.num_tokens.items()}
    joined(model.fuse(tokens, torch.ones_like(keep), keep)).square().sum().backward()
    for i, m in enumerate(MODALITIES):
        gradient = tokens[m].grad
        assert gradient is not None
        assert not gradient[~keep[:, i]].any()
        assert bool(gradient[keep[:, i]].flatten(1).any(dim=1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_unattended_tokens_change_no_other_and_no_output_is_nan(dtype: torch.dtype, training: bool) -> None:
    """Check it also for a clip where only [CLS] is attended to."""
    torch.manual_seed(0)
    block = FusionBlock(16, 4, 2, 16).to(dtype).train(training)
    attend = torch.rand(6, 9) < 0.5
    attend[0], attend[1] = False, True
    tokens = torch.randn(6, 9, 16, dtype=dtype)
    other = torch.where(attend[..., None], tokens, 100 * torch.randn_like(tokens))
    first, second = block(tokens, attend), block(other, attend)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())
    heard = nn.functional.pad(attend, (1, 0), value=True)
    assert torch.equal(first[heard], second[heard])
    assert not torch.equal(first[~heard], second[~heard])
