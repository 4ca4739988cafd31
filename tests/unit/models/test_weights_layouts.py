"""Tests of published starting weights in other layouts: the tokens equal those of the published model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d, swin3d_t

from karmma_dist.errors import UserError
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import build_encoder, input_shape
from karmma_dist.models.weights import check_published, load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "crop": 32, "short_side": 32},
        "audio": {"num_windows": 4, "window_s": 0.3, "num_mels": 36},
        "detections": {"num_frames": 4, "max_boxes": 3},
    }
)
SWIN: dict[str, Any] = {"width": 12, "depths": [1, 2], "heads": [2, 4]}


def encoder_of(name: str, modality: str, seed: int = 0, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    return build_encoder(modality, EncoderRecipe(name=name, options=options), INPUTS).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def torchvision_swin(width: int = 12, depths: tuple[int, ...] = (1, 2), heads: tuple[int, ...] = (2, 4)) -> Any:
    torch.manual_seed(3)
    return SwinTransformer3d([2, 4, 4], width, list(depths), list(heads), [8, 7, 7], num_classes=5).eval()


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


def swin_tokens(published: Any, x: Tensor) -> Tensor:
    """What torchvision's own forward pass has before its pooling."""
    tokens: Tensor = published.norm(published.features(published.patch_embed(x)))
    return tokens.flatten(1, 3)


def assert_swin_tokens_are_equal(path: Path, published: Any, **options: Any) -> None:
    encoder = encoder_of(options.pop("name", "swin3d_small"), "video", **options)
    load_encoder_weights(encoder, "video", str(path))
    x = torch.randn(2, *input_shape("video", INPUTS))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), swin_tokens(published, x), atol=1e-5, rtol=1e-5)


def biased_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The relative position biases start small: grown, a wrong one shows."""
    return {key: 20 * value if key.endswith("bias_table") else value for key, value in state.items()}


@pytest.mark.parametrize("layout", ["torchvision.pth", "torchvision.safetensors", "authors.pth"])
@pytest.mark.parametrize(
    ("width", "depths", "heads"),
    [(12, (1, 2), (2, 4)), (6, (2, 1, 3), (1, 2, 3)), (4, (1, 1, 2, 1), (1, 2, 4, 8)), (16, (2,), (4,))],
)
def test_published_swin_checkpoints_load_and_give_equal_tokens(
    tmp_path: Path, layout: str, width: int, depths: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    published = torchvision_swin(width, depths, heads)
    published.load_state_dict(biased_tables(published.state_dict()))
    path = tmp_path / layout
    if layout == "authors.pth":
        torch.save({"meta": {"epoch": 30}, "state_dict": authors_layout(published.state_dict())}, path)
    elif layout == "torchvision.pth":
        torch.save(published.state_dict(), path)
    else:
        save_file(published.state_dict(), path)
    assert_swin_tokens_are_equal(path, published, width=width, depths=list(depths), heads=list(heads))


def test_torchvisions_own_swin3d_t_fits_ours_key_by_key(tmp_path: Path) -> None:
    published: Any = swin3d_t()
    torch.save(authors_layout(published.state_dict()), tmp_path / "tiny.pth")
    encoder = encoder_of("swin3d_t", "video")
    load_encoder_weights(encoder, "video", str(tmp_path / "tiny.pth"))
    theirs = published.state_dict()
    ours = encoder.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert {key for key in theirs if key not in ours and not key.endswith("relative_position_index")} == {
        "head.weight", "head.bias",
    }  # fmt: skip


def wrapped(state: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """A training script's checkpoint around the weights."""
    junk = {"epoch": 30, "name": "swin", "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}}
    return {
        "meta, optimizer": {"meta": {"config": "x = 1", "time": 0.5}, **junk, "state_dict": state},
        "model": {"model": state, **junk},
        "nested": {"state_dict": {"model": state}, "best": None},
        "DistributedDataParallel": {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        "compiled under DDP": {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        "junk between": {**state, "version": "1.0", "steps": 7, "history": [0.1, 0.2]},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["meta, optimizer", "model", "nested", "DistributedDataParallel", "compiled under DDP", "junk between"]
)
def test_wrappers_of_training_scripts_are_removed(tmp_path: Path, kind: str) -> None:
    published = torchvision_swin()
    torch.save(wrapped(authors_layout(published.state_dict()), kind), tmp_path / "wrapped.pth")
    assert_swin_tokens_are_equal(tmp_path / "wrapped.pth", published, **SWIN)


def test_a_swin_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    state = torchvision_swin().state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "hole.pth")
    with pytest.raises(UserError, match=r"1 keys are missing \(norm.weight\)"):
        load_encoder_weights(encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "hole.pth"))


def test_deit_weights_fit_ast_and_agree_on_gray_images(tmp_path: Path) -> None:
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


def test_ast_on_deits_patches_equals_deit(tmp_path: Path) -> None:
    """With DeiT's stride and image and one gray window, nothing is resized and the two models are one."""
    torch.manual_seed(3)
    deit: Any = VisionTransformerDistilled(
        img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=7
    ).eval()
    save_file(deit.state_dict(), tmp_path / "deit.safetensors")
    audio = {"num_windows": 1, "window_s": 0.125, "num_mels": 26}
    inputs = InputRecipe.model_validate({"audio": audio})
    assert input_shape("audio", inputs) == (1, 26, 26)  # two overlapping patches each way, as DeiT has of 32 pixels
    encoder = build_encoder("audio", EncoderRecipe(name="ast_t"), inputs).eval()
    load_encoder_weights(encoder, "audio", str(tmp_path / "deit.safetensors"))
    picture = torch.randn(2, 1, 26, 26)
    tiles = picture.unfold(2, 16, 10).unfold(3, 16, 10)  # (2, 1, 2, 2, 16, 16)
    apart = tiles.permute(0, 1, 2, 4, 3, 5).reshape(2, 1, 32, 32)  # the same patches side by side
    with torch.no_grad():
        theirs = deit.forward_features(apart.expand(-1, 3, -1, -1))
        expected = torch.cat([theirs[:, :2].mean(dim=1, keepdim=True), theirs[:, 2:]], dim=1)
        torch.testing.assert_close(encoder(picture), expected, atol=1e-4, rtol=1e-4)


class PublishedStlt(nn.Module):
    """The box encoder of the paper's public code, on PyTorch's own transformer, with its key names."""

    def __init__(self, width: int, heads: int, spatial: int, temporal: int, categories: int = 4) -> None:
        super().__init__()

        def stack(num: int) -> nn.TransformerEncoder:
            layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
            return nn.TransformerEncoder(layer, num, enable_nested_tensor=False)

        boxes = nn.Module()
        boxes.category_embeddings = nn.Embedding(categories, width, padding_idx=0)
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


def published_stlt_file(path: Path, published: PublishedStlt, prefix: str = "") -> Path:
    state = {prefix + key: tensor for key, tensor in published.state_dict().items()}
    torch.save({**state, "prediction_head.fc1.weight": torch.zeros(2, 2)}, path)
    return path


def assert_stlt_tokens_are_equal(encoder: Encoder, published: PublishedStlt) -> None:
    x = torch.rand(2, *input_shape("detections", INPUTS))
    x[..., 4] = torch.tensor([1.0, 2.0, 0.0])
    x[0, 1, :, 4] = 0
    whole = torch.zeros(2, 5, 4, 6)
    whole[:, :4, 1:] = x
    whole[:, :, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0, 1.0])
    types = torch.tensor([[2, 3, 2, 2, 4], [2, 2, 2, 2, 4]])
    torch.testing.assert_close(encoder(x), published(whole, types), atol=1e-5, rtol=1e-5)


STLT = {"width": 24, "heads": 2, "spatial_layers": 2, "temporal_layers": 3}


@pytest.mark.parametrize("prefix", ["", "backbone.", "stlt_backbone."])
def test_published_stlt_weights_load_and_give_equal_tokens(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(4)
    published = PublishedStlt(24, 2, 2, 3).eval()
    encoder = encoder_of("stlt", "detections", **STLT)
    load_encoder_weights(encoder, "detections", str(published_stlt_file(tmp_path / "stlt.pt", published, prefix)))
    assert_stlt_tokens_are_equal(encoder, published)


def test_action_genomes_rows_move_to_rows_of_equal_meaning(tmp_path: Path) -> None:
    """Every row carries its own number: pad 0, cls 1, objects 2 to 36, person 37; pad, regular, extract, empty."""
    torch.manual_seed(4)
    published = PublishedStlt(24, 2, 2, 3, categories=38).eval()
    layout: Any = published.frames_embeddings
    marked = torch.arange(38.0)[:, None].expand(-1, 24).clone()
    boxes = layout.layout_embedding.category_box_embeddings
    boxes.category_embeddings = nn.Embedding.from_pretrained(marked, padding_idx=0)
    layout.frame_type_embedding = nn.Embedding.from_pretrained(marked[:4].clone(), padding_idx=0)
    path = published_stlt_file(tmp_path / "action_genome.pt", published, "backbone.")
    encoder: Any = encoder_of("stlt", "detections", **STLT)
    start = encoder.frame_type.weight[1].clone()
    said: list[str] = []
    load_encoder_weights(encoder, "detections", str(path), log=said.append)
    # pad, hand, object (mean of 2 to 36), whole frame
    assert encoder.category.weight[:, 0].tolist() == pytest.approx([0, 37, 19, 1])
    assert encoder.frame_type.weight[[0, 2, 3, 4], 0].tolist() == [0, 1, 3, 2]  # pad, regular, empty, extract
    assert torch.equal(encoder.frame_type.weight[1], start)
    assert len(said) == 1
    assert "person" in said[0]
    boxes.category_embeddings = encoder.category
    layout.frame_type_embedding = encoder.frame_type
    assert_stlt_tokens_are_equal(encoder, published)  # ordinary frames are regular, the clip's token is extract


def test_tables_of_other_datasets_need_weights_ignore(tmp_path: Path) -> None:
    torch.manual_seed(4)
    published = PublishedStlt(24, 2, 2, 3, categories=7).eval()
    path = published_stlt_file(tmp_path / "other.pt", published, "backbone.")
    encoder = encoder_of("stlt", "detections", **STLT)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    message = r"category.weight is \(7, 24\), expected \(4, 24\): add keys that may start at random to weights_ignore"
    with pytest.raises(UserError, match=message):
        load_encoder_weights(encoder, "detections", str(path))
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    said: list[str] = []
    load_encoder_weights(encoder, "detections", str(path), ignore=["category.*"], log=said.append)
    assert [line.partition(": ")[2].partition(" (")[0] for line in said] == ["these start at random: category.weight"]
    ours: Any = encoder
    assert torch.equal(ours.category.weight, before["category.weight"])


def test_missing_public_weights_name_their_source_and_the_field() -> None:
    name, field = "swin_base_patch244_window877_kinetics400_1k.pth", "model.encoders.video.weights"
    with pytest.raises(UserError, match=rf"{field}.*{name} from .*--set {field}=null"):
        check_published(Path("weights") / name, field)
    check_published(Path("weights/mine.pth"), field)


def test_only_keys_that_match_a_pattern_may_differ(tmp_path: Path) -> None:
    state = torchvision_swin().state_dict()
    del state["norm.weight"]
    state["norm.scale"] = torch.zeros(3)
    state["patch_embed.proj.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "other.safetensors")

    def load(*ignore: str) -> list[str]:
        said: list[str] = []
        encoder = encoder_of("swin3d_small", "video", **SWIN)
        load_encoder_weights(
            encoder, "video", str(tmp_path / "other.safetensors"), ignore=ignore, log=lambda line: said.append(line)
        )
        return [line.partition(": ")[2] for line in said]

    with pytest.raises(UserError, match=r"1 keys are missing \(norm.weight\) and 1 keys are unknown \(norm.scale\)$"):
        load("patch_embed.*")
    with pytest.raises(UserError, match=r"1 keys are missing \(norm.weight\)$"):
        load("norm.s*", "patch_embed.*")
    with pytest.raises(UserError, match=r"patch_embed.proj.bias is \(5,\), expected \(12,\)"):
        load("norm.*")
    assert load("norm.*", "*.proj.bias", "stem.*", "head") == [
        "these start at random: norm.weight, patch_embed.proj.bias "
        "(1 are not in the file, 1 have another size there)",
        "in the file and not used: norm.scale",
        "no ignored key matches 'stem.*', 'head'",
    ]


def test_patterns_that_ignore_every_key_are_refused(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"weights_ignore \(\*\) leaves no key to load"):
        load_encoder_weights(
            encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "other.safetensors"), ignore=["*"]
        )


def test_all_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = torchvision_swin().state_dict()
    gone = [key for key in state if key.startswith("features.0.") and not key.endswith("index")]
    torch.save({key: tensor for key, tensor in state.items() if key not in gone}, tmp_path / "hole.pth")
    with pytest.raises(UserError) as caught:
        load_encoder_weights(encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "hole.pth"))
    assert len(gone) > 10
    assert all(key in str(caught.value) for key in gone)


class Trap:
    """Unpickled by anything that runs code, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    state = torchvision_swin().state_dict()
    torch.save({"state_dict": state, "meta": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"trap.pth: cannot be read as weights: .* \(.+\), and reading it can run"):
        load_encoder_weights(encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "trap.pth"))
    assert not (tmp_path / "sprung").exists()


def test_a_folder_gives_its_only_weights_file_safetensors_first(tmp_path: Path) -> None:
    published = torchvision_swin()
    torch.save({"other": torch.zeros(1)}, tmp_path / "model.pth")
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    assert_swin_tokens_are_equal(tmp_path, published, **SWIN)
    save_file(published.state_dict(), tmp_path / "second.safetensors")
    with pytest.raises(UserError, match=r"several weights files \(model.safetensors, second.safetensors\): name one"):
        assert_swin_tokens_are_equal(tmp_path, published, **SWIN)


def test_files_without_tensors_are_refused_with_what_they_hold(tmp_path: Path) -> None:
    contents = (({"epoch": 3, "parts": {}}, "it holds epoch, parts"), ([1, 2], "but a list"), ({}, "nothing"))
    for content, message in contents:
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=f"not a dictionary of tensors.* {message}"):
            load_encoder_weights(encoder_of("swin3d_small", "video", **SWIN), "video", str(tmp_path / "other.pth"))
