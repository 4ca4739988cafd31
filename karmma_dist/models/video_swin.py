"""Video Swin Transformer (arXiv 2106.13230) on video, on flow, and on spectrogram windows taken as frames.

Patches of 2 x 4 x 4, windows of 8 x 7 x 7, feed-forward ratio 4. The module's own keys are those of
`torchvision.models.video.swin3d_*` without the head; checkpoints of torchvision and of the Video Swin authors load.

Legend: N clips, F frames, T tokens, D width.
"""

from __future__ import annotations

import re
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from karmma_dist.models.encoder import Encoder, EncoderType
from karmma_dist.recipe import InputRecipe, Positive
from karmma_dist.settings import Settings

_PATCH = (2, 4, 4)
_WINDOW = (8, 7, 7)


class SwinOptions(Settings):
    """Options of swin3d_small; swin3d_t and swin3d_b fix the sizes."""

    width: Positive = 48
    """Channels of the first stage; each later stage has twice those of the one before."""
    depths: list[Positive] = [1, 1, 2]
    """Blocks per stage."""
    heads: list[Positive] = [3, 6, 12]
    """Attention heads per stage."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that training skips the last block for a clip; earlier blocks less, in proportion."""

    @model_validator(mode="after")
    def _fits(self) -> SwinOptions:
        if len(self.depths) != len(self.heads) or sum(self.depths) < 2:
            raise ValueError(f"depths {self.depths} and heads {self.heads}: one of each per stage, two blocks in all")
        for stage, heads in enumerate(self.heads):
            if (self.width * 2**stage) % heads:
                raise ValueError(f"stage {stage + 1}: width {self.width * 2**stage} is not a multiple of {heads} heads")
        return self


class PublishedSwinOptions(Settings):
    """Options of swin3d_t and swin3d_b."""

    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that training skips the last block for a clip; earlier blocks less, in proportion."""


class VideoSwin(Encoder):
    """The backbone up to its final norm; tokens are ordered by time, then row, then column.

    Args:
        options: Sizes.
        num_frames: F.
        side: Height and width of the frames. Spectrogram windows are resized to it.
    """

    def __init__(self, options: SwinOptions, num_frames: int, side: int) -> None:
        super().__init__()
        trunk = SwinTransformer3d(
            patch_size=list(_PATCH),
            embed_dim=options.width,
            depths=options.depths,
            num_heads=options.heads,
            window_size=list(_WINDOW),
            stochastic_depth_prob=options.drop_path,
            num_classes=1,
        )
        self.side = side
        self.width = trunk.num_features
        self.num_tokens = _num_tokens(num_frames, side, num_stages=len(options.depths))
        self.patch_embed, self.features, self.norm = trunk.patch_embed, trunk.features, trunk.norm
        for module in self.modules():
            if isinstance(module, ShiftedWindowAttention3d):
                # A constant of the window size, 1.2 MB in every block: not worth a place in checkpoints.
                index = module.relative_position_index
                module.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, F, H, W) frames, or (N, F, mels, steps) spectrogram windows -> (N, T, D)."""
        if x.ndim == 4:
            x = self._as_frames(x)
        tokens: Tensor = self.norm(self.features(self.patch_embed(x)))  # (N, F / 2, H / 32, W / 32, D)
        return tokens.flatten(1, 3)

    def _as_frames(self, windows: Tensor) -> Tensor:
        """Resize each window to a square frame of three equal channels [paper]."""
        frames = F.interpolate(windows, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return frames[:, None].expand(-1, 3, -1, -1, -1)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Torchvision's keys, or those of the Video Swin authors' checkpoints (`backbone.layers.0.blocks.0...`)."""
        renamed = {_torchvision_key(key): tensor for key, tensor in state.items()}
        return {key: tensor for key, tensor in renamed.items() if not _is_dropped(key)}


def _num_tokens(num_frames: int, side: int, num_stages: int) -> int:
    """32 frames of 224 x 224 in four stages: 16 x 7 x 7 = 784. Uneven sizes are padded, so divisions round up."""
    steps, cells = -(-num_frames // _PATCH[0]), -(-side // _PATCH[1])
    for _ in range(num_stages - 1):
        cells = -(-cells // 2)
    return steps * cells * cells


def _torchvision_key(key: str) -> str:
    key = key.removeprefix("backbone.")
    if not key.startswith("layers."):
        return key
    key = re.sub(r"^layers\.(\d+)\.blocks\.", lambda found: f"features.{2 * int(found[1])}.", key)
    key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"features.{2 * int(found[1]) + 1}.", key)
    return key.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")


def _is_dropped(key: str) -> bool:
    return key.startswith(("head.", "cls_head.")) or key.endswith("relative_position_index")


def _build(modality: str, inputs: InputRecipe, options: SwinOptions) -> Encoder:
    num_frames = inputs.audio.num_windows if modality == "audio" else inputs.video.num_frames
    return VideoSwin(options, num_frames, inputs.video.crop)


def _published(width: int, depths: list[int], heads: list[int]) -> EncoderType:
    def build(modality: str, inputs: InputRecipe, options: PublishedSwinOptions) -> Encoder:
        return _build(modality, inputs, SwinOptions(width=width, depths=depths, heads=heads, **options.model_dump()))

    return EncoderType(PublishedSwinOptions, _MODALITIES, build)


_MODALITIES = ("video", "flow", "audio")

SWIN3D_T = _published(96, [2, 2, 6, 2], [3, 6, 12, 24])
SWIN3D_B = _published(128, [2, 2, 18, 2], [4, 8, 16, 32])
SWIN3D_SMALL = EncoderType(SwinOptions, _MODALITIES, _build)
