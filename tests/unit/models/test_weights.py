"""Tests of weights: saved completely, loaded exactly, and taken from other runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models import model_card as pretrained
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import build_encoder, input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.models.weights import load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, ModelRecipe

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "crop": 32, "short_side": 32},
        "audio": {"num_windows": 4, "window_s": 0.3, "num_mels": 36},
        "detections": {"num_frames": 4, "max_boxes": 3},
    }
)
HEADS = {"verb": 2, "noun": 3}
CLASSES = {"verb": ["no", "${HOME}"], "noun": ["a", "b: c", "3"]}


def model_of(*modalities: str, seed: int = 0, frozen: bool = False, width: int = 8) -> KarmmaModel:
    kinds = {"video": "small_video", "flow": "small_video", "audio": "small_audio"}
    encoders = {m: EncoderRecipe(name=kinds[m], options={"width": 4}, frozen=frozen) for m in kinds}
    torch.manual_seed(seed)
    recipe = ModelRecipe(encoders=encoders, width=width, num_heads=2, feedforward=8, fc_width=8)
    return KarmmaModel(recipe, INPUTS, modalities, HEADS)


def encoder_of(name: str, modality: str, seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    return build_encoder(modality, EncoderRecipe(name=name, options=options), INPUTS).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_saved_model_comes_back_with_bit_equal_logits(tmp_path: Path, frozen: bool, whole_folder: bool) -> None:
    model = model_of("video", "audio", frozen=frozen).eval()
    save_model(model, tmp_path, classes=CLASSES)
    loaded, card = load_model(tmp_path if whole_folder else tmp_path / "weights.safetensors")
    assert (card.modalities, card.heads, card.classes, card.inputs) == (["video", "audio"], HEADS, CLASSES, INPUTS)
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    inputs = {m: torch.randn(2, *input_shape(m, INPUTS)) for m in model.modalities}
    present = torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = model(inputs, present), loaded.eval()(inputs, present)
    assert all(torch.equal(ours[head], theirs[head]) for head in HEADS)


def test_a_weights_file_holds_every_parameter_once_and_nothing_else(tmp_path: Path) -> None:
    model = model_of("video", "flow", frozen=True)
    save_model(model, tmp_path)
    assert load_file(tmp_path / "weights.safetensors").keys() == dict(model.named_parameters()).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.yaml", "weights.safetensors"]


def test_bfloat16_weights_come_back_as_the_same_numbers_in_float32(tmp_path: Path) -> None:
    model = model_of("video").to(torch.bfloat16)
    save_model(model, tmp_path)
    loaded, _ = load_model(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float())


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    save_model(model_of("video"), tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_save_that_fails_leaves_the_earlier_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("video")
    save_model(model, tmp_path)

    def half_written(_state: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "save_file", half_written)
    with pytest.raises(OSError, match="disk full"):
        save_model(model_of("video", seed=1), tmp_path)
    assert same(load_model(tmp_path)[0], model)


def test_weights_that_cannot_be_loaded_are_one_line(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such run folder or weights file")
    refused(tmp_path, "holds no weights.safetensors: finish that run first")
    save_model(model_of("video"), tmp_path)
    weights, card = tmp_path / "weights.safetensors", tmp_path / "model.yaml"
    whole, description = weights.read_bytes(), card.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "weights.safetensors: cannot be read as weights")
    weights.write_bytes(whole)
    card.write_text(description.replace("width: 8", "width: 16"))
    refused(tmp_path, "weights of other sizes: .* expected")
    card.write_text(description.replace("num_layers: 1", "num_layers: 2"))
    refused(tmp_path, r"not weights of this architecture: 12 keys are missing \(fusion.layers.1.*norm2.bias\)$")
    card.write_text(description.replace("modalities", "modalitys"))
    refused(tmp_path, "model.yaml: .*unknown key 'modalitys' \\(did you mean 'modalities'\\?\\)")
    card.unlink()
    refused(tmp_path, "no model.yaml in its folder")


def test_a_card_with_wrong_class_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes of head 'verb': 1 names for 2 classes"):
        save_model(model_of("video"), tmp_path, classes={"verb": ["only"]})


def test_an_encoder_starts_from_the_runs_encoder_of_its_modality(tmp_path: Path) -> None:
    run = model_of("video", "flow")
    save_model(run, tmp_path)
    for source in (tmp_path, tmp_path / "weights.safetensors"):
        encoder = encoder_of("small_video", "flow", seed=9, width=4)
        load_encoder_weights(encoder, "flow", str(source))
        assert same(encoder, run.encoders["flow"])
    with pytest.raises(UserError, match="holds encoders for flow, video, none for audio"):
        load_encoder_weights(encoder_of("small_audio", "audio", width=4), "audio", str(tmp_path))


def test_an_encoder_starts_from_a_run_of_one_other_modality(tmp_path: Path) -> None:
    run = model_of("video")
    save_model(run, tmp_path)
    encoder = encoder_of("small_video", "flow", seed=9, width=4)
    load_encoder_weights(encoder, "flow", str(tmp_path))
    assert same(encoder, run.encoders["video"])


def test_weights_of_another_encoder_are_refused_and_change_nothing(tmp_path: Path) -> None:
    save_model(model_of("video"), tmp_path)
    before = encoder_of("small_audio", "audio", width=4)
    encoder = encoder_of("small_audio", "audio", width=4)
    with pytest.raises(UserError, match=r"for the audio encoder\): not weights of this architecture"):
        load_encoder_weights(encoder, "audio", str(tmp_path))
    with pytest.raises(UserError, match="weights of other sizes"):
        load_encoder_weights(encoder_of("small_video", "video", width=8), "video", str(tmp_path))
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"SmallAudio has no published weights, and 'layer.weight' is not a key"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "foreign.pth"))
    with pytest.raises(UserError, match="no such run folder or weights file"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "missing.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=r"text.pth: cannot be read as weights: neither .safetensors nor"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "text.pth"))
    assert same(before, encoder)
