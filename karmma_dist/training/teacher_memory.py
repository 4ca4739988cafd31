"""The use of a teacher's memory in training: what it must be of, and a step's answers, remembered or stored anew."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import torch
from torch import Tensor

from karmma_dist.distributed.collectives import gather, on_main
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.files import json_bytes, sha256_of
from karmma_dist.memory.answers import AnswerMemory, dtype_name
from karmma_dist.memory.header import MemoryHeader, open_header
from karmma_dist.models.model_card import CARD
from karmma_dist.models.weights import own_weights
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import Batch

_logger = logging.getLogger(__name__)


def open_memory(recipe: Recipe, folder: ShardFolder, dtype: torch.dtype, world: World) -> AnswerMemory | None:
    """Open the memory that the recipe names, or make it; None if it names none. Every rank must call this.

    Args:
        recipe: The student's recipe.
        folder: The opened shards.
        dtype: Type in which the teacher computes.
        world: This rank.

    Raises:
        UserError: the memory is of another teacher, view or data, or cannot be written.
    """
    if recipe.distill is None or recipe.distill.memory is None:
        return None
    path = Path(recipe.distill.memory)

    def make() -> MemoryHeader:
        try:
            header = _header(recipe, folder, dtype)
            open_header(path, header)
        except (OSError, UserError) as error:
            raise UserError(f"distill.memory: {error}") from None
        return header

    (header,) = gather([made] if (made := on_main(make, world)) else [])
    return AnswerMemory(path, header)


def _header(recipe: Recipe, folder: ShardFolder, dtype: torch.dtype) -> MemoryHeader:
    """Return the header of a memory that the recipe can use."""
    assert recipe.distill is not None
    teachers = [_fingerprint(own_weights(recipe.find_run(name))) for name in recipe.distill.names]
    num_logits = sum(len(names) for names in folder.classes.values())
    facts: dict[str, Any] = {
        "teacher (sha256 of weights and model.yaml)": teachers,
        "modalities": recipe.data.modalities,
        "heads": [[head, len(names)] for head, names in folder.classes.items()],
        "classes (sha256)": hashlib.sha256(json_bytes(folder.classes)).hexdigest(),
        "shards (sha256 of their manifest)": folder.sha256,
        "split": recipe.data.train_split,
        "seed of the views": recipe.seed,
        "inputs": {name: recipe.inputs.section(name).model_dump(mode="json") for name in recipe.data.modalities},
        "decoders": {"av": av.__version__, "opencv": cv2.__version__, **_libraries()},
    }
    shards = folder.manifest.splits[recipe.data.train_split].shards
    num_clips = {shard.name: shard.num_clips for shard in shards}
    return MemoryHeader("logits", dtype_name(dtype), (len(teachers), num_logits), num_clips, facts)


def _fingerprint(weights: Path) -> str:
    """Return a hash of what a model is: its weights and its card, without the name of its run."""
    card = "".join(
        line for line in (weights.parent / CARD).read_text("utf-8").splitlines(keepends=True)
        if not line.startswith("run:")
    )  # fmt: skip
    return hashlib.sha256(f"{sha256_of(weights)} {card}".encode()).hexdigest()


def _libraries() -> dict[str, str]:
    """Return the versions of FFmpeg's libraries that decode and convert."""
    return {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale")}


class TeacherMemory:
    """The answers of a step: remembered, or the teacher's own, which are then stored.

    Answers are stored one step later, when no device has to be waited for. Each rank reports damage, and a disk that
    takes no more answers, once; the run goes on.

    Args:
        memory: The memory, of which this opens files of its own: the loader may read in another thread.
        agree: Returns the highest of the ranks' numbers, where every rank must call the teacher together with the
            others; None if each may go its own way.
    """

    def __init__(self, memory: AnswerMemory, agree: Callable[[int], int] | None) -> None:
        self._memory, self._agree = memory.clone(), agree
        self._pending: tuple[Batch, Tensor] | None = None
        self._is_full = self._has_reported_damage = False

    def answers(self, batch: Batch, ask: Callable[[Batch | None], Tensor]) -> Tensor:
        """Return the members' answers (B, E, A).

        Args:
            batch: Batch.
            ask: Asks the teacher about a batch; None: only takes part in what the ranks do together.
        """
        self.flush()
        self._report_damage(batch)
        remembered = batch.answers_BEA
        if remembered is not None:
            if self._agree is not None and self._agree(0):
                ask(None)
            return remembered
        if self._agree is not None:
            self._agree(1)
        answers_BEA = ask(batch)
        self._pending = batch, answers_BEA
        return answers_BEA

    def flush(self) -> None:
        """Store the answers of the last step."""
        if self._pending is None or self._is_full:
            return
        (batch, answers_BEA), self._pending = self._pending, None
        kept_BM, answers = batch.present_BM.numpy(), answers_BEA.cpu()
        try:
            for row, source in enumerate(batch.sources):
                self._memory.store(source, kept_BM[row], answers[row])
        except (OSError, UserError) as error:
            self._is_full = True
            _logger.warning("the teacher's memory is not extended any more, the run goes on: %s", error)

    def close(self) -> None:
        """Store the last answers and close the files."""
        self.flush()
        self._memory.close()

    def _report_damage(self, batch: Batch) -> None:
        if batch.lookups.damaged and not self._has_reported_damage:
            self._has_reported_damage = True
            _logger.warning(
                "%s: damaged, so this and other damaged answers are computed anew", batch.lookups.first_damaged
            )
