"""AST-T: an Audio Spectrogram Transformer (arXiv 2104.01778) on DeiT-tiny's distilled trunk.

The windows of a clip are the input channels of one spectrogram, cut into overlapping patches of 16 x 16 with stride
10. With 32 windows of 128 mels x 224 steps: 12 x 21 patches, 253 tokens, 6.96 M parameters, 4.084 GFLOPs.

Legend: N clips, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Settings

_PATCH, _STRIDE = 16, 10
_WIDTH, _DEPTH, _HEADS = 192, 12, 3
_NUM_PREFIX = 2
"""The class and the distillation token, before the patches."""


class AstOptions(Settings):
    """ast_t takes no options."""


class OverlappingPatches(nn.Module):
    """Patches of 16 x 16 every 10 rows and columns, projected; it replaces timm's patch embedding.

    Args:
        img_size: Mels and steps, each at least 16.
        patch_size: 16.
        in_chans: Number of windows.
        embed_dim: D.
        bias: True if the projection has a bias.
        _unused: Further arguments that some versions of timm pass to their patch embedding, all at default values.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        **_unused: object,
    ) -> None:
        super().__init__()
        self.grid_size = tuple((size - patch_size) // _STRIDE + 1 for size in img_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=_STRIDE, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project (N, windows, mels, steps) to (N, patches, D), row by row."""
        out: Tensor = self.proj(x)
        return out.flatten(2).transpose(1, 2)


class AudioSpectrogramTransformer(Encoder):
    """AST: (N, windows, mels, steps) -> the mean of class and distillation token, then one token per patch.

    Args:
        num_windows: Input channels.
        num_mels: Mel bands, at least 16.
        num_steps: Spectrogram columns, at least 16.

    Raises:
        UserError: the spectrogram is smaller than a patch.
    """

    def __init__(self, num_windows: int, num_mels: int, num_steps: int) -> None:
        super().__init__()
        if min(num_mels, num_steps) < _PATCH:
            raise UserError(
                f"ast_t cuts {_PATCH} x {_PATCH} patches: a spectrogram of {num_mels} mels x {num_steps} steps is too "
                "small; enlarge inputs.audio"
            )
        from karmma_dist.models.encoders.ast_trunk import Trunk

        self.trunk = Trunk(
            img_size=(num_mels, num_steps),
            patch_size=_PATCH,
            in_chans=num_windows,
            num_classes=0,
            embed_dim=_WIDTH,
            depth=_DEPTH,
            num_heads=_HEADS,
            embed_layer=OverlappingPatches,
        )
        self.width = _WIDTH
        self.num_tokens = 1 + self.trunk.patch_embed.num_patches

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, windows, mels, steps) to (N, T, D)."""
        tokens: Tensor = self.trunk(x)  # (N, 2 + patches, D)
        prefix, patches = tokens.split([_NUM_PREFIX, tokens.shape[1] - _NUM_PREFIX], dim=1)
        return torch.cat([prefix.mean(dim=1, keepdim=True), patches], dim=1)

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block, and recompute its activations in the backward pass."""
        self.trunk.recompute = True

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapt DeiT-tiny-distilled, as timm publishes it, like AST does (its Sec. 2.2).

        The patch kernel is averaged over the colours and shared by all windows, and the position embedding is resized
        to the patch grid.
        """
        kept = {
            key if key.startswith("trunk.") else f"trunk.{key}": tensor
            for key, tensor in state.items()
            if not key.startswith("head")
        }
        kernel, positions = "trunk.patch_embed.proj.weight", "trunk.pos_embed"
        if kernel in kept and kept[kernel].ndim == 4:
            num_windows = self.trunk.patch_embed.proj.in_channels
            # Divided by the number of windows, so that all windows together act like one gray image.
            mean = kept[kernel].mean(dim=1, keepdim=True)
            kept[kernel] = mean.expand(-1, num_windows, -1, -1) * (kept[kernel].shape[1] / num_windows)
        if positions in kept and kept[positions].ndim == 3:
            kept[positions] = _resize_positions(kept[positions], self.trunk.patch_embed.grid_size)
        return kept


def _resize_positions(positions_1TD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate the patches' part of a square position embedding to another grid; the prefix is unchanged."""
    prefix, patches = positions_1TD[:, :_NUM_PREFIX], positions_1TD[:, _NUM_PREFIX:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        return positions_1TD  # not from a square image: loading refuses its shape and names the expected one
    square = patches.transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1)


def _build(modality: str, inputs: InputRecipe, _options: AstOptions) -> Encoder:
    spectrograms = inputs.section(modality)
    return AudioSpectrogramTransformer(spectrograms.num_windows, spectrograms.num_mels, spectrograms.num_steps)


AST_T = EncoderType(AstOptions, ("spectrograms",), _build)
