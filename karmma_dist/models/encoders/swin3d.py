"""Video Swin Transformer (arXiv 2106.13230) for video, flow, and spectrogram windows as frames.

Patches of 2 x 4 x 4, windows of 8 x 7 x 7, feed-forward ratio 4. The module's keys are those of
`torchvision.models.video.swin3d_*` without the head; checkpoints of torchvision and of the Video Swin authors load.

Legend: N clips, F frames, P tokens of a stage, T output tokens, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karmma_dist.modalities import MODALITIES
from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.transformer import INIT_STD
from karmma_dist.models.encoders.window_attention import (
    Arrangement,
    Rearrangement,
    Size,
    WindowAttention,
    WindowOrder,
    home_positions,
)
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Positive, Settings

_PATCH = (2, 4, 4)
_WINDOW = (8, 7, 7)


class SwinOptions(Settings):
    """Options of swin3d_small; swin3d_t and swin3d_b fix the sizes."""

    width: Positive = 48
    """Channels of the first stage; each later stage has twice as many as the previous one."""
    depths: list[Positive] = [1, 1, 2]
    """Blocks per stage."""
    heads: list[Positive] = [3, 6, 12]
    """Attention heads per stage."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability that training skips the last block for a clip; it decreases linearly to 0 at the first block."""

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
    """Probability that training skips the last block for a clip; it decreases linearly to 0 at the first block."""


class PatchProjection(nn.Conv3d):
    """A convolution with non-overlapping kernels, computed as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """Project (N, 3, F, H, W), padded with zeros to full patches, to (N, P, D), by time, row, column."""
        edges = [(0, -size % patch) for size, patch in zip(x.shape[:1:-1], _PATCH[::-1], strict=True)]
        x = F.pad(x, [edge for pair in edges for edge in pair])
        for axis in (4, 3, 2):
            x = x.unflatten(axis, (-1, _PATCH[axis - 2]))
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # (N, P, 3 * 2 * 4 * 4)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbedding(nn.Module):
    """Projection and norm of patches, with tokens in the order of the first stage's windows.

    Args:
        width: D.
        grid: Patches along time, rows and columns.
    """

    def __init__(self, width: int, grid: Size) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, kernel_size=_PATCH, stride=_PATCH)
        self.norm = nn.LayerNorm(width)
        self.order = Rearrangement(np.argsort(home_positions(grid, _WINDOW)[:-1]), math.prod(grid))

    def forward(self, x: Tensor) -> Tensor:
        """Embed (N, 3, F, H, W) as (N, P, D)."""
        embedded: Tensor = self.norm(self.order(self.proj(x)))
        return embedded


class SwinBlock(nn.Module):
    """Window attention and a two-layer GELU network; training skips either of them for some clips.

    Args:
        width: D.
        num_heads: Number of attention heads.
        drop_path: Probability that one of the two is skipped for a clip.
    """

    def __init__(self, width: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, _WINDOW)
        self.norm2 = nn.LayerNorm(width)
        # The second linear is number 3 in published checkpoints: a dropout of probability 0 is number 2.
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x_NPD: Tensor, windows: Arrangement) -> Tensor:
        """Return (N, P, D)."""
        x = x_NPD + self._skip(self.attn(self.norm1(x_NPD), windows))
        return x + self._skip(self.mlp(self.norm2(x)))

    def _skip(self, added_NPD: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return added_NPD
        kept_N11 = added_NPD.new_empty(len(added_NPD), 1, 1).bernoulli_(1 - self.drop_path).div_(1 - self.drop_path)
        return added_NPD * kept_N11


class Stage(nn.ModuleList):
    """The blocks of one resolution; every second block shifts its windows.

    Args:
        blocks: The blocks, whose names in a checkpoint are their numbers.
    """

    recompute = False
    """True if activations inside blocks are recomputed in the backward pass instead of kept."""

    def __init__(self, blocks: Iterable[SwinBlock]) -> None:
        super().__init__(blocks)

    def forward(self, x_NPD: Tensor, orders: Sequence[WindowOrder]) -> Tensor:
        """Return (N, P, D); `orders` are the orders of plain and of shifted windows."""
        arrangements = [order(x_NPD) for order in orders[: len(self)]]
        x = x_NPD
        for number, block in enumerate(self):
            windows = arrangements[number % 2]
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, windows, use_reentrant=False)
            else:
                x = block(x, windows)
        return x


class PatchMerging(nn.Module):
    """The merging of two by two neighbours to one token of twice the width, in the order of the next stage's windows.

    Args:
        width: D of the input tokens.
        grid: Input tokens along time, rows and columns; odd rows and columns are padded with zeros.
    """

    def __init__(self, width: int, grid: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        tokens = home_positions(grid, _WINDOW)[:-1].reshape(grid)
        tokens = np.pad(tokens, [(0, 0), (0, grid[1] % 2), (0, grid[2] % 2)], constant_values=-1)
        # Torchvision's and the authors' order: upper left, lower left, upper right, lower right.
        corners = [tokens[:, row::2, column::2].flatten() for column in (0, 1) for row in (0, 1)]
        order = np.argsort(home_positions(_merged(grid), _WINDOW)[:-1])
        self.neighbours = Rearrangement(np.stack(corners, axis=-1)[order].flatten(), math.prod(grid))

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Merge (N, P, D) to (N, about P / 4, 2 * D)."""
        merged: Tensor = self.reduction(self.norm(self.neighbours(x_NPD).view(len(x_NPD), -1, 4 * x_NPD.shape[-1])))
        return merged


class VideoSwin(Encoder):
    """The backbone up to its final norm; tokens are ordered by time, then row, then column.

    Inputs are frames of video or flow (N, 3, F, side, side), or spectrogram windows (N, F, mels, steps).

    Args:
        options: Sizes.
        num_frames: F.
        side: Height and width of the frames. Spectrogram windows are resized to it.
    """

    def __init__(self, options: SwinOptions, num_frames: int, side: int) -> None:
        super().__init__()
        self.num_frames, self.side = num_frames, side
        grid = (-(-num_frames // _PATCH[0]), -(-side // _PATCH[1]), -(-side // _PATCH[2]))
        width, last = options.width, len(options.depths) - 1
        self.patch_embed = PatchEmbedding(width, grid)
        drop_paths = iter(np.linspace(0, options.drop_path, sum(options.depths)).tolist())
        self.features = nn.ModuleList()
        self.orders = nn.ModuleList()
        for number, (depth, heads) in enumerate(zip(options.depths, options.heads, strict=True)):
            self.features.append(Stage(SwinBlock(width, heads, next(drop_paths)) for _ in range(depth)))
            self.orders.append(nn.ModuleList(WindowOrder(grid, _WINDOW, shifted) for shifted in (False, True)))
            if number < last:
                self.features.append(PatchMerging(width, grid))
                grid, width = _merged(grid), 2 * width
        self.norm = nn.LayerNorm(width)
        self.last_order = Rearrangement(home_positions(grid, _WINDOW)[:-1], math.prod(grid))
        self.width, self.num_tokens = width, math.prod(grid)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Encode frames (N, 3, F, side, side), or spectrogram windows (N, F, mels, steps), to (N, T, D).

        Raises:
            ValueError: the frames do not have the size for which the encoder was built.
        """
        if x.ndim == 4:
            x = self._as_frames(x)
        expected = (3, self.num_frames, self.side, self.side)
        if x.shape[1:] != expected:
            raise ValueError(f"a clip's frames are {tuple(x.shape[1:])}, expected {expected}")
        tokens = self.patch_embed(x)
        for number, layer in enumerate(self.features):
            tokens = layer(tokens) if number % 2 else layer(tokens, self.orders[number // 2])
        normed: Tensor = self.norm(self.last_order(tokens))
        return normed

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block, and recompute its activations in the backward pass."""
        for layer in self.features:
            if isinstance(layer, Stage):
                layer.recompute = True

    def _as_frames(self, windows: Tensor) -> Tensor:
        """Resize each window to a square frame of three equal channels [paper]."""
        frames = F.interpolate(windows, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return frames[:, None].expand(-1, 3, -1, -1, -1)

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accept torchvision's keys, or rename those of the Video Swin authors (`backbone.layers.0.blocks.0...`)."""
        renamed = {_torchvision_key(key): tensor for key, tensor in state.items()}
        return {key: tensor for key, tensor in renamed.items() if not _is_dropped(key)}


def _merged(grid: Size) -> Size:
    return grid[0], -(-grid[1] // 2), -(-grid[2] // 2)


def _torchvision_key(key: str) -> str:
    key = key.removeprefix("backbone.")
    if not key.startswith("layers."):
        return key
    key = re.sub(r"^layers\.(\d+)\.blocks\.", lambda match: f"features.{2 * int(match[1])}.", key)
    key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"features.{2 * int(match[1]) + 1}.", key)
    return key.replace(".mlp.fc1.", ".mlp.0.").replace(".mlp.fc2.", ".mlp.3.")


def _is_dropped(key: str) -> bool:
    return key.startswith(("head.", "cls_head.")) or key.endswith("relative_position_index")


def _build(modality: str, inputs: InputRecipe, options: SwinOptions) -> Encoder:
    section = inputs.section(modality)
    num_frames = section.num_windows if MODALITIES[modality].array == "spectrograms" else section.num_frames
    return VideoSwin(options, num_frames, inputs.video.crop)


def _published(width: int, depths: list[int], heads: list[int]) -> EncoderType:
    def build(modality: str, inputs: InputRecipe, options: PublishedSwinOptions) -> Encoder:
        return _build(modality, inputs, SwinOptions(width=width, depths=depths, heads=heads, **options.model_dump()))

    return EncoderType(PublishedSwinOptions, _ARRAYS, build)


_ARRAYS = ("frames", "spectrograms")

SWIN3D_T = _published(96, [2, 2, 6, 2], [3, 6, 12, 24])
SWIN3D_B = _published(128, [2, 2, 18, 2], [4, 8, 16, 32])
SWIN3D_SMALL = EncoderType(SwinOptions, _ARRAYS, _build)
