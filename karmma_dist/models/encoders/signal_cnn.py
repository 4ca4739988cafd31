"""An encoder of signals, such as those of an IMU: 1D convolutions along time, of about a million parameters.

A clip of six channels and 400 samples costs 0.05 GFLOP. Amplitudes are kept: the residual stream is never normalised,
and the norms inside of blocks are per clip (group norm), so that a clip's tokens depend on that clip alone.

Legend: N clips, C channels, S samples, T tokens, D width.
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

_BLOCKS = (1, 1, 5)
"""Residual blocks at strides 4, 8 and 16."""


class SignalOptions(Settings):
    """Options of signal_cnn."""

    width: Annotated[int, Field(gt=0, multiple_of=4)] = 44
    """Channels of the first stage; the second has twice, the third four times as many. Tokens are as wide as the
    third."""
    steps: Positive = 25
    """Largest number of time steps that become tokens."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on tokens in training."""


class _Block(nn.Module):
    """A residual block `x + conv(gelu(norm(x)))`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.conv = nn.Conv1d(channels, channels, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(F.gelu(self.norm(x)))
        return out


class SignalCnn(Encoder):
    """1D convolutions on all channels together: (N, C, S) -> up to `steps` tokens along time.

    Args:
        num_channels: C.
        num_samples: S.
        options: Sizes.
    """

    def __init__(self, num_channels: int, num_samples: int, options: SignalOptions) -> None:
        super().__init__()
        widths = [options.width, 2 * options.width, 4 * options.width]
        self.width = widths[-1]
        self.num_tokens = min(options.steps, -(-num_samples // 16))
        entries = [
            nn.Conv1d(num_channels, widths[0], 9, stride=4, padding=4),
            nn.Conv1d(widths[0], widths[1], 3, stride=2, padding=1),
            nn.Conv1d(widths[1], widths[2], 3, stride=2, padding=1),
        ]
        self.trunk = nn.Sequential()
        for entry, channels, num in zip(entries, widths, _BLOCKS, strict=True):
            self.trunk.append(nn.Sequential(entry, *(_Block(channels) for _ in range(num))))
        self.position_token = nn.Parameter(torch.empty(1, self.num_tokens, self.width))
        self.norm = nn.LayerNorm(self.width)
        self.dropout = nn.Dropout(options.dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.position_token, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (N, C, S) to (N, T, D)."""
        h = F.gelu(self.trunk(x))  # (N, D, about S / 16)
        tokens = F.adaptive_avg_pool1d(h, self.num_tokens).transpose(1, 2)  # (N, T, D)
        out: Tensor = self.dropout(self.norm(tokens + self.position_token))
        return out


def _signal_cnn(modality: str, inputs: InputRecipe, options: SignalOptions) -> Encoder:
    series = inputs.section(modality)
    return SignalCnn(series.num_channels, series.num_samples, options)


SIGNAL_CNN = EncoderType(SignalOptions, ("series",), _signal_cnn)
