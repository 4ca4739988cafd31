"""The FLOPs of a KARMMA model: 2 x the multiply-accumulates of convolutions, linear layers and attention products.

They are counted on the meta device, without weights and without computing: on a CPU PyTorch's counter misses fused
attention. What a batch costs once, however many clips it has, is not counted: the Linear of mean tokens that replace
missing ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import FusionBlock, KarmmaModel
from karmma_dist.recipe import InputRecipe, ModelRecipe

T = TypeVar("T")


@dataclass(frozen=True)
class ClipFlops:
    """Forward FLOPs of one clip, by part of the model."""

    encoders: dict[str, int]
    """FLOPs of a clip's encoder, by modality."""
    projections: dict[str, int]
    """FLOPs of the Linear to the fusion block's width, by modality."""
    fusion: Mapping[tuple[str, ...], int]
    """FLOPs of fusion block and heads, by set of modalities whose tokens are in the block."""
    frozen: frozenset[str]
    """Modalities whose encoder is not trained."""
    leaves_out: bool
    """True if absent tokens are left out; otherwise others replace them."""

    def alone(self, subset: tuple[str, ...]) -> int:
        """Return the FLOPs of one clip in a model of the same sizes with only the modalities of `subset`."""
        return sum(self.encoders[m] + self.projections[m] for m in subset) + self.fusion[subset]

    def forward(self, num_present: Mapping[str, int], num_clips: int) -> int:
        """Return the FLOPs of a forward pass without gradients.

        Args:
            num_present: Number of clips that have each modality.
            num_clips: Number of clips in the batch.
        """
        everything = tuple(self.encoders)
        in_block = tuple(m for m in everything if num_present.get(m, 0)) if self.leaves_out else everything
        encoded = sum(num_present.get(m, 0) * (self.encoders[m] + self.projections[m]) for m in everything)
        return encoded + num_clips * self.fusion[in_block]

    def teaching(self, num_present: Mapping[str, int], num_clips: int) -> int:
        """Return the FLOPs of a teacher's forward pass; a unimodal expert sees only the clips that have its modality.

        Args:
            num_present: Number of clips that have each modality, also those that the teacher does not take.
            num_clips: Number of clips in the batch.
        """
        seen = {modality: num_present.get(modality, 0) for modality in self.encoders}
        if not any(seen.values()):
            return 0
        return self.forward(seen, num_clips if len(seen) > 1 else sum(seen.values()))

    def all_subsets(self, present_BM: Tensor) -> int:
        """Return the FLOPs of encoding each clip once and fusing it once per subset of its modalities, no gradients.

        Args:
            present_BM: bool, True = the clip has the modality; columns in the order of `encoders`.
        """
        everything = tuple(self.encoders)
        counts = zip(everything, present_BM.sum(dim=0).tolist(), strict=True)
        total = sum(num * (self.encoders[m] + self.projections[m]) for m, num in counts)
        for size in range(1, len(everything) + 1):
            for columns in itertools.combinations(range(len(everything)), size):
                in_block = tuple(everything[m] for m in columns) if self.leaves_out else everything
                total += int(present_BM[:, list(columns)].all(dim=1).sum()) * self.fusion[in_block]
        return total

    def training(
        self, num_present: Mapping[str, int], num_clips: int, num_encoded: Mapping[str, int] | None = None
    ) -> int:
        """Return the FLOPs of a forward and a backward pass of a model in training.

        The backward pass counts as 2 x the forward pass for trained parts and as 0 for frozen encoders. The encoder of
        a modality that no clip has runs on one clip of zeros, and absent tokens keep their place in the fusion block.

        Args:
            num_present: Number of clips that have each modality.
            num_clips: Number of clips in the batch.
            num_encoded: Number of clips that are encoded, for modalities whose tokens may be remembered.
        """
        total = 3 * num_clips * self.fusion[tuple(self.encoders)]
        for modality, encoder in self.encoders.items():
            passes = 1 if modality in self.frozen else 3
            num = max(1, num_present.get(modality, 0))
            encoded = num if num_encoded is None else num_encoded.get(modality, num)
            total += encoded * passes * encoder + num * 3 * self.projections[modality]
        return total


def flops_per_clip(model: KarmmaModel) -> ClipFlops:
    """Count a model's FLOPs on a twin on the meta device; `model` may be on any device and is not modified."""
    # A twin that leaves absent tokens out gives the cost of any set of modalities in the fusion block: stand-in tokens
    # are only added, as are other tokens that replace missing ones. Prompts are tokens of their own.
    recipe = model.recipe if model.leaves_out else model.recipe.model_copy(update={"missing": "leave_out"})
    twin = meta_model(recipe, model.inputs, model.modalities, model.heads).eval()
    encoders, projections, tokens = {}, {}, {}
    for modality, x in meta_clip(twin.inputs, twin.modalities).items():
        encoder, projection = twin.encoders[modality], twin.projections[modality]
        assert isinstance(encoder, Encoder)
        reduced = x.new_empty(1, twin.num_tokens[modality], encoder.width)
        encoders[modality] = count_flops(encoder, x)[1]
        tokens[modality], projections[modality] = count_flops(projection, reduced)
    return ClipFlops(encoders, projections, _FusionFlops(twin, tokens), model.frozen, model.leaves_out)


class _FusionFlops(dict[tuple[str, ...], int]):
    """FLOPs of fusion block and heads by set of modalities, counted at first use: training needs few of the sets.

    Args:
        twin: The model on the meta device.
        tokens: Tokens (1, T, D) of one clip, by modality.
    """

    def __init__(self, twin: KarmmaModel, tokens: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._twin, self._tokens = twin, tokens

    def __missing__(self, subset: tuple[str, ...]) -> int:
        present_BM = torch.tensor([[m in subset for m in self._twin.modalities]])
        self[subset] = count_flops(self._twin.fuse, {m: self._tokens[m] for m in subset}, present_BM)[1]
        return self[subset]


def count_flops(forward: Callable[..., T], *inputs: Any) -> tuple[T, int]:
    """Run `forward` without gradients and return its result and its FLOPs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = forward(*inputs)
    return out, int(counter.get_total_flops())


def meta_model(
    model: ModelRecipe, inputs: InputRecipe, modalities: Sequence[str], heads: dict[str, int]
) -> KarmmaModel:
    """Build a model on the meta device: it has shapes but no weights."""
    with torch.device("meta"):
        return KarmmaModel(model, inputs, modalities, heads)


def meta_clip(
    inputs: InputRecipe, modalities: Sequence[str], dtype: torch.dtype = torch.float32, num_clips: int = 1
) -> dict[str, Tensor]:
    """Return inputs (B, ...) without values of clips that have all `modalities`."""
    return {m: torch.empty(num_clips, *input_shape(m, inputs), dtype=dtype, device="meta") for m in modalities}


def meta_tokens(block: FusionBlock, num_tokens: int, num_clips: int = 1) -> Tensor:
    """Return projected tokens (B, T, D) without values, of the block's width and dtype."""
    width, dtype = block.cls_token.shape[-1], block.cls_token.dtype
    return torch.empty(num_clips, num_tokens, width, dtype=dtype, device="meta")
