"""An encoder: a clip's tensor of one modality in, tokens out. `table.py` lists them.

Legend: N clips, T tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Settings


class Encoder(nn.Module, ABC):
    """Base of all encoders. A clip's tokens depend on that clip alone, whatever else is in the batch."""

    width: int
    """D."""
    num_tokens: int
    """T, the same for every clip."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode N clips of the shape that `table.input_shape` names; returns (N, T, D)."""

    def checkpoint_activations(self) -> None:
        """Keep only what goes into each block, and compute the rest again in the backward pass.

        Raises:
            UserError: there are no blocks to do so with.
        """
        raise UserError(f"{type(self).__name__} cannot recompute activations: remove activation_checkpointing")

    def moved_rows(self, state: dict[str, Tensor]) -> str:  # noqa: ARG002 - other encoders move none
        """Return in words which rows of a published table `from_published` gives another meaning; empty: none."""
        return ""

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, resize and drop entries of a published checkpoint so that they are this module's `state_dict`.

        Raises:
            UserError: there is no published checkpoint of this architecture.
        """
        first = next(iter(state), "nothing")
        raise UserError(
            f"{type(self).__name__} has no published weights, and '{first}' is no key of a run's weights: "
            "give a run folder"
        )


@dataclass(frozen=True)
class EncoderType:
    """One line of the encoder table."""

    options: type[Settings]
    """The recipe's `options`, typed."""
    arrays: tuple[str, ...]
    """Kinds of array that it takes, by the modalities' `array`."""
    build: Callable[[str, InputRecipe, Any], Encoder]
    """Called with the modality, the input sizes and the options."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that it takes."""
        return tuple(name for name, modality in MODALITIES.items() if modality.array in self.arrays)
