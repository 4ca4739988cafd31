"""A teacher's memory in training: a step's answers are remembered, or the teacher's own, which are then stored."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karmma_dist.distributed.world import World
from karmma_dist.io.files import json_bytes, sha256_of
from karmma_dist.memory.header import MemoryHeader
from karmma_dist.memory.memory import AnswerMemory, Source, dtype_name, set_of
from karmma_dist.models.model_card import CARD
from karmma_dist.models.weights import own_weights
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import Shards
from karmma_dist.streaming.batch import Batch
from karmma_dist.training.memories.facts import clips_per_shard, open_on_all, view_facts
from karmma_dist.training.memories.writer import MemoryWriter

_logger = logging.getLogger(__name__)


def open_answers(
    recipe: Recipe, folder: Shards, dtype: torch.dtype, clips_per_epoch: int, world: World
) -> AnswerMemory | None:
    """Open the memory that the recipe names, or make it; None if it names none. Every rank must call this.

    Args:
        recipe: The student's recipe.
        folder: The opened shards.
        dtype: Type in which the teacher computes.
        clips_per_epoch: Number of clips that the steps of an epoch take.
        world: This rank.

    Raises:
        UserError: the memory is of another teacher, view or data, or cannot be written.
    """
    if recipe.distill is None or recipe.distill.memory is None:
        if recipe.distill is not None and recipe.distill.memory_subsets != "drawn" and world.is_main:
            _logger.warning("distill.memory_subsets has no effect: name a folder in distill.memory")
        return None
    path = Path(recipe.distill.memory)
    header = open_on_all("distill.memory", path, lambda: _header(recipe, folder, dtype, clips_per_epoch), world)
    return AnswerMemory(path, header)


def _header(recipe: Recipe, folder: Shards, dtype: torch.dtype, clips_per_epoch: int) -> MemoryHeader:
    """Return the header of a memory that the recipe can use."""
    assert recipe.distill is not None
    teachers = [_fingerprint(own_weights(recipe.find_run(name))) for name in recipe.distill.names]
    num_logits = sum(len(names) for names in folder.classes.values())
    facts: dict[str, Any] = {
        "teacher (sha256 of weights and model.yaml)": teachers,
        "modalities": recipe.data.modalities,
        "heads": [[head, len(names)] for head, names in folder.classes.items()],
        "classes (sha256)": hashlib.sha256(json_bytes(folder.classes)).hexdigest(),
        **view_facts(recipe, folder, recipe.data.modalities),
    }
    num_clips = clips_per_shard(recipe, folder)
    shape: tuple[int, ...] = (len(teachers), num_logits)
    if recipe.distill.memory_subsets == "all":
        shape = (2 ** len(recipe.data.modalities) - 1, *shape)
    return MemoryHeader("logits", dtype_name(dtype), shape, num_clips, clips_per_epoch, facts)


def _fingerprint(weights: Path) -> str:
    """Return a hash of what a model is: its weights and its card, without the name of its run."""
    card = "".join(
        line for line in (weights.parent / CARD).read_text("utf-8").splitlines(keepends=True)
        if not line.startswith("run:")
    )  # fmt: skip
    return hashlib.sha256(f"{sha256_of(weights)} {card}".encode()).hexdigest()


class TeacherMemory:
    """The answers of a step: remembered, or the teacher's own, which are then stored.

    Args:
        memory: The memory, of which this opens files of its own: the loader may read in another thread.
        agree: Returns the highest of the ranks' numbers, where every rank must call the teacher together with the
            others; None if each may go its own way.
    """

    def __init__(self, memory: AnswerMemory, agree: Callable[[int], int] | None) -> None:
        self._memory, self._agree = memory.clone(), agree
        self._writer = MemoryWriter("the teacher's memory")

    @property
    def has_all_subsets(self) -> bool:
        """True if the teacher is asked about all subsets of the clips' modalities."""
        return self._memory.has_all_subsets

    def answers(self, batch: Batch, ask: Callable[[Batch | None], Tensor]) -> Tensor:
        """Return the members' answers (B, E, A).

        Args:
            batch: Batch.
            ask: Asks the teacher about a batch, for answers (B, E, A), or (B, S, E, A) with `has_all_subsets`; None:
                only takes part in what the ranks do together.
        """
        self.flush()
        self._writer.report_damage(batch.lookups)
        remembered = batch.answers_BEA
        if remembered is not None:
            if self._agree is not None and self._agree(0):
                ask(None)
            return remembered
        if self._agree is not None:
            self._agree(1)
        answers = ask(batch)
        self._writer.later(partial(self._store, _records_of(batch, self.has_all_subsets), answers))
        if not self.has_all_subsets:
            return answers
        places_B = torch.tensor([set_of(kept_M) - 1 for kept_M in batch.present_BM.numpy()], device=answers.device)
        return answers[torch.arange(len(places_B), device=answers.device), places_B]

    def _store(self, records: dict[int, tuple[Source, np.ndarray]], answers: Tensor) -> None:
        content = answers.cpu()
        for row, (source, stored_M) in records.items():
            self._memory.store(source, stored_M, content[row])

    def flush(self) -> None:
        """Store the answers of the last step."""
        self._writer.flush()

    def close(self) -> None:
        """Store the last answers and close the files."""
        self.flush()
        self._memory.close()


def _records_of(batch: Batch, has_all_subsets: bool) -> dict[int, tuple[Source, np.ndarray]]:
    """Return source and set of modalities of each record that a batch's answers make, by the clip's row.

    With all subsets, a clip of which dropout takes a damaged modality makes none: some of its subsets are not known.
    """
    stored_BM = batch.present_BM
    whole_B = torch.full_like(batch.valid_B, not has_all_subsets)
    if batch.dropped is not None:
        stored_BM, whole_B = stored_BM | batch.dropped.present_BM, batch.dropped.valid_B
    rows = whole_B.nonzero().flatten().tolist()
    return {row: (batch.sources[row], stored_BM[row].numpy()) for row in rows}
