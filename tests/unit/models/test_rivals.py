"""Tests of KARMMA's rivals: each does what its source says, and none sees anything of an absent modality."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.memory.memory import sets_of
from karmma_dist.models.flops import count_flops, flops_per_clip, meta_clip, meta_model
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.models.rivals import BottleneckFusion, MeanTokens
from karmma_dist.models.running_sums import RunningSums, running_sums
from karmma_dist.recipe import DistillRecipe, ModelRecipe
from karmma_dist.settings import dump, validate
from karmma_dist.training.teacher import Teacher
from kits.models import HEADS, INPUTS, KINDS, MODALITIES, RIVALS, SUBSETS, build, clips, gradients, only

pytestmark = pytest.mark.usefixtures("one_thread")

PRESENT = torch.tensor(SUBSETS)


def alone(x: Tensor) -> Tensor:
    """Sum over the only rank."""
    return x


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[Any]]:
    """Record the arguments of a module's calls."""
    calls: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _module, arguments: calls.append(arguments))
    yield calls
    hook.remove()


def fused_tokens(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the fusion block gets from clips with every subset, and what encoders and Linear gave."""
    model = build(kind).eval()
    with torch.no_grad(), recorded(model.fusion_block) as calls:
        encoded = model.encode(only(clips(len(SUBSETS)), PRESENT), PRESENT)
        model.fuse(encoded, PRESENT)
    ((tokens_BTD, attend_BT, _prompts),) = calls
    assert attend_BT is None
    return dict(zip(MODALITIES, tokens_BTD.split(list(model.num_tokens.values()), dim=1), strict=True)), encoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_the_content_of_a_dropped_modality_reaches_no_logit(kind: str, grad: bool) -> None:
    model = build(kind).eval()
    everything = torch.ones_like(PRESENT)
    with torch.set_grad_enabled(grad):
        tokens = model.encode(clips(len(SUBSETS)), everything)
        spoiled = {
            name: torch.where(PRESENT[:, m, None, None], x, torch.nan)
            for m, (name, x) in enumerate(tokens.items())
        }
        clean, dirty = (model.fuse(x, everything, PRESENT) for x in (tokens, spoiled))
    assert all(torch.equal(clean[head], dirty[head]) for head in HEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_card_give_the_same_model_again(kind: str, tmp_path: Path) -> None:
    model = build(kind).eval()
    save_model(model, tmp_path)
    loaded, card = load_model(tmp_path)
    assert card.model == model.recipe
    inputs = only(clips(len(SUBSETS)), PRESENT)
    with torch.no_grad():
        expected, logits = model(inputs, PRESENT), loaded.eval()(inputs, PRESENT)
    assert all(torch.equal(expected[head], logits[head]) for head in HEADS)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_a_clip_are_those_of_the_parts_that_run(kind: str) -> None:
    model = build(kind)
    whole = meta_model(model.recipe, INPUTS, MODALITIES, HEADS).eval()
    flops = flops_per_clip(model)
    for subset in SUBSETS[2::6]:
        present_BM = torch.tensor([subset])
        there = tuple(m for m, is_there in zip(MODALITIES, subset, strict=True) if is_there)
        counted = count_flops(whole, meta_clip(INPUTS, there), present_BM)[1]
        per_batch = sum(flops.projections.values()) if kind == "mean" else 0  # of the mean tokens
        assert flops.forward(dict.fromkeys(there, 1), 1) == counted - per_batch


@pytest.mark.parametrize("kind", RIVALS)
def test_a_rival_runs_in_bfloat16_and_learns_finite_numbers(kind: str) -> None:
    model = build(kind).to(torch.bfloat16).train()
    present = torch.tensor([[True, False, False, True], [False, True, False, False]])
    whole = {m: x.to(torch.bfloat16) for m, x in only(clips(2), present).items()}
    logits = model(whole, present)
    assert all(x.dtype == torch.bfloat16 and bool(x.isfinite().all()) for x in logits.values())
    for name, gradient in gradients(model, logits).items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all()), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_model_runs_the_same_modules_whatever_is_present(kind: str) -> None:
    """Check it without gradients: a sharded teacher's ranks gather the parameters of every module that they run."""
    model = build(kind).eval()
    model.runs_every_encoder = True
    ran: list[str] = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    orders = set()
    with torch.no_grad():
        for subset in SUBSETS:
            ran.clear()
            model(only(clips(1), torch.tensor([subset])), torch.tensor([subset]))
            orders.add(tuple(ran))
    assert len(orders) == 1


@pytest.mark.parametrize("kind", RIVALS)
def test_a_rival_answers_as_a_teacher_what_it_says_of_each_subset(kind: str) -> None:
    model = build(kind).eval()
    losses = {head: [0.0] for head in HEADS}
    teacher = Teacher([model], MODALITIES, losses, DistillRecipe(teacher="t")).eval()
    everything, whole = torch.ones(2, 4, dtype=torch.bool), clips(2)
    with torch.no_grad():
        answers_BSA = teacher(whole, everything, answers_for="all")[:, :, 0]
        tokens = model.encode(whole, everything)
        for s, subset_M in enumerate(sets_of(4)[1:]):
            logits = model.fuse(tokens, everything, subset_M.expand(2, -1))
            torch.testing.assert_close(answers_BSA[:, s], torch.cat([logits["verb"], logits["noun"]], dim=1))


def test_zeros_take_the_place_of_missing_tokens() -> None:
    tokens, encoded = fused_tokens("zeros")
    for m, name in enumerate(MODALITIES):
        assert not tokens[name][~PRESENT[:, m]].any()
        assert torch.equal(tokens[name][PRESENT[:, m]], encoded[name])


def test_one_token_is_repeated_and_nothing_is_added_to_present_ones() -> None:
    tokens, encoded = fused_tokens("token")
    learned = build("token").state_dict()
    for m, name in enumerate(MODALITIES):
        missing = tokens[name][~PRESENT[:, m]]
        assert torch.equal(missing, learned[f"fillers.{name}.token"].expand_as(missing))
        assert torch.equal(tokens[name][PRESENT[:, m]], encoded[name])


def test_the_mean_of_the_training_clips_takes_the_place_of_missing_ones() -> None:
    """Train on nine clips in two passes, then compare with the mean of the encoder's tokens of those that have it."""
    model = build("mean", frozen=MODALITIES).train()
    for part in running_sums(model):
        part.sums.zero_()
    present, whole = PRESENT[:9], clips(9)
    for rows in (slice(0, 4), slice(4, 9)):
        model(only({m: x[rows] for m, x in whole.items()}, present[rows]), present[rows])
    assert not any(part.sums.any() for part in running_sums(model))  # a step does not see itself
    for part in running_sums(model):
        part.commit(alone, keep=True)
    for m, name in enumerate(MODALITIES):
        filler, linear = model.fillers[name], model.projections[name]
        assert isinstance(filler, MeanTokens)
        expected = linear(model._reduce(name, whole[name][present[:, m]]).mean(dim=0, keepdim=True))
        torch.testing.assert_close(filler.replacement(linear, torch.float32), expected, atol=1e-5, rtol=1e-5)
    model.eval()
    model(whole, torch.ones_like(present))
    assert all(part._added is None for part in running_sums(model))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 3), st.booleans())
def test_sums_do_not_depend_on_how_clips_are_divided(sizes: list[int], num_ranks: int, skipped: bool) -> None:
    clips_NK = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ranks = [RunningSums(3, decay=0.5) for _ in range(num_ranks)]
    for place, part_NK in enumerate(clips_NK.split(sizes)):
        ranks[place % num_ranks].add(part_NK.sum(dim=0))
    total = sum(torch.zeros(3, dtype=torch.float64) if rank._added is None else rank._added for rank in ranks)
    for rank in ranks:
        rank.sums.fill_(4)
        rank.commit(lambda _own: total, keep=not skipped)
        expected = torch.full((3,), 4.0).double() if skipped else 2 + clips_NK.sum(dim=0)
        torch.testing.assert_close(rank.sums, expected)
        rank.commit(torch.zeros_like, keep=True)  # nothing is left over
        torch.testing.assert_close(rank.sums, expected / 2)


def test_sums_keep_their_precision_in_a_model_of_another_type() -> None:
    model = build("mean")
    before = [part.sums.clone() for part in running_sums(model)]
    model.to(torch.bfloat16).float()
    after = [part.sums for part in running_sums(model)]
    assert len(after) == len(MODALITIES)
    assert all(torch.equal(a, b) and b.dtype == torch.float64 for a, b in zip(before, after, strict=True))


def test_each_set_of_modalities_has_prompts_of_its_own() -> None:
    model = build("prompts").eval()
    assert model.prompts is not None
    num_layers, num_prompts = 1, 3  # half of two layers
    assert model.prompts.prompt_tokens.shape == (15, num_layers, num_prompts, 16)
    inputs = only(clips(len(SUBSETS)), PRESENT)
    with torch.no_grad():
        before = model(inputs, PRESENT)
        model.prompts.prompt_tokens[int(PRESENT[3].long() @ torch.tensor([1, 2, 4, 8])) - 1] += 1
        after = model(inputs, PRESENT)
    for head in HEADS:
        changed_B = (before[head] != after[head]).any(dim=1)
        assert changed_B.nonzero().flatten().tolist() == [3]


def test_prompts_precede_the_input_of_the_first_layers_and_stay() -> None:
    model = build("prompts", num_layers=3, prompt_layers=2).eval()
    lengths = []
    for layer in model.fusion_block.layers:
        layer.register_forward_pre_hook(lambda _module, arguments: lengths.append(arguments[0].shape[1]))
    with torch.no_grad():
        model(clips(2), torch.ones(2, 4, dtype=torch.bool))
    num = 1 + sum(model.num_tokens.values())
    assert lengths == [num + 3, num + 6, num + 6]


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_late_fusion_averages_what_each_modality_says_alone(average: str) -> None:
    model = build("late", average=average).double().eval()
    whole = {m: x.double() for m, x in clips(len(SUBSETS)).items()}
    everything = torch.ones_like(PRESENT)
    with torch.no_grad():
        tokens = model.encode(whole, everything)
        logits = model.fuse(tokens, everything, PRESENT)
        experts = [model.fuse(tokens, everything, torch.arange(4).expand(15, 4) == m) for m in range(4)]
        for m, name in enumerate(MODALITIES):
            linear = model.projections[name]
            assert isinstance(linear, nn.Linear)
            mean_ND = model._reduce(name, whole[name]).mean(dim=1)
            own = mean_ND @ linear.weight.T + linear.bias
            expected = own[:, :5] if average == "logits" else own[:, :5].log_softmax(dim=1)
            torch.testing.assert_close(experts[m]["verb"], expected)
    for head in HEADS:
        said_BMC = torch.stack([expert[head] for expert in experts], dim=1)
        said_BMC = said_BMC if average == "logits" else said_BMC.exp()
        mean_BC = (said_BMC * PRESENT[:, :, None]).sum(dim=1) / PRESENT.sum(dim=1, keepdim=True)
        torch.testing.assert_close(logits[head], mean_BC if average == "logits" else mean_BC.log())


def test_an_expert_of_late_fusion_learns_from_its_modality_alone() -> None:
    model = build("late").train()
    present = torch.tensor([[True, False, False, False], [False, False, True, False]])
    found = gradients(model, model(only(clips(2), present), present))
    for name, gradient in found.items():
        assert gradient is not None
        learns = name.split(".")[1] in ("video", "audio")
        assert learns or not gradient.any(), name


def influence(num_layers: int, first: int) -> Tensor:
    """Return bool (3, 3): True if an output (row) depends on the tokens of a modality (column)."""
    torch.manual_seed(0)
    fusion = BottleneckFusion(3, 8, 2, num_layers, 8, 0.0, num_tokens=2, first=first)
    parts = [torch.randn(1, 4, 8, requires_grad=True) for _ in range(3)]
    outputs_KD = fusion(parts, [0, 1, 2], torch.tensor([[True, True, False]]))[0]
    read_K = outputs_KD @ torch.randn(8)  # the sum alone is always that of the last norm's biases
    rows = [torch.autograd.grad(read_K[k], parts, retain_graph=True, allow_unused=True) for k in range(3)]
    return torch.tensor([[x is not None and bool(x.any()) for x in row] for row in rows])


def test_modalities_meet_in_the_bottleneck_only_and_absent_ones_are_not_read() -> None:
    apart = torch.eye(3, dtype=torch.bool)
    assert torch.equal(influence(num_layers=2, first=1), apart)  # they write, but no layer follows that could read
    assert torch.equal(influence(num_layers=2, first=2), apart)
    met = torch.tensor([[True, True, False], [True, True, False], [True, True, True]])
    assert torch.equal(influence(num_layers=2, first=0), met)
    assert torch.equal(influence(num_layers=3, first=1), met)


def test_cards_of_other_models_do_not_name_the_rivals_options() -> None:
    options = {"bottleneck_tokens": 6, "bottleneck_from": 1, "prompt_length": 3, "prompt_layers": 2}
    assert not options.keys() & set(dump(ModelRecipe()).replace(":", "").split())
    for field, names in ((("fusion", "bottleneck"), list(options)[:2]), (("missing", "prompts"), list(options)[2:])):
        tree = {"num_layers": 4, "missing": "leave_out", field[0]: field[1], **{name: options[name] for name in names}}
        recipe = ModelRecipe.model_validate(tree)
        assert {name: recipe.model_dump()[name] for name in names} == {name: options[name] for name in names}
        assert ModelRecipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"missing": "zero"}, r"'missing': Input should be .*'zeros'.* \(given: 'zero'\)"),
        ({"fusion": "late"}, "set missing: leave_out, not stand_in"),
        ({"fusion": "mean", "missing": "token"}, "fusion mean is for one modality.*remove missing: token"),
        ({"fusion": "bottleneck", "missing": "prompts", "num_layers": 2}, "missing prompts is for fusion transformer"),
        ({"fusion": "bottleneck", "bottleneck_from": 1, "num_layers": 2}, "set num_layers to 3 or more"),
        ({"bottleneck_tokens": 4}, "bottleneck_tokens is an option of fusion bottleneck, not of transformer"),
        ({"missing": "token", "prompt_length": 3}, "prompt_length is an option of missing prompts, not of token"),
        ({"missing": "prompts", "prompt_layers": 2}, "prompt_layers 2 exceeds num_layers 1"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_a_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        validate(fields, ModelRecipe, "r.yaml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["late", "bottleneck"])
def test_a_model_without_a_fusion_block_says_so(kind: str) -> None:
    with pytest.raises(UserError, match=f"model.fusion {RIVALS[kind]['fusion']} has no fusion block"):
        _ = build(kind).fusion_block


def test_every_pair_of_fusion_and_missing_is_a_model_or_refused() -> None:
    accepted = set()
    fields = {name: ModelRecipe.model_fields[name].annotation.__args__ for name in ("fusion", "missing")}  # type: ignore[union-attr]
    for fusion, missing in itertools.product(fields["fusion"], fields["missing"]):
        try:
            model = build(missing, MODALITIES[:1] if fusion == "mean" else MODALITIES, fusion=fusion, missing=missing)
        except ValueError:
            continue
        accepted.add((fusion, missing))
        there = torch.ones(2, len(model.modalities), dtype=torch.bool)
        assert model(clips(2, model.modalities), there)["verb"].shape == (2, HEADS["verb"])
    replacing = {"leave_out", "stand_in", "zeros", "mean", "token"}
    assert accepted == {
        *(("transformer", missing) for missing in (*replacing, "prompts")),
        *(("bottleneck", missing) for missing in replacing),
        ("mean", "leave_out"), ("mean", "stand_in"), ("late", "leave_out"),
    }  # fmt: skip
