"""A video encoder for small crops whose motion matters, such as a speaker's mouth: it trains in seconds on a CPU.

One linear layer embeds each frame, standardised per clip, together with its change from the previous frame; then come
convolutions over time. Unlike small_video it is not translation-invariant in the picture, so it needs far fewer clips
if the camera does not move.

Legend: N clips, F frames, T tokens, D width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.small import standardise
from karmma_dist.models.encoders.transformer import INIT_STD
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Positive, Settings


class TemporalOptions(Settings):
    """Options of temporal_video."""

    width: Annotated[int, Field(gt=0, multiple_of=4)] = 96
    """Channels, and width of the tokens."""
    embedding: Annotated[int, Field(gt=0, multiple_of=4)] = 40
    """Length of a frame's embedding."""
    steps: Positive = 25
    """Largest number of time steps that become tokens."""
    norm: Literal["group", "instance"] = "group"
    """Norm over time: four groups of channels, or each channel by itself, which removes a clip's mean appearance."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Dropout between convolutions in training."""


class TemporalVideo(Encoder):
    """A linear embedding of each frame and convolutions over time: (N, 3, F, H, W) -> min(steps, F) tokens along time.

    Args:
        num_frames: F.
        crop: H and W.
        options: Sizes.
    """

    def __init__(self, num_frames: int, crop: int, options: TemporalOptions) -> None:
        super().__init__()
        self.width = options.width
        self.num_tokens = min(options.steps, num_frames)
        self.embed = nn.Linear(6 * crop * crop, options.embedding)
        self.embed_norm = _norm(options, options.embedding)
        channels = [options.embedding, *[options.width] * 3]
        self.blocks = nn.ModuleList(_block(before, after, options) for before, after in pairwise(channels))
        self.position_token = nn.Parameter(torch.empty(1, self.num_tokens, self.width))
        self.norm = nn.LayerNorm(self.width)
        nn.init.trunc_normal_(self.position_token, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, 3, F, H, W) to (N, T, D)."""
        change = F.pad(x.diff(dim=2), (0, 0, 0, 0, 1, 0))
        frames = torch.cat([standardise(x), standardise(change)], dim=1).transpose(1, 2).flatten(2)  # (N, F, 6 * H * W)
        h = self.embed_norm(self.embed(frames).transpose(1, 2))  # (N, E, F)
        h = self.blocks[0](h)
        h = F.adaptive_avg_pool1d(h, self.num_tokens)  # (N, D, T)
        for block in self.blocks[1:]:
            h = block(h)
        out: Tensor = self.norm(h.transpose(1, 2) + self.position_token)
        return out


def _block(before: int, after: int, options: TemporalOptions) -> nn.Sequential:
    convolution = nn.Conv1d(before, after, 5, padding=2)
    return nn.Sequential(convolution, _norm(options, after), nn.ReLU(), nn.Dropout(options.dropout))


def _norm(options: TemporalOptions, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(4 if options.norm == "group" else channels, channels)


def _temporal_video(modality: str, inputs: InputRecipe, options: TemporalOptions) -> Encoder:
    frames = inputs.section(modality)
    return TemporalVideo(frames.num_frames, frames.crop, options)


TEMPORAL_VIDEO = EncoderType(TemporalOptions, ("frames",), _temporal_video)
