"""Tests of Video Swin: our blocks against torchvision's, recomputed against kept activations, and compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video.swin_transformer import SwinTransformer3d

from karmma_dist.errors import UserError
from karmma_dist.models.encoders import window_attention
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.swin3d import SwinOptions, VideoSwin
from karmma_dist.models.encoders.table import ENCODERS, build_encoder, input_shape
from karmma_dist.recipe import EncoderRecipe, InputRecipe

TWO_STAGES = {"width": 12, "depths": [2, 2], "heads": [2, 4], "drop_path": 0.3}
FOUR_STAGES = {"width": 8, "depths": [2, 1, 2, 2], "heads": [1, 2, 4, 8], "drop_path": 0.2}
SIZES = [
    pytest.param(32, 56, TWO_STAGES, id="shifted along all axes, nothing padded"),
    pytest.param(20, 60, TWO_STAGES, id="shifted and padded along all axes"),
    pytest.param(8, 64, TWO_STAGES, id="window covers time"),
    pytest.param(36, 24, TWO_STAGES, id="window covers rows and columns"),
    pytest.param(5, 36, TWO_STAGES, id="windows smaller than full ones, odd frames"),
    pytest.param(4, 100, FOUR_STAGES, id="odd rows and columns to merge"),
    pytest.param(2, 4, TWO_STAGES, id="one token"),
]
INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 18, "crop": 32, "short_side": 32},
        "audio": {"num_windows": 3, "window_s": 0.2, "num_mels": 20},
        "detections": {"num_frames": 4, "max_boxes": 3},
    }
)
RECOMPUTING: dict[str, tuple[str, dict[str, Any]]] = {
    "swin3d_small": ("video", {"width": 6, "depths": [2, 1], "heads": [1, 2], "drop_path": 0.3}),
    "ast_t": ("audio", {}),
    "stlt": ("detections", {"width": 24, "heads": 2, "spatial_layers": 2, "temporal_layers": 2}),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pair(num_frames: int, side: int, options: dict[str, Any]) -> tuple[VideoSwin, SwinTransformer3d]:
    """Return our model and torchvision's with the same weights, with norms and biases unlike their initial values."""
    torch.manual_seed(0)
    ours = VideoSwin(SwinOptions.model_validate(options), num_frames, side)
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.5)
    theirs = SwinTransformer3d(
        [2, 4, 4], options["width"], options["depths"], options["heads"], [8, 7, 7],
        stochastic_depth_prob=options["drop_path"], num_classes=1,
    )
    loaded = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(key.startswith("head.") or key.endswith("position_index") for key in loaded.missing_keys)
    return ours, theirs


def tokens_of(theirs: SwinTransformer3d, x: Tensor) -> Tensor:
    tokens: Tensor = theirs.norm(theirs.features(theirs.patch_embed(x)))
    return tokens.flatten(1, 3)


def gradients(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model.zero_grad()
    (tokens * torch.randn_like(tokens)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def recipe_of(name: str, **choices: Any) -> EncoderRecipe:
    return EncoderRecipe(name=name, options=RECOMPUTING[name][1], **choices)


def encoder_of(name: str, **choices: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(RECOMPUTING[name][0], recipe_of(name, **choices), INPUTS)


def clips_for(name: str, num: int) -> Tensor:
    torch.manual_seed(num)
    x = torch.randn(num, *input_shape(RECOMPUTING[name][0], INPUTS))
    if name == "stlt":
        x[..., 4] = torch.randint(0, 3, x.shape[:-1])
    return x


@pytest.mark.parametrize(("num_frames", "side", "options"), SIZES)
@pytest.mark.parametrize("num_clips", [1, 3])
def test_tokens_are_torchvisions(num_frames: int, side: int, options: dict[str, Any], num_clips: int) -> None:
    ours, theirs = pair(num_frames, side, options)
    x = torch.randn(num_clips, 3, num_frames, side, side)
    with torch.no_grad():
        tokens = ours.eval()(x)
        torch.testing.assert_close(tokens, tokens_of(theirs.eval(), x), atol=1e-4, rtol=0)
    assert tokens.shape == (num_clips, ours.num_tokens, ours.width)


@pytest.mark.parametrize(("num_frames", "side", "options"), SIZES)
def test_tokens_and_gradients_in_training_are_torchvisions(
    num_frames: int, side: int, options: dict[str, Any]
) -> None:
    ours, theirs = pair(num_frames, side, options)
    ours, theirs = ours.double().train(), theirs.double().train()
    x = torch.randn(3, 3, num_frames, side, side, dtype=torch.float64)
    torch.manual_seed(1)  # both skip the same blocks of the same clips
    tokens = ours(x)
    torch.manual_seed(1)
    expected = tokens_of(theirs, x)
    torch.testing.assert_close(tokens, expected, atol=1e-10, rtol=1e-10)
    wanted = gradients(theirs, expected)
    for name, gradient in gradients(ours, tokens).items():
        close = torch.isclose(gradient, wanted[name], atol=1e-8, rtol=1e-8)
        assert bool(close.all()), name


@pytest.mark.parametrize("grad", [False, True])
def test_bf16_tokens_are_as_close_to_exact_ones_as_torchvisions(grad: bool) -> None:
    ours, theirs = pair(20, 60, TWO_STAGES)
    x = torch.randn(2, 3, 20, 60, 60)
    with torch.no_grad():
        exact = ours.eval()(x)
    ours, theirs = ours.bfloat16(), theirs.bfloat16().eval()
    with torch.set_grad_enabled(grad):
        tokens, others = ours(x.bfloat16()).detach(), tokens_of(theirs, x.bfloat16()).detach()
    assert tokens.dtype == torch.bfloat16
    assert float((tokens.float() - exact).abs().mean()) < 1.25 * float((others.float() - exact).abs().mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_implementations_of_attention_agree(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 5, 2, 12, 8, dtype=dtype)
    bias = torch.randn(1, 2, 12, 12, dtype=dtype)
    fused = window_attention.attend(query, key, value, bias)
    torch.testing.assert_close(window_attention.attend(query, key, value, bias.requires_grad_()), fused)


def test_new_weights_take_effect_at_once() -> None:
    ours, _ = pair(18, 32, TWO_STAGES)
    x = torch.randn(1, 3, 18, 32, 32)
    with torch.no_grad():
        before = ours.eval()(x)
        for block in (module for module in ours.modules() if isinstance(module, window_attention.WindowAttention)):
            block.relative_position_bias_table.normal_()
        after = ours(x)
    other, _ = pair(18, 32, TWO_STAGES)
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert not torch.allclose(before, after)
        assert torch.equal(other.eval()(x), after)


def test_frames_of_another_size_are_refused() -> None:
    ours, _ = pair(8, 32, TWO_STAGES)
    with pytest.raises(ValueError, match=r"\(3, 8, 36, 36\), expected \(3, 8, 32, 32\)"):
        ours(torch.zeros(1, 3, 8, 36, 36))


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 9)] * 3), window=st.tuples(*[st.integers(1, 5)] * 3), shifted=st.booleans(),
    num_clips=st.integers(1, 3),
)
def test_every_token_of_every_clip_lies_in_one_window(
    grid: window_attention.Size, window: window_attention.Size, shifted: bool, num_clips: int
) -> None:
    order = window_attention.WindowOrder(grid, window, shifted)
    arranged = order(torch.zeros(num_clips, order.num_tokens, 1))
    num_tokens = num_clips * order.num_tokens
    assert torch.equal(arranged.rows_R[arranged.tokens], torch.arange(num_tokens))
    assert int((arranged.rows_R == num_tokens).sum()) == len(arranged.rows_R) - num_tokens
    assert sum(arranged.lengths) * num_clips == len(arranged.rows_R)
    clips = torch.where(arranged.rows_R < num_tokens, arranged.rows_R // order.num_tokens, -1)
    for part in clips.split([length * num_clips for length in arranged.lengths]):
        windows = part.view(-1, arranged.hidden_GLL.shape[-1])
        top = windows.amax(dim=1, keepdim=True)
        assert bool(((windows == top) | (windows == -1)).all())  # nobody shares a window with another clip
    assert not bool(arranged.hidden_GLL[0].any())


@settings(max_examples=25, deadline=None)
@given(rows=st.permutations(range(6)), padding=st.integers(0, 3))
def test_taking_rows_has_the_gradient_of_indexing(rows: list[int], padding: int) -> None:
    taken = torch.tensor(rows + [6] * padding)
    inverse = torch.tensor(rows).argsort()
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: window_attention.take_rows(x, taken, inverse), (x,))
    assert torch.equal(window_attention.take_rows(x, taken, inverse)[:6], x[rows])


@pytest.mark.parametrize("training", [False, True])
def test_multiplications_are_as_many_as_torchvisions(training: bool) -> None:
    ours, theirs = (model.to("meta") for model in pair(32, 56, TWO_STAGES))
    x = torch.empty(1, 3, 32, 56, 56, device="meta")  # on a CPU some counters miss fused attention
    counts = []
    for run in (lambda: ours.train(training)(x), lambda: tokens_of(theirs.train(training), x)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            tokens = run()
            if training:
                tokens.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= counts[1]
    assert counts[0] > 0.99 * counts[1]


@pytest.mark.parametrize("name", list(RECOMPUTING))
def test_recomputed_activations_change_no_bit_of_tokens_or_gradients(name: str) -> None:
    results = []
    for recompute in (False, True):
        encoder = encoder_of(name, activation_checkpointing=recompute).train()
        torch.manual_seed(5)
        tokens = encoder(clips_for(name, 3))
        results.append((tokens, gradients(encoder, tokens)))
    (kept, kept_gradients), (again, again_gradients) = results
    assert torch.equal(kept, again)
    assert kept_gradients.keys() == again_gradients.keys()
    for key, gradient in kept_gradients.items():
        assert torch.equal(gradient, again_gradients[key]), key


@pytest.mark.parametrize("name", list(RECOMPUTING))
def test_recomputing_keeps_less_for_the_backward_pass(name: str) -> None:
    kept_bytes = []
    for recompute in (False, True):
        encoder = encoder_of(name, activation_checkpointing=recompute).train()
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tokens = encoder(clips_for(name, 3))
        for parameter in encoder.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        kept_bytes.append(sum(kept.values()))
        assert tokens.requires_grad
    assert kept_bytes[1] < 0.6 * kept_bytes[0]


def test_an_encoder_without_blocks_refuses_to_recompute() -> None:
    others = (*RECOMPUTING, "swin3d", "hf_", "timm_")
    refused = [name for name in ENCODERS if not name.startswith(others)]
    assert refused
    for name in refused:
        modality = ENCODERS[name].modalities[0]
        with pytest.raises(UserError, match=f"model.encoders.{modality}.activation_checkpointing: .*cannot") as caught:
            build_encoder(modality, EncoderRecipe(name=name, activation_checkpointing=True), INPUTS)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize(("backend", "recompute"), [("eager", True), ("aot_eager", False)])
def test_swin_compiles_as_one_graph(backend: str, recompute: bool) -> None:
    encoder = encoder_of("swin3d_small", activation_checkpointing=recompute).eval()
    x = clips_for("swin3d_small", 2)
    expected = encoder(x)
    wanted = gradients(encoder, expected)
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    tokens = compiled(x)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients(encoder, tokens).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("name", ["swin3d_small", "stlt"])
def test_a_compiled_encoder_takes_any_number_of_clips(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile_cheaply(module: nn.Module, **choices: Any) -> None:
        calls.append(choices)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager", **choices)

    monkeypatch.setattr(nn.Module, "compile", compile_cheaply)
    plain, compiled = encoder_of(name).eval(), encoder_of(name, compile=True).eval()
    assert len(calls) == 1
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert [key for key, _ in compiled.named_parameters()] == [key for key, _ in plain.named_parameters()]
    with torch.no_grad():
        for num_clips in (1, 3, 2):
            x = clips_for(name, num_clips)
            torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-5)
