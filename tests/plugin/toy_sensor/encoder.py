"""The encoder `toy_conv`: a convolution over readings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from karmma_dist.models.encoders.encoder import Encoder, EncoderType
from karmma_dist.settings import Settings


class ToyOptions(Settings):
    width: int = 8


class ToyConv(Encoder):
    def __init__(self, num_readings: int, options: ToyOptions) -> None:
        super().__init__()
        self.width, self.num_tokens = options.width, num_readings // 4
        self.conv = nn.Conv1d(1, options.width, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).transpose(1, 2)


def build(modality: str, inputs: Any, options: ToyOptions) -> Encoder:
    return ToyConv(inputs.section(modality).num_readings, options)


TOY_CONV = EncoderType(ToyOptions, ("readings",), build)
