"""Small convolutional encoders that train from scratch on a CPU: a few hundred clips in a minute or two.

Time is mixed by shifting a quarter of the channels one step forward and a quarter one step back before a 2D
convolution (temporal shift, arXiv 1811.08383): a shift costs one copy, while 3D convolutions are slow on a CPU.

Norms are per clip (group norm), so that a clip's tokens do not depend on the other clips of the batch.

Legend: N clips, F frames, C channels, T tokens, D width.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.models.encoders.transformer import INIT_STD
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Positive, Settings

_EPSILON = 1e-4
_GRID = 2
"""Rows and columns of the grid of places that remain after pooling a picture."""


class SmallOptions(Settings):
    """Options of small_video and small_audio."""

    width: Annotated[int, Field(gt=0, multiple_of=4)] = 24
    """Channels of the first stage; the second has twice, the third four times as many. Tokens are as wide as the
    third."""
    blocks: Positive = 1
    """Residual blocks per stage."""
    steps: Positive = 8
    """Largest number of time steps that become tokens; more steps resolve finer moments."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on tokens in training: a few hundred clips are soon memorised."""


class _Block(nn.Module):
    """A residual block `x + conv(gelu(norm(x)))` that first shifts channels in time if clips have several frames."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, num_frames: int = 1) -> Tensor:
        h = F.gelu(self.norm(x))
        if num_frames > 1:
            h = shift_in_time(h, num_frames)
        out: Tensor = x + self.conv(h)
        return out


class _Trunk(nn.Module):
    """Three stages at strides 4, 8 and 16; the residual stream is never normalised, so magnitudes are preserved."""

    def __init__(self, in_channels: int, options: SmallOptions) -> None:
        super().__init__()
        widths = [options.width, 2 * options.width, 4 * options.width]
        self.entries = nn.ModuleList(
            [
                nn.Conv2d(in_channels, widths[0], 5, stride=4, padding=2),
                nn.Conv2d(widths[0], widths[1], 3, stride=2, padding=1),
                nn.Conv2d(widths[1], widths[2], 3, stride=2, padding=1),
            ]
        )
        self.stages = nn.ModuleList(nn.ModuleList(_Block(width) for _ in range(options.blocks)) for width in widths)

    def forward(self, x: Tensor, num_frames: int = 1) -> Tensor:
        """Map (N * F, C, H, W) to (N * F, 4 * width, about H / 16, about W / 16)."""
        for entry, stage in zip(self.entries, self.stages, strict=True):
            x = entry(x)
            for block in stage:  # type: ignore[attr-defined]
                x = block(x, num_frames)
        return x


def shift_in_time(x: Tensor, num_frames: int) -> Tensor:
    """Shift the first quarter of the channels one frame forward and the second quarter one frame back.

    Args:
        x: (N * num_frames, C, H, W), with the frames of a clip next to each other.
        num_frames: F.

    Returns:
        The same shape, with zeros at a clip's ends.
    """
    quarter = x.shape[1] // 4
    clips = x.unflatten(0, (-1, num_frames))  # (N, F, C, H, W)
    earlier, later, rest = clips.split([quarter, quarter, x.shape[1] - 2 * quarter], dim=2)
    earlier = F.pad(earlier[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    later = F.pad(later[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.cat([earlier, later, rest], dim=2).flatten(0, 1)


def standardise(x: Tensor) -> Tensor:
    """Give each channel of each clip mean 0 and variance 1 over frames and pixels: (N, C, F, H, W) -> the same.

    Neighbouring frames differ only a little, and flow is mostly near zero: without scaling, motion is learnt late.
    """
    # One group per channel takes one pass; var_mean over three axes takes a CPU ten times as long.
    return F.group_norm(x, x.shape[1], eps=_EPSILON)


class SmallVideo(Encoder):
    """2D convolutions on frames and their neighbours: (N, 3, F, H, W) -> min(steps, F) tokens along time.

    A token combines a 2 x 2 grid of places, so that it encodes the relative motion of parts of the picture.

    Args:
        num_frames: F.
        options: Sizes.
    """

    def __init__(self, num_frames: int, options: SmallOptions) -> None:
        super().__init__()
        self.width = 4 * options.width
        self.num_tokens = min(options.steps, num_frames)
        self.trunk = _Trunk(9, options)
        self.mix_places = nn.Linear(self.width * _GRID * _GRID, self.width)
        self.mix_moments = nn.Conv1d(self.width, self.width, 5, padding=2)
        self.position_token = nn.Parameter(torch.empty(1, self.num_tokens, self.width))
        self.norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(options.dropout)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, 3, F, H, W) to (N, T, D)."""
        num_frames = x.shape[2]
        motion = F.pad(x.diff(dim=2), (0, 0, 0, 0, 1, 1))  # (N, 3, F + 1, H, W), zeros at the ends
        motion = standardise(motion)
        around = torch.cat([standardise(x), motion[:, :, :-1], motion[:, :, 1:]], dim=1)  # (N, 9, F, H, W)
        h = self.trunk(around.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last), num_frames)
        h = F.adaptive_avg_pool2d(F.gelu(h), _GRID).flatten(1)  # (N * F, D * 4)
        h = self.mix_places(h).unflatten(0, (-1, num_frames)).transpose(1, 2)  # (N, D, F)
        h = h + self.mix_moments(F.gelu(h))
        tokens = F.adaptive_avg_pool1d(h, self.num_tokens).transpose(1, 2)  # (N, T, D)
        out: Tensor = self.dropout(self.norm(tokens + self.position_token))
        return out


class SmallAudio(Encoder):
    """2D convolutions on a spectrogram: (N, windows, mels, steps) -> up to `steps` tokens along time.

    Windows are input channels. The last layer mixes the mel axis with separate weights, so that a token encodes pitch.

    Args:
        num_windows: Spectrograms per clip.
        num_mels: Mel bands.
        num_steps: Spectrogram columns.
        options: Sizes.
    """

    def __init__(self, num_windows: int, num_mels: int, num_steps: int, options: SmallOptions) -> None:
        super().__init__()
        self.width = 4 * options.width
        self.num_tokens = min(options.steps, -(-num_steps // 16))
        self.trunk = _Trunk(num_windows, options)
        self.mix_mels = nn.Linear(self.width * -(-num_mels // 16), self.width)
        self.position_token = nn.Parameter(torch.empty(1, self.num_tokens, self.width))
        self.norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(options.dropout)
        _init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, windows, mels, steps) to (N, T, D)."""
        h = F.gelu(self.trunk(x))  # (N, D, mels / 16, steps / 16)
        h = F.adaptive_avg_pool1d(h.flatten(1, 2), self.num_tokens)  # (N, D * mels / 16, T)
        tokens = self.mix_mels(h.transpose(1, 2))  # (N, T, D)
        out: Tensor = self.dropout(self.norm(tokens + self.position_token))
        return out


def _init(encoder: SmallVideo | SmallAudio) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(encoder.position_token, std=INIT_STD)


def _small_video(modality: str, inputs: InputRecipe, options: SmallOptions) -> Encoder:
    return SmallVideo(inputs.section(modality).num_frames, options)


def _small_audio(modality: str, inputs: InputRecipe, options: SmallOptions) -> Encoder:
    spectrograms = inputs.section(modality)
    return SmallAudio(spectrograms.num_windows, spectrograms.num_mels, spectrograms.num_steps, options)


SMALL_VIDEO = EncoderType(SmallOptions, ("frames",), _small_video)
SMALL_AUDIO = EncoderType(SmallOptions, ("spectrograms",), _small_audio)
