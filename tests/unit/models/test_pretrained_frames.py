"""Tests of timm's image models on frames: the library's own tokens, every key and shape, positions of other sizes.

Models are tiny, of random weights, and written as timm writes a folder of the hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import build_encoder
from karmma_dist.models.flops import flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.weights import load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe
from kits.hub_folders import TOLERANCE, change, change_config, inputs_of, normalised, pixels_of, tensor_of

SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2}
SIDES = {
    "vit_small_patch14_dinov2.lvd142m": 28,
    "vit_small_patch14_reg4_dinov2.lvd142m": 28,
    "vit_small_patch16_dinov3.lvd1689m": 32,
    "vit_base_patch16_siglip_224.webli": 32,
}
"""Published models, with and without class token, register tokens and learned positions, and a side for them."""
NUM_PREFIX = dict(zip(SIDES, (1, 5, 5, 0), strict=True))
EVERY = pytest.mark.parametrize("name", SIDES)
DINOV2, REGISTERS, DINOV3, SIGLIP = SIDES


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Models with the folders that hold them, by name; one of them has a head."""
    made = {}
    for name, side in SIDES.items():
        torch.manual_seed(0)
        classes = 5 if name == DINOV2 else 0
        model = timm.create_model(name, pretrained=False, img_size=side, num_classes=classes, **SIZES).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(name.partition(".")[0])
        save_for_hf(model, folder, model_args=SIZES | {"img_size": side}, safe_serialization=True)
        made[name] = (model, folder)
    return made


@pytest.fixture
def copied(published: dict[str, tuple[Any, Path]], tmp_path: Path) -> Callable[[str], Path]:
    """Copies the folder of a model, to be changed."""
    return lambda name: Path(shutil.copytree(published[name][1], tmp_path / name))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder_of(name: str, inputs: InputRecipe | None = None, **options: Any) -> Encoder:
    recipe = EncoderRecipe(name="timm_frames", frozen=True, options={"model": name, "config": SIZES, **options})
    return build_encoder("video", recipe, inputs or inputs_of(crop=SIDES[name])).eval()


def loaded(name: str, folder: Path, inputs: InputRecipe | None = None, **options: Any) -> Encoder:
    encoder = encoder_of(name, inputs, **options)
    load_encoder_weights(encoder, "video", str(folder))
    return encoder


def frames_of(name: str, num_clips: int, num_frames: int = 4) -> Tensor:
    return pixels_of(num_clips, num_frames, SIDES[name])


def own_tokens(model: Any, pixels: Tensor) -> Tensor:
    """Return timm's tokens of every frame, (N, F, prefix + P, D)."""
    cfg = model.pretrained_cfg
    tokens = [model.forward_features(normalised(clip, cfg["mean"], cfg["std"])) for clip in pixels]
    return torch.stack(tokens)


@EVERY
def test_tokens_are_those_of_the_library_on_the_same_pixels(
    name: str, published: dict[str, tuple[Any, Path]]
) -> None:
    model, folder = published[name]
    pixels, encoder = frames_of(name, 3), loaded(name, folder)
    expected = own_tokens(model, pixels)[:, :, NUM_PREFIX[name] :].flatten(1, 2)
    tokens = encoder(tensor_of(pixels))
    assert tokens.shape == (3, encoder.num_tokens, encoder.width)
    torch.testing.assert_close(tokens, expected, **TOLERANCE)


def test_class_tokens_of_some_frames_are_one_token_each(published: dict[str, tuple[Any, Path]]) -> None:
    model, folder = published[DINOV3]
    pixels = frames_of(DINOV3, 2, num_frames=6)
    encoder = loaded(DINOV3, folder, inputs_of(num_frames=6), tokens="class", num_frames=2)
    assert encoder.num_tokens == 2
    expected = own_tokens(model, pixels[:, [1, 4]])[:, :, 0]
    torch.testing.assert_close(encoder(tensor_of(pixels)), expected, **TOLERANCE)


@EVERY
def test_a_clips_tokens_depend_on_that_clip_alone(name: str, published: dict[str, tuple[Any, Path]]) -> None:
    encoder, clips = loaded(name, published[name][1]), tensor_of(frames_of(name, 3))
    together = encoder(clips)
    torch.testing.assert_close(together, torch.cat([encoder(clip[None]) for clip in clips]), **TOLERANCE)
    assert not torch.allclose(together[0], together[1])


@EVERY
def test_every_tensor_of_the_file_is_in_the_encoder_or_of_the_head(
    name: str, published: dict[str, tuple[Any, Path]]
) -> None:
    encoder, state = loaded(name, published[name][1]), load_file(published[name][1] / "model.safetensors")
    own = sorted(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
    assert own == sorted(tensor.numpy().tobytes() for key, tensor in state.items() if not key.startswith("head."))


@EVERY
def test_a_missing_unknown_or_resized_key_is_named(name: str, copied: Callable[[str], Path]) -> None:
    folder, key = copied(name), "blocks.1.attn.proj.weight"
    whole = load_file(folder / "model.safetensors")
    for state, message in (
        ({k: v for k, v in whole.items() if k != key}, r"1 keys are missing \(model\.blocks\.1\.attn\.proj\.weight\)"),
        (whole | {"blocks.9.bias": torch.zeros(3)}, r"1 keys are unknown \(model\.blocks\.9\.bias\)"),
        (whole | {key: torch.zeros(3, 5)}, r"is \(3, 5\), expected \(24, 24\)"),
    ):
        save_file(state, folder / "model.safetensors")
        with pytest.raises(UserError, match=message):
            loaded(name, folder)


def test_positions_of_another_size_are_resized_as_timm_does(published: dict[str, tuple[Any, Path]]) -> None:
    model, folder = published[REGISTERS]
    encoder = loaded(REGISTERS, folder, inputs_of(crop=70))
    model = timm.create_model(REGISTERS, pretrained=False, img_size=28, num_classes=0, **SIZES).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.set_input_size((70, 70))
    pixels = pixels_of(2, 4, 70)
    expected = own_tokens(model, pixels)[:, :, NUM_PREFIX[REGISTERS] :].flatten(1, 2)
    assert encoder.num_tokens == 4 * 5 * 5
    torch.testing.assert_close(encoder(tensor_of(pixels)), expected, **TOLERANCE)


def test_positions_of_no_square_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied(DINOV2)
    change(folder, lambda state: state.update(pos_embed=torch.zeros(1, 8, 24)))
    with pytest.raises(UserError, match=r"model\.pos_embed is \(1, 8, 24\), expected \(1, 5, 24\)"):
        loaded(DINOV2, folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "vit_base_patch14_dinov2"}, "architecture 'vit_base_patch14_dinov2' and the recipe"),
        ({"model_args": {**SIZES, "num_heads": 3}}, "num_heads 3 and the recipe 2"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, "has mean"),
    ],
)
def test_a_folder_of_another_model_is_refused_by_its_field(
    fields: dict[str, Any], message: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(DINOV2)
    change_config(folder, **fields)
    with pytest.raises(UserError, match=message) as error:
        loaded(DINOV2, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "inputs", "options", "message"),
    [
        (DINOV2, inputs_of(crop=40), {}, "takes whole patches of 14 pixels, not a side of 40"),
        (DINOV2, None, {"num_frames": 3}, "4 frames of the inputs are no multiple of 3"),
        (SIGLIP, None, {"tokens": "class"}, "has no class token"),
        ("vit_small_patch14_dinov4", inputs_of(), {}, "timm has no model 'vit_small_patch14_dinov4' .did you mean"),
        ("resnet18", inputs_of(), {"config": {}}, "resnet18"),
        ("swin_tiny_patch4_window7_224", inputs_of(crop=56), {"config": {}}, "gives no tokens"),
        (DINOV2, None, {"config": {"depths": 3}}, "timm cannot build"),
        ("../model", inputs_of(), {}, "timm has no model"),
    ],
)
def test_wrong_sizes_and_options_are_refused_in_one_line(
    name: str, inputs: InputRecipe | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        encoder_of(name, inputs, **options)
    assert "\n" not in str(error.value)
    assert "model.encoders.video" in str(error.value)


def test_a_config_json_that_says_little_is_enough(copied: Callable[[str], Path]) -> None:
    folder = copied(DINOV2)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_dinov2", "model_args": SIZES}))
    loaded(DINOV2, folder)


def test_a_frozen_model_stays_in_eval_mode_and_counts_its_flops() -> None:
    recipe = EncoderRecipe(name="timm_frames", frozen=True, options={"model": DINOV3, "config": SIZES})
    sizes: dict[str, Any] = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}
    model = KarmmaModel(ModelRecipe(encoders={"video": recipe}, **sizes), inputs_of(), ["video"], {"action": 3})
    assert not any(module.training for module in model.train().encoders["video"].modules())
    whole, half = (
        flops_per_clip(KarmmaModel(model.recipe, inputs_of(num), ["video"], {"action": 3})).encoders["video"]
        for num in (4, 2)
    )
    assert whole == 2 * half > 0
