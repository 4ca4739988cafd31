"""Starting weights in the layouts of others: whoever published them, the tokens are those of their own model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from karmma_dist.errors import UserError
from karmma_dist.models.encoder import Encoder
from karmma_dist.models.layout import build_encoder, input_shape
from karmma_dist.models.starting_weights import load_encoder_weights
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
        assert torch.equal(encoder(x), expected.flatten(1, 3))


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
