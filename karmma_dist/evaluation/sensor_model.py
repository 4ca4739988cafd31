"""What evaluation needs of a model.

Legend: B clips of a batch, M modalities, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class SensorModel(Protocol):
    """`karmma_dist.models.karmma.KarmmaModel` is one."""

    @property
    def modalities(self) -> Sequence[str]:
        """Columns of present_BM."""

    @property
    def heads(self) -> Mapping[str, int]:
        """Number of classes per head."""

    def encode(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Tokens of the present clips, per modality."""

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) per head from the tokens of the kept modalities; every clip keeps at least one."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """All modules, the model itself among them."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""
