"""Functions of one clip that can be traced answer like the model, for every subset of its modalities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from karmma_dist.deploy.clip_model import ClipEncoder, ClipFusion, check_exportable
from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES, subsets
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.recipe import ModelRecipe
from kits.evaluation import INPUTS

ENCODERS = {
    "video": {"name": "small_video", "options": {"width": 4}},
    "flow": {"name": "small_video", "options": {"width": 8}},
    "audio": {"name": "small_audio", "options": {"width": 4}},
}
SIZES = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}


def build(modalities: list[str], **model: Any) -> KarmmaModel:
    encoders = {name: ENCODERS[name] for name in modalities}
    recipe = ModelRecipe.model_validate({"encoders": encoders, **SIZES, **model})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        built = KarmmaModel(recipe, INPUTS, modalities, {"verb": 3, "noun": 5}).eval()
        for parameter in built.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def arrays_of(model: KarmmaModel) -> dict[str, torch.Tensor]:
    arrays = {}
    for seed, name in enumerate(model.modalities):
        kind = MODALITIES[name].decoder.array(model.inputs.section(name))
        generator = torch.Generator().manual_seed(seed)
        arrays[name] = torch.randint(0, 256, kind.shape, generator=generator).to(getattr(torch, kind.dtype))
    return arrays


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("missing", ["stand_in", "leave_out", "zeros"])
@pytest.mark.parametrize(
    ("modalities", "others"),
    [
        (["video", "flow", "audio"], {"tau": 3}),
        (["flow", "audio"], {"num_layers": 2, "tau": 3, "grouping": "even"}),
        (["audio"], {}),
        (["video"], {"fusion": "mean"}),
    ],
)
@torch.no_grad()
def test_every_subset_is_answered_like_the_model(modalities: list, others: dict, missing: str, average: str) -> None:
    treatment = {"missing": missing} if len(modalities) > 1 else {}
    model = build(modalities, average=average, **treatment, **others)
    check_exportable(model)
    arrays, fusion = arrays_of(model), ClipFusion(model)
    for chosen in subsets(modalities):
        tokens = [
            ClipEncoder(model, name)(arrays[name]) if name in chosen
            else torch.zeros(1, model.num_tokens[name], model.width)
            for name in modalities
        ]  # fmt: skip
        answers = fusion(tokens, [torch.tensor(name in chosen) for name in modalities])
        inputs = {
            name: MODALITIES[name].tensors.make(arrays[name][None], INPUTS.section(name), None) for name in chosen
        }
        expected = model(inputs, torch.tensor([[name in chosen for name in modalities]]))
        for head, answer in zip(model.heads, answers, strict=True):
            torch.testing.assert_close(answer, expected[head][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("fusion", "late"), ("fusion", "bottleneck"), ("missing", "prompts"), ("missing", "token")]
)
def test_a_model_that_computes_something_else_is_refused(field: str, value: str) -> None:
    model = build(["video", "audio"], **({"missing": "leave_out", "num_layers": 2} | {field: value}))
    with pytest.raises(UserError, match=f"^model.{field} is {value}: only "):
        check_exportable(model)
