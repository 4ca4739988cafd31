"""Weights: saved whole, loaded exactly, and taken over from published checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from karmma_dist.errors import UserError
from karmma_dist.models import pretrained
from karmma_dist.models.encoder import Encoder
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.layout import build_encoder, input_shape
from karmma_dist.models.pretrained import load_encoder_weights, load_model, save_model
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
SWIN: dict[str, Any] = {"width": 12, "depths": [1, 2], "heads": [2, 4]}


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


def test_what_cannot_be_loaded_is_explained_on_one_line(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "no such run folder or weights file")
    refused(tmp_path, "holds no weights.safetensors: train that run to its end first")
    save_model(model_of("video"), tmp_path)
    weights, card = tmp_path / "weights.safetensors", tmp_path / "model.yaml"
    whole, description = weights.read_bytes(), card.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "weights.safetensors: cannot be read as weights")
    weights.write_bytes(whole)
    card.write_text(description.replace("width: 8", "width: 16"))
    refused(tmp_path, "weights of other sizes: .* expected")
    card.write_text(description.replace("num_layers: 1", "num_layers: 2"))
    refused(tmp_path, "not weights of this architecture: 12 keys are missing \\(fusion.layers.1.*, ...\\)")
    card.write_text(description.replace("modalities", "modalitys"))
    refused(tmp_path, "model.yaml: .*unknown key 'modalitys' \\(did you mean 'modalities'\\?\\)")
    card.unlink()
    refused(tmp_path, "no model.yaml beside it")


def test_a_card_whose_class_names_do_not_fit_its_heads_is_refused(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"SmallAudio has no published weights, and 'layer.weight' is no key"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "foreign.pth"))
    with pytest.raises(UserError, match="no such run folder or weights file"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "missing.pth"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match=r"text.pth: cannot be read as weights"):
        load_encoder_weights(encoder, "audio", str(tmp_path / "text.pth"))
    assert same(before, encoder)


def torchvision_swin() -> SwinTransformer3d:
    torch.manual_seed(3)
    return SwinTransformer3d([2, 4, 4], 12, [1, 2], [2, 4], [8, 7, 7], num_classes=5).eval()


def authors_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of the published key map, as the Video Swin authors' files have it."""
    renamed = {}
    for key, tensor in state.items():
        found = re.match(r"features\.(\d+)\.(.*)", key)
        if found:
            stage, odd = divmod(int(found[1]), 2)
            part = "downsample" if odd else "blocks"
            rest = found[2].replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
            key = f"layers.{stage}.{part}.{rest}"
        renamed[key.replace("head.", "cls_head.fc_cls.") if key.startswith("head") else f"backbone.{key}"] = tensor
    return renamed


@pytest.mark.parametrize("layout", ["torchvision.pth", "torchvision.safetensors", "authors.pth"])
def test_published_swin_checkpoints_load_and_give_equal_tokens(tmp_path: Path, layout: str) -> None:
    published: Any = torchvision_swin()
    path = tmp_path / layout
    if layout == "authors.pth":
        torch.save({"meta": {"epoch": 30}, "state_dict": authors_layout(published.state_dict())}, path)
    elif layout == "torchvision.pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    encoder = encoder_of("swin3d_small", "video", **SWIN)
    load_encoder_weights(encoder, "video", str(path))
    x = torch.randn(2, *input_shape("video", INPUTS))
    with torch.no_grad():
        expected = published.norm(published.features(published.patch_embed(x)))
        torch.testing.assert_close(encoder(x), expected.flatten(1, 3), atol=1e-5, rtol=1e-5)


def test_a_swin_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    state = torchvision_swin().state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "hole.pth")
    with pytest.raises(UserError, match=r"1 keys are missing \(norm.weight\)"):
        load_encoder_weights(encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "hole.pth"))


def test_deit_weights_fit_ast_and_answer_a_gray_image_alike(tmp_path: Path) -> None:
    torch.manual_seed(3)
    deit: Any = VisionTransformerDistilled(
        img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=7
    ).eval()
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    encoder = encoder_of("ast_t", "audio")
    load_encoder_weights(encoder, "audio", str(tmp_path / "deit.pth"))
    trunk: Any = encoder.trunk
    assert same(trunk.blocks, deit.blocks)
    assert torch.equal(trunk.pos_embed[:, :2], deit.pos_embed[:, :2])
    gray = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        ours = trunk.patch_embed(gray.expand(1, 4, 16, 16))
        theirs = deit.patch_embed.proj(gray.expand(1, 3, 16, 16)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


class PublishedStlt(nn.Module):
    """The box encoder of the paper's public code, on PyTorch's own transformer, with its key names."""

    def __init__(self, width: int, heads: int, spatial: int, temporal: int) -> None:
        super().__init__()

        def stack(num: int) -> nn.TransformerEncoder:
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
            return nn.TransformerEncoder(layer, num, enable_nested_tensor=False)

        boxes = nn.Module()
        boxes.category_embeddings = nn.Embedding(4, width, padding_idx=0)
        boxes.box_embedding, boxes.score_embeddings = nn.Linear(4, width), nn.Linear(1, width)
        boxes.layer_norm = nn.LayerNorm(width, eps=1e-12)
        layout = nn.Module()
        layout.category_box_embeddings, layout.transformer = boxes, stack(spatial)
        layout.encoder_layer = nn.TransformerEncoderLayer(width, heads, 4 * width)
        frames = nn.Module()
        frames.layout_embedding = layout
        frames.position_embeddings = nn.Embedding(256, width)
        frames.frame_type_embedding = nn.Embedding(5, width, padding_idx=0)
        frames.layer_norm = nn.LayerNorm(width, eps=1e-12)
        frames.register_buffer("position_ids", torch.arange(256)[None])
        self.frames_embeddings, self.transformer = frames, stack(temporal)

    def forward(self, boxes: Tensor, frame_types: Tensor) -> Tensor:
        frames: Any = self.frames_embeddings
        embed: Any = frames.layout_embedding.category_box_embeddings
        categories = boxes[..., 4].long()
        h = embed.category_embeddings(categories) + embed.box_embedding(boxes[..., :4])
        h = embed.layer_norm(h + embed.score_embeddings(boxes[..., 5:]))
        h = frames.layout_embedding.transformer(
            h.flatten(0, 1), src_key_padding_mask=categories.flatten(0, 1) == 0
        )[:, 0].unflatten(0, boxes.shape[:2])
        num = h.shape[1]
        h = frames.layer_norm(h + frames.position_embeddings.weight[:num] + frames.frame_type_embedding(frame_types))
        out: Tensor = self.transformer(h, mask=torch.ones(num, num, dtype=torch.bool).triu(1))
        return out


@pytest.mark.parametrize("prefix", ["", "stlt_backbone."])
def test_published_stlt_weights_load_and_give_equal_tokens(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(4)
    published = PublishedStlt(24, 2, 2, 2).eval()
    state = {prefix + key: tensor for key, tensor in published.state_dict().items()}
    torch.save({**state, "prediction_head.fc1.weight": torch.zeros(2, 2)}, tmp_path / "stlt.pt")
    encoder = encoder_of("stlt", "detections", width=24, heads=2, spatial_layers=2, temporal_layers=2)
    load_encoder_weights(encoder, "detections", str(tmp_path / "stlt.pt"))
    x = torch.rand(2, *input_shape("detections", INPUTS))
    x[..., 4] = torch.tensor([1.0, 2.0, 0.0])
    x[0, 1, :, 4] = 0
    whole = torch.zeros(2, 5, 4, 6)
    whole[:, :4, 1:] = x
    whole[:, :, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0, 1.0])
    types = torch.tensor([[2, 3, 2, 2, 4], [2, 2, 2, 2, 4]])
    torch.testing.assert_close(encoder(x), published(whole, types), atol=1e-5, rtol=1e-5)
