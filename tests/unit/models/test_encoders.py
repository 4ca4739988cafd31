"""Tests of encoders: the table, published sizes, and that a clip's tokens depend on that clip alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import swin3d_t

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.small import shift_in_time
from karmma_dist.models.encoders.table import ENCODERS, build_encoder, input_shape
from karmma_dist.recipe import EncoderRecipe, InputRecipe

TINY = InputRecipe.model_validate(
    {
        "video": {"num_frames": 5, "crop": 36, "short_side": 36},
        "audio": {"num_windows": 3, "window_s": 0.2, "num_mels": 20},
        "detections": {"num_frames": 4, "max_boxes": 3},
        "signal": {"num_samples": 70, "num_channels": 3},
    }
)
TINY_OPTIONS: dict[str, dict[str, Any]] = {
    "small_video": {"width": 8},
    "small_audio": {"width": 8, "blocks": 2},
    "temporal_video": {"width": 8, "embedding": 8, "steps": 3},
    "swin3d_small": {"width": 12, "depths": [1, 2], "heads": [2, 4]},
    "signal_cnn": {"width": 8, "steps": 3},
    "stlt": {"width": 24, "heads": 2, "spatial_layers": 2, "temporal_layers": 2},
    "ast_t": {},
}
TINY_CASES = [(name, m) for name in TINY_OPTIONS for m in ENCODERS[name].modalities]


def build(name: str, modality: str, inputs: InputRecipe = TINY, **options: Any) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(modality, EncoderRecipe(name=name, options=options), inputs).eval()


def clips(num: int, modality: str) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(num, *input_shape(modality, TINY))
    if modality == "detections":
        x[..., 4] = torch.randint(0, 3, x.shape[:-1])
    return x


def test_every_modality_has_an_encoder_and_a_shape() -> None:
    for modality in MODALITIES:
        assert any(modality in kind.modalities for kind in ENCODERS.values())
        assert all(size > 0 for size in input_shape(modality, InputRecipe()))


def test_default_inputs_have_the_papers_shapes() -> None:
    assert input_shape("video", InputRecipe()) == input_shape("flow", InputRecipe()) == (3, 32, 224, 224)
    assert input_shape("audio", InputRecipe()) == (32, 128, 224)
    assert input_shape("detections", InputRecipe()) == (32, 14, 6)
    assert input_shape("signal", InputRecipe()) == (6, 400)


@pytest.mark.parametrize(("name", "modality"), TINY_CASES)
def test_tokens_have_the_declared_shape_and_depend_on_one_clip(name: str, modality: str) -> None:
    encoder = build(name, modality, **TINY_OPTIONS[name])
    x = clips(3, modality)
    with torch.no_grad():
        together = encoder(x)
        alone = torch.cat([encoder(x[row : row + 1]) for row in range(3)])
    assert together.shape == (3, encoder.num_tokens, encoder.width)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize(("name", "modality"), TINY_CASES)
def test_every_parameter_of_an_encoder_is_reached_by_the_gradient(name: str, modality: str) -> None:
    encoder = build(name, modality, **TINY_OPTIONS[name])
    weights = torch.randn(encoder.num_tokens, encoder.width)
    (encoder(clips(2, modality)) * weights).sum().backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize(
    ("name", "modality", "num_tokens", "parameters", "gflops"),
    [
        ("swin3d_t", "video", 784, 27_850_470, 175.528),
        ("swin3d_b", "flow", 784, 87_638_984, 562.665),
        ("swin3d_b", "audio", 784, 87_638_984, 562.665),
        ("ast_t", "audio", 253, 6_960_960, 4.084),
    ],
)
def test_published_encoders_have_their_published_size_and_cost(
    name: str, modality: str, num_tokens: int, parameters: int, gflops: float
) -> None:
    with torch.device("meta"):
        encoder = build(name, modality, InputRecipe())
        x = torch.empty(1, *input_shape(modality, InputRecipe()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = encoder(x)
    assert tokens.shape == (1, num_tokens, encoder.width)
    assert encoder.num_tokens == num_tokens
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=6e-4)


@pytest.mark.parametrize("num_samples", [200, 400, 800])
def test_the_encoder_of_signals_is_small(num_samples: int) -> None:
    encoder = build("signal_cnn", "signal", InputRecipe.model_validate({"signal": {"num_samples": num_samples}}))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.randn(1, 6, num_samples))
    assert sum(p.numel() for p in encoder.parameters()) < 1e6
    assert counter.get_total_flops() < 1e8


def test_swin3d_t_tokens_are_torchvisions_features() -> None:
    inputs = InputRecipe.model_validate({"video": {"num_frames": 4, "crop": 64, "short_side": 64}})
    encoder = build("swin3d_t", "video", inputs)
    reference = swin3d_t().eval()
    reference.load_state_dict(encoder.state_dict(), strict=False)
    x = torch.randn(1, 3, 4, 64, 64)
    features: list[Tensor] = []
    reference.norm.register_forward_hook(lambda _module, _args, out: features.append(out))
    with torch.no_grad():
        reference(x)
        tokens = encoder(x)
    torch.testing.assert_close(tokens, features[0].flatten(1, 3), atol=1e-5, rtol=1e-5)


def test_swin_takes_spectrogram_windows_as_frames_of_three_equal_channels() -> None:
    inputs = InputRecipe.model_validate(
        {"video": {"num_frames": 2, "crop": 32, "short_side": 32}, "audio": {"num_windows": 4, "num_mels": 32,
                                                                            "window_s": 31 * 0.005}}
    )
    assert input_shape("audio", inputs) == (4, 32, 32)
    encoder = build("swin3d_small", "audio", inputs, **TINY_OPTIONS["swin3d_small"])
    windows = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(windows), encoder(windows[:, None].expand(1, 3, 4, 32, 32)))


def test_asts_first_token_averages_class_and_distillation_token() -> None:
    encoder = build("ast_t", "audio")
    tokens: list[Tensor] = []
    encoder.trunk.register_forward_hook(lambda _module, _args, out: tokens.append(out))  # type: ignore[union-attr]
    with torch.no_grad():
        out = encoder(clips(2, "audio"))
    torch.testing.assert_close(out[:, 0], (tokens[0][:, 0] + tokens[0][:, 1]) / 2)
    assert torch.equal(out[:, 1:], tokens[0][:, 2:])


def test_time_is_shifted_within_a_clip_only() -> None:
    x = torch.randn(2 * 3, 8, 2, 2)
    out = shift_in_time(x, 3).unflatten(0, (2, 3))
    clips = x.unflatten(0, (2, 3))
    for frame in range(3):
        before = clips[:, frame - 1, :2] if frame > 0 else torch.zeros(2, 2, 2, 2)
        after = clips[:, frame + 1, 2:4] if frame < 2 else torch.zeros(2, 2, 2, 2)
        assert torch.equal(out[:, frame], torch.cat([before, after, clips[:, frame, 4:]], dim=1))


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_small_encoders_notice_time_reversal(modality: str) -> None:
    encoder = build(f"small_{modality}", modality)
    x = clips(1, modality)
    with torch.no_grad():
        forward, backward = encoder(x), encoder(x.flip(2 if modality == "video" else 3))
    assert not torch.allclose(forward.mean(dim=1), backward.mean(dim=1), atol=1e-3)


def test_stlt_takes_frames_and_clips_without_any_box() -> None:
    encoder = build("stlt", "detections", **TINY_OPTIONS["stlt"]).train()
    x = clips(2, "detections")
    x[0, 1] = 0
    x[1] = 0
    tokens = encoder(x)
    assert bool(tokens.isfinite().all())
    tokens.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)


def test_stlt_ignores_padding_and_the_order_of_boxes() -> None:
    encoder = build("stlt", "detections", **TINY_OPTIONS["stlt"])
    x = clips(1, "detections")
    x[0, :, :, 4] = torch.tensor([1.0, 0.0, 2.0])
    other = x.clone()
    other[0, :, 1, :4] = 7.0
    with torch.no_grad():
        torch.testing.assert_close(encoder(other), encoder(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoder(x[:, :, [2, 0, 1]]), encoder(x), atol=1e-5, rtol=1e-5)


def test_stlt_frames_attend_to_earlier_ones_last_token_to_all() -> None:
    encoder = build("stlt", "detections", **TINY_OPTIONS["stlt"])
    x = clips(1, "detections")
    x[..., 4] = 1
    other = x.clone()
    other[0, 2, :, :4] += 1
    with torch.no_grad():
        changed = ~torch.isclose(encoder(x), encoder(other), atol=1e-6).all(dim=2)[0]
    assert changed.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("modality", "name", "options", "message"),
    [
        ("video", "swin3d_s", {}, r"model.encoders.video.name: unknown encoder 'swin3d_s' \(did you mean 'swin3d_"),
        ("audio", "stlt", {}, "stlt.*boxes.*audio gives spectrograms.*: swin3d_t, .*ast_t, small_audio"),
        ("video", "small_video", {"widht": 8}, r"small_video.*unknown key 'widht' \(did you mean 'width'\?\)"),
        ("video", "small_video", {"width": 9}, "'width'.*multiple of 4"),
        ("video", "swin3d_t", {"depths": [1]}, "unknown key 'depths'"),
        ("video", "swin3d_small", {"depths": [1, 1]}, "one of each per stage"),
        ("video", "swin3d_small", {"width": 10}, "stage 1: width 10 is not a multiple of 3 heads"),
        ("detections", "stlt", {"heads": 7}, "width 768 is not a multiple of heads 7"),
    ],
)
def test_a_wrong_encoder_recipe_is_explained_on_one_line(
    modality: str, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(name, modality, **options)
    assert "\n" not in str(caught.value)


def test_a_spectrogram_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(UserError, match="8 mels x 41 steps is too small"):
        build("ast_t", "audio", InputRecipe.model_validate({"audio": {"num_mels": 8, "window_s": 0.2}}))


def test_no_encoder_normalises_over_the_batch() -> None:
    for name, kind in ENCODERS.items():
        if name.startswith(("hf_", "timm_")):  # of other packages, which need not be there
            continue
        with torch.device("meta"):
            encoder = build(name, kind.modalities[0], InputRecipe())
        assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in encoder.modules())
