"""Tests of the video models of transformers: the library's own tokens, every key and shape, one line for what is wrong.

Models are tiny, of random weights, and written as the library writes a folder of the hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.pretrained.family import Normalisation, Renormalise
from karmma_dist.models.encoders.pretrained.video import IMAGENET, VIDEO_MODELS
from karmma_dist.models.encoders.table import build_encoder
from karmma_dist.models.flops import flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.models.weights import load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe
from kits.hub_folders import (
    TOLERANCE,
    change,
    change_config,
    imagenet,
    inputs_of,
    normalised,
    pixels_of,
    tensor_of,
)
from kits.web_server import serving

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'karmma-dist[encoders]'")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
FIXED = {**SIZES, "intermediate_size": 32, "image_size": 32, "num_frames": 4}


@dataclass(frozen=True)
class Published:
    """A tiny published model."""

    name: str
    config: dict[str, Any]
    """Options of the recipe."""
    make: Callable[[], nn.Module]
    """Makes the model that is saved."""
    tokens: Callable[[nn.Module, Tensor], Tensor]
    """The library's own tokens (N, T, D) of pixels (N, F, 3, S, S) in [0, 1], ordered by time, row, column."""


def timesformer_tokens(model: Any, pixels: Tensor) -> Tensor:
    tokens = model.timesformer(normalised(pixels, (0.45,) * 3, (0.225,) * 3)).last_hidden_state[:, 1:]
    by_time: Tensor = tokens.unflatten(1, (4, pixels.shape[1])).transpose(1, 2).flatten(1, 2)
    return by_time


def vjepa2(cls: str) -> nn.Module:
    small = {"pred_hidden_size": 12, "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1}
    config = transformers.VJEPA2Config(**SIZES, **small, crop_size=32, frames_per_clip=4, num_pooler_layers=1)
    model: nn.Module = getattr(transformers, cls)(config)
    return model


MODELS = {
    "videomae": Published(
        "hf_videomae",
        FIXED,
        lambda: transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**FIXED)),
        lambda model, pixels: model.videomae(imagenet(pixels)).last_hidden_state,  # type: ignore[operator,union-attr]
    ),
    "videomae_pretraining": Published(
        "hf_videomae",
        {**FIXED, "use_mean_pooling": False},
        lambda: transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**FIXED, use_mean_pooling=False)),
        lambda model, pixels: model.videomae(imagenet(pixels)).last_hidden_state,  # type: ignore[operator,union-attr]
    ),
    "vjepa2": Published(
        "hf_vjepa2",
        SIZES,
        lambda: vjepa2("VJEPA2Model"),
        lambda model, pixels: model.get_vision_features(imagenet(pixels)),  # type: ignore[operator,union-attr]
    ),
    "vjepa2_classifier": Published(
        "hf_vjepa2",
        SIZES,
        lambda: vjepa2("VJEPA2ForVideoClassification"),
        lambda model, pixels: model.vjepa2.get_vision_features(imagenet(pixels)),  # type: ignore[operator,union-attr]
    ),
    "timesformer": Published(
        "hf_timesformer",
        FIXED,
        lambda: transformers.TimesformerForVideoClassification(transformers.TimesformerConfig(**FIXED)),
        timesformer_tokens,
    ),
}
EVERY = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Models with the folders that hold them, by kind."""
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for kind, record in MODELS.items():
        torch.manual_seed(0)
        model = record.make().eval()
        for parameter in model.parameters():  # biases and norms too: as the library starts them, they change nothing
            nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)  # type: ignore[operator]
        made[kind] = (model, folder)
    return made


@pytest.fixture
def copied(published: dict[str, tuple[nn.Module, Path]], tmp_path: Path) -> Callable[[str], Path]:
    """Copies the folder of a kind, to be changed."""
    return lambda kind: Path(shutil.copytree(published[kind][1], tmp_path / kind))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def encoder_of(kind: str, inputs: InputRecipe | None = None, **options: Any) -> Encoder:
    record = MODELS[kind]
    recipe = EncoderRecipe(name=record.name, frozen=True, options={"config": record.config, **options})
    return build_encoder("video", recipe, inputs or inputs_of()).eval()


def loaded(kind: str, folder: Path | str, inputs: InputRecipe | None = None, **options: Any) -> Encoder:
    encoder = encoder_of(kind, inputs, **options)
    load_encoder_weights(encoder, "video", str(folder))
    return encoder


def refusal(kind: str, folder: Path | str) -> str:
    encoder = encoder_of(kind)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_encoder_weights(encoder, "video", str(folder))
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    assert "\n" not in str(error.value)
    return str(error.value)


@EVERY
def test_tokens_are_those_of_the_library_on_the_same_pixels(
    kind: str, published: dict[str, tuple[nn.Module, Path]]
) -> None:
    model, folder = published[kind]
    encoder = loaded(kind, folder)
    tokens = encoder(tensor_of(pixels_of(3)))
    assert tokens.shape == (3, encoder.num_tokens, encoder.width)
    torch.testing.assert_close(tokens, MODELS[kind].tokens(model, pixels_of(3)), **TOLERANCE)


@EVERY
def test_a_clips_tokens_depend_on_that_clip_alone(kind: str, published: dict[str, tuple[nn.Module, Path]]) -> None:
    encoder, clips = loaded(kind, published[kind][1]), tensor_of(pixels_of(3))
    together = encoder(clips)
    torch.testing.assert_close(together, torch.cat([encoder(clip[None]) for clip in clips]), **TOLERANCE)
    assert not torch.allclose(together[0], together[1])


@EVERY
def test_time_comes_first_in_the_order_of_tokens(kind: str, published: dict[str, tuple[nn.Module, Path]]) -> None:
    """With the change in the last frames alone, the last tokens change most."""
    encoder, clips = loaded(kind, published[kind][1]), tensor_of(pixels_of(1))
    other = clips.clone()
    other[:, :, 2:] = 0
    change_T = (encoder(clips) - encoder(other)).abs().sum(dim=2)[0]
    assert change_T.unflatten(0, (2, -1)).sum(dim=1).argmax() == 1


@pytest.mark.parametrize("kind", ["videomae", "timesformer"])
def test_a_model_of_fewer_frames_sees_one_of_each_group(
    kind: str, published: dict[str, tuple[nn.Module, Path]]
) -> None:
    model, folder = published[kind]
    pixels = pixels_of(2, num_frames=12)
    tokens = loaded(kind, folder, inputs_of(num_frames=12))(tensor_of(pixels))
    torch.testing.assert_close(tokens, MODELS[kind].tokens(model, pixels[:, 1::3]), **TOLERANCE)


def test_computed_positions_follow_the_inputs(published: dict[str, tuple[nn.Module, Path]]) -> None:
    encoder = loaded("vjepa2", published["vjepa2"][1], inputs_of(num_frames=6, crop=48))
    model = transformers.VJEPA2Model.from_pretrained(published["vjepa2"][1], crop_size=48, frames_per_clip=6).eval()
    pixels = torch.rand(1, 6, 3, 48, 48)
    assert encoder.num_tokens == 3 * 3 * 3
    torch.testing.assert_close(
        encoder(tensor_of(pixels)), model.get_vision_features(imagenet(pixels)), **TOLERANCE
    )


@pytest.mark.parametrize("bias", ["q_bias", "v_bias"])
def test_the_biases_of_videomae_arrive(bias: str, copied: Callable[[str], Path]) -> None:
    """Published files name them otherwise than the module does, and a model without them gives other numbers."""
    folder, clips = copied("videomae"), tensor_of(pixels_of(1))
    before = loaded("videomae", folder)(clips)
    key = f"videomae.encoder.layer.0.attention.attention.{bias}"
    change(folder, lambda state: state.update({key: state[key] + 0.5}))
    assert (loaded("videomae", folder)(clips) - before).abs().max() > 1e-3


@EVERY
def test_every_tensor_of_the_file_is_in_the_encoder_or_of_a_head(
    kind: str, published: dict[str, tuple[nn.Module, Path]]
) -> None:
    """No entry is read and then lost: all but heads and decoders are in the encoder, bit for bit, and nothing else."""
    encoder, state = loaded(kind, published[kind][1]), load_file(published[kind][1] / "model.safetensors")
    own = sorted(tensor.numpy().tobytes() for tensor in encoder.state_dict().values())
    heads = ("classifier", "fc_norm", "decoder", "encoder_to_decoder", "mask_token", "predictor", "pooler")
    kept = [value for key, value in state.items() if not key.removeprefix("vjepa2.").startswith(heads)]
    assert own == sorted(tensor.numpy().tobytes() for tensor in kept)


@EVERY
def test_a_missing_unknown_or_resized_key_is_named_and_nothing_is_loaded(
    kind: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    key = next(key for key in load_file(folder / "model.safetensors") if "layer.1" in key and "predictor" not in key)
    whole = load_file(folder / "model.safetensors")
    change(folder, lambda state: state.pop(key))
    assert "1 keys are missing" in refusal(kind, folder)
    save_file(whole | {key + "_of_another_model": torch.zeros(3)}, folder / "model.safetensors")
    assert "_of_another_model" in refusal(kind, folder)
    save_file(whole | {key: torch.zeros(3, 5)}, folder / "model.safetensors")
    assert "is (3, 5), expected" in refusal(kind, folder)


def test_missing_biases_of_videomae_are_no_zeros(copied: Callable[[str], Path]) -> None:
    folder = copied("videomae")
    change(folder, lambda state: [state.pop(key) for key in list(state) if key.endswith("q_bias")])
    assert "2 keys are missing" in refusal("videomae", folder)


def test_a_folder_in_several_files_is_read_whole(copied: Callable[[str], Path]) -> None:
    folder, clips = copied("videomae"), tensor_of(pixels_of(1))
    before = loaded("videomae", folder)(clips)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + row % 2}-of-00002.safetensors" for row, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert torch.equal(loaded("videomae", folder)(clips), before)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "which is no .safetensors file of its folder" in refusal("videomae", folder)


def test_a_folder_at_a_url_is_downloaded(
    published: dict[str, tuple[nn.Module, Path]], tmp_path: Path, downloads_at_once: None  # noqa: ARG001
) -> None:
    clips = tensor_of(pixels_of(1))
    encoder = encoder_of("vjepa2")
    with serving(published["vjepa2"][1].parent) as server:
        url = server.url_of(published["vjepa2"][1].name)
        load_encoder_weights(encoder, "video", url, cache_dir=str(tmp_path))
        with pytest.raises(UserError, match=r"absent/config\.json: not found on the server"):
            load_encoder_weights(encoder, "video", server.url_of("absent"), cache_dir=str(tmp_path))
    assert torch.equal(encoder(clips), loaded("vjepa2", published["vjepa2"][1])(clips))


@pytest.mark.usefixtures("downloads_at_once")
def test_a_preprocessor_at_a_url_is_missing_only_if_the_server_says_so(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied("videomae")
    with serving(folder.parent) as server:
        load_encoder_weights(encoder_of("videomae"), "video", server.url_of(folder.name), cache_dir=str(tmp_path / "a"))
        (folder / "preprocessor_config.json").write_text("{")
        with pytest.raises(UserError, match=r"preprocessor_config\.json: not valid JSON"):
            load_encoder_weights(
                encoder_of("videomae"), "video", server.url_of(folder.name), cache_dir=str(tmp_path / "b")
            )


def test_a_pickle_is_not_read(copied: Callable[[str], Path]) -> None:
    folder = copied("videomae")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin is a pickle" in refusal("videomae", folder)
    assert "give a published folder" in refusal("videomae", folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("videomae", {"num_attention_heads": 3}, "num_attention_heads 3 and the recipe 2"),
        ("videomae", {"layer_norm_eps": 1e-3}, "layer_norm_eps 0.001"),
        ("videomae", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("vjepa2", {"tubelet_size": 1}, "tubelet_size 1 and the recipe 2"),
        ("timesformer", {"model_type": "vivit"}, "model_type 'vivit'"),
    ],
)
def test_a_folder_of_another_architecture_is_refused_by_its_field(
    kind: str, fields: dict[str, Any], message: str, copied: Callable[[str], Path]
) -> None:
    """Such fields change the tokens and not the shapes."""
    folder = copied(kind)
    change_config(folder, **fields)
    assert message in refusal(kind, folder)


def test_fields_that_change_nothing_may_differ(copied: Callable[[str], Path]) -> None:
    folder = copied("videomae")
    change_config(folder, decoder_hidden_size=96, hidden_dropout_prob=0.1, id2label={"0": "open"})
    loaded("videomae", folder)


def test_another_normalisation_is_refused_unless_the_recipe_has_it(copied: Callable[[str], Path]) -> None:
    folder, half = copied("videomae"), [0.5, 0.5, 0.5]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    assert "set model.encoders.video.options.mean: [0.5, 0.5, 0.5]" in refusal("videomae", folder)
    loaded("videomae", folder, mean=half, std=half)


@pytest.mark.parametrize(
    ("kind", "inputs", "options", "message"),
    [
        ("videomae", inputs_of(crop=48), {}, "takes frames with a side of 32 pixels, not 48"),
        ("videomae", inputs_of(num_frames=6), {}, "takes 4 frames, of which 6 are no multiple"),
        ("vjepa2", inputs_of(crop=40), {}, "takes whole patches of 16 pixels, not a side of 40"),
        ("vjepa2", inputs_of(num_frames=5), {}, "takes whole groups of 2 frames, not 5"),
        ("vjepa2", None, {"architecture": "vitx"}, "unknown architecture 'vitx'"),
        ("vjepa2", None, {"config": {"hidden": 3}}, "unknown field 'hidden'"),
        ("vjepa2", None, {"config": {"crop_size": 64}}, "crop_size: it follows the recipe's inputs"),
        ("videomae", None, {"config": {**FIXED, "num_attention_heads": 5}}, "is not a multiple of the number"),
        ("videomae", None, {"config": {"hidden_size": "wide"}}, "hidden_size"),
        ("videomae", None, {"mean": [0.5]}, "mean and std have 3 numbers each"),
    ],
)
def test_wrong_sizes_and_options_are_refused_in_one_line(
    kind: str, inputs: InputRecipe | None, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        encoder_of(kind, inputs, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "model.encoders.video" in str(error.value)


@EVERY
def test_a_model_counts_its_flops_and_loads_from_its_run_without_the_folder(kind: str, tmp_path: Path) -> None:
    recipe = EncoderRecipe(name=MODELS[kind].name, frozen=True, options={"config": MODELS[kind].config})
    sizes: dict[str, Any] = {"width": 16, "num_heads": 2, "feedforward": 16, "fc_width": 16}
    model = KarmmaModel(ModelRecipe(encoders={"video": recipe}, **sizes), inputs_of(), ["video"], {"action": 3})
    linear = 2 * 24 * 24 * 2 * 8  # a linear layer of width 24 in each of two blocks, on at least 8 tokens
    assert flops_per_clip(model).encoders["video"] > 4 * linear
    save_model(model, tmp_path)
    again = load_model(tmp_path)[0]
    assert not any(module.training for module in again.encoders["video"].modules())
    clips, present_BM = {"video": tensor_of(pixels_of(2))}, torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(again.eval()(clips, present_BM), model.eval()(clips, present_BM))


def test_a_change_of_normalisation_gives_the_models_own() -> None:
    torch.manual_seed(0)
    pixels, own = torch.rand(2, 4, 3, 8, 8), Normalisation((0.1, 0.5, 0.3), (0.4, 0.2, 0.9))
    changed = Renormalise(IMAGENET, own)(tensor_of(pixels))
    torch.testing.assert_close(changed, normalised(pixels, own.mean, own.std).transpose(1, 2))


def test_the_table_holds_every_family() -> None:
    assert {record.name for record in MODELS.values()} == set(VIDEO_MODELS)
