"""Frozen encoders' memories in training: a clip's tokens are remembered, or encoded and then stored.

Legend: B clips, M modalities, N clips that have the modality, T tokens, D width of the encoder, X bytes of packed
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.memory.header import MemoryHeader
from karmma_dist.memory.memory import Source, dtype_name
from karmma_dist.memory.tokens import TokenMemory
from karmma_dist.models.karmma import KarmmaModel, KnownTokens
from karmma_dist.recipe import Recipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import TrainingClips
from karmma_dist.training.memories.facts import clips_per_shard, open_on_all, view_facts
from karmma_dist.training.memories.writer import MemoryWriter


def open_tokens(
    recipe: Recipe, clips: TrainingClips, model: KarmmaModel, dtype: torch.dtype, world: World
) -> dict[str, TokenMemory]:
    """Open the memories of the recipe's encoders, by modality, or make them. Every rank must call this.

    Args:
        recipe: The run's recipe.
        clips: The training clips.
        model: The model to train, with its starting weights, before they are sharded.
        dtype: Type in which the model computes.
        world: This rank.

    Raises:
        UserError: a memory is of another encoder, view or data, or cannot be written.
    """
    memories = {}
    for modality in recipe.modalities:
        setting = recipe.model.encoders[modality].memory
        if setting is not None:
            path, make = Path(setting.path), partial(_header, recipe, clips, model, dtype, modality)
            memories[modality] = TokenMemory(path, open_on_all(f"model.encoders.{modality}.memory", path, make, world))
    return memories


def _header(
    recipe: Recipe, clips: TrainingClips, model: KarmmaModel, dtype: torch.dtype, modality: str
) -> MemoryHeader:
    """Return the header of an encoder's memory that the recipe can use."""
    encoder = recipe.model.encoders[modality]
    assert encoder.memory is not None
    is_pooled = recipe.model.fusion == "mean"
    facts = {
        "modality": modality,
        "encoder": {"name": encoder.name, "options": encoder.options},
        "encoder (sha256 of its weights)": _fingerprint(model.encoders[modality].state_dict()),
        "tokens": "mean" if is_pooled else {"tau": recipe.model.tau, "grouping": recipe.model.grouping},
        "precision of the encoder": dtype_name(dtype),
        **view_facts(recipe, clips.folder, [modality]),
    }
    shape = (model.num_tokens[modality], model.encoder_width(modality))
    num_clips = clips_per_shard(recipe, clips.folder)
    num_expected = sum(clip.has(modality) for clip in clips.clips)
    return MemoryHeader("tokens", encoder.memory.dtype, shape, num_clips, num_expected, facts)


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a hash of an encoder's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class EncoderMemories:
    """The tokens of a step: remembered, or encoded and then stored.

    Args:
        memories: Memories by modality, of which this opens files of its own: the loader may read in another thread.
        dtype: Type of the model's tokens.
        agree: Returns the highest of the ranks' numbers, where every rank must run an encoder together with the others;
            None if each may go its own way.
    """

    def __init__(
        self, memories: Mapping[str, TokenMemory], dtype: torch.dtype, agree: Callable[[int], int] | None
    ) -> None:
        self._memories = {modality: memory.clone() for modality, memory in memories.items()}
        self._dtype, self._agree = dtype, agree
        self._writer = MemoryWriter("the memory of encoders")

    @property
    def modalities(self) -> list[str]:
        """Modalities whose encoders have a memory."""
        return list(self._memories)

    def known(self, batch: Batch, modalities: list[str]) -> dict[str, KnownTokens]:
        """Return a batch's tokens for `KarmmaModel.encode`, by modality. They are stored by the next call.

        Args:
            batch: Batch, prepared.
            modalities: Modalities of the columns of `present_BM`.
        """
        self.flush()
        self._writer.report_damage(batch.token_lookups)
        return {
            modality: self._known(modality, memory, batch, batch.present_BM[:, modalities.index(modality)])
            for modality, memory in self._memories.items()
        }

    def _known(self, modality: str, memory: TokenMemory, batch: Batch, present_B: Tensor) -> KnownTokens:
        sources = [source for source, present in zip(batch.sources, present_B.tolist(), strict=True) if present]
        remembered = batch.tokens.get(modality)
        is_known_N = torch.zeros(len(sources), dtype=torch.bool) if remembered is None else remembered.is_remembered_N
        packed = None if remembered is None else remembered.packed_NX
        must_encode = self._agree is not None and bool(self._agree(int(not is_known_N.all())))
        store = partial(self._store_later, memory)
        return _PackedTokens(memory, sources, is_known_N, packed, self._dtype, must_encode, store)

    def _store_later(self, memory: TokenMemory, sources: list[Source], packed_NX: Tensor) -> None:
        def store() -> None:
            for source, packed_X in zip(sources, packed_NX.cpu(), strict=True):
                memory.store(source, packed_X)

        self._writer.later(store)

    def flush(self) -> None:
        """Store the tokens of the last step."""
        self._writer.flush()

    def close(self) -> None:
        """Store the last tokens and close the files."""
        self.flush()
        for memory in self._memories.values():
            memory.close()


@dataclass(frozen=True)
class _PackedTokens:
    """The tokens of a batch's clips that have a modality; see `KnownTokens`."""

    memory: TokenMemory
    sources: list[Source]
    """Places of the N clips in the memory."""
    is_known_N: Tensor
    """bool, True = the clip's tokens are remembered."""
    packed_NX: Tensor | None
    """Packed tokens of the remembered clips."""
    dtype: torch.dtype
    must_encode: bool
    store: Callable[[list[Source], Tensor], None]
    """Stores packed tokens of clips."""

    def complete(self, encoded_NTD: Tensor | None) -> Tensor:
        """Return the tokens of all clips, (N, T, D), rounded as they are stored."""
        parts = [] if self.packed_NX is None else [self.packed_NX]
        if encoded_NTD is not None:
            parts.append(self.memory.pack(encoded_NTD))
            rows = (~self.is_known_N).nonzero().flatten().tolist()
            self.store([self.sources[row] for row in rows], parts[-1])
        packed_NX = torch.cat(parts)
        if len(parts) > 1:
            rows_N = torch.cat([self.is_known_N.nonzero(), (~self.is_known_N).nonzero()]).flatten().argsort()
            packed_NX = packed_NX.index_select(0, rows_N.to(packed_NX.device))
        return self.memory.unpack(packed_NX, self.dtype)
