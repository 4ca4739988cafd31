"""The base class of encoders: a clip's tensor of one modality in, tokens out. `table.py` lists the encoders.

Legend: N clips, T tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import InputRecipe
from karmma_dist.settings import Settings


class Encoder(nn.Module, ABC):
    """The base of all encoders. A clip's tokens depend on that clip alone, not on the rest of the batch."""

    width: int
    """D."""
    num_tokens: int
    """T, the same for every clip."""
    reads_folders = False
    """True if published weights are a folder in the layout of the Hugging Face hub, instead of a file."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Encode N clips, (N, *table.input_shape), to (N, T, D)."""

    def checkpoint_activations(self) -> None:
        """Keep only the input of each block, and recompute its activations in the backward pass.

        Raises:
            UserError: the encoder has no blocks that can be recomputed.
        """
        raise UserError(f"{type(self).__name__} cannot recompute activations: remove activation_checkpointing")

    def check_config(self, config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
        """Check that a published folder describes this encoder; see `reads_folders`.

        Args:
            config: Content of its config.json.
            preprocessor: Content of its preprocessor_config.json, empty if it has none.

        Raises:
            UserError: it describes another architecture or other inputs.
        """

    def moved_rows(self, state: dict[str, Tensor]) -> str:  # noqa: ARG002 - most encoders move none
        """Return a sentence on the rows of published tables that `from_published` moves; empty if it moves none."""
        return ""

    def from_published(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename, resize and drop entries of a published checkpoint so that they fit this module's `state_dict`.

        Raises:
            UserError: no checkpoint of this architecture is published.
        """
        first = next(iter(state), "nothing")
        raise UserError(
            f"{type(self).__name__} has no published weights, and '{first}' is not a key of a run's weights: "
            "give a run folder"
        )


@dataclass(frozen=True)
class EncoderType:
    """An entry of the encoder table."""

    options: type[Settings]
    """Type of the recipe's `options`."""
    arrays: tuple[str, ...]
    """Kinds of array that the encoder accepts, by the `array` of modalities."""
    build: Callable[[str, InputRecipe, Any], Encoder]
    """Function from modality, input sizes and options to the encoder."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that the encoder accepts."""
        return tuple(name for name, modality in MODALITIES.items() if modality.array in self.arrays)
