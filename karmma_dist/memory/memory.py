"""Memories on disk, as the loader reads them and the trainer extends them.

    memory = AnswerMemory(Path("memories/teacher"), header)
    answer_EA = memory.find(Source(epoch, shard, row), kept_M, present_M)      # None: the teacher has to be asked

`tokens.py` has the memory of a frozen encoder.

Legend: M modalities, S = 2^M - 1 subsets of them, E experts, A logits of all heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from karmma_dist.memory.header import MemoryHeader
from karmma_dist.memory.records import AnswerFiles, Lookups

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}  # fmt: skip
"""Types of stored numbers by their names in headers."""


@dataclass(frozen=True, slots=True)
class Source:
    """The place of a clip's view in a memory."""

    epoch: int
    """Number of the view: the epoch, or the epoch modulo the number of views that epochs take in turn."""
    shard: str
    """File name of the clip's tar."""
    row: int
    """0-based place of the clip in it."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type of numbers in headers."""
    return str(dtype).removeprefix("torch.")


def set_of(present_M: np.ndarray) -> int:
    """Return a set of modalities as a number: bit m for modality m."""
    return int(sum(1 << m for m, present in enumerate(present_M) if present))


def sets_of(num_modalities: int) -> Tensor:
    """Return all sets of modalities, bool (2^M, M), True = in the set, each at its number; see `set_of`."""
    return (torch.arange(2**num_modalities)[:, None] >> torch.arange(num_modalities)) & 1 == 1


class Memory:
    """A memory; cheap to pickle.

    Args:
        folder: Folder of the memory, whose header was checked.
        header: Header.
    """

    def __init__(self, folder: Path, header: MemoryHeader) -> None:
        self.folder, self.header = folder, header
        self._files = AnswerFiles(folder, header.answer_bytes, dict(header.num_clips))

    def clone(self) -> Self:
        """Return the same memory with files of its own, for another thread."""
        return type(self)(self.folder, self.header)

    def take_lookups(self) -> Lookups:
        """Return what was looked for since the last call."""
        lookups = replace(self._files.lookups)
        self._files.lookups = Lookups()
        return lookups

    def close(self) -> None:
        """Close all files; they are opened again when they are needed."""
        self._files.close()


class AnswerMemory(Memory):
    """A memory of logits.

    A record holds the answer (E, A) for the set of modalities that the teacher saw or, with `has_all_subsets`, the
    answers (S, E, A) for every subset of the modalities that the clip has, in the order of `sets_of` without the empty
    set; subsets that the clip cannot have are zeros.
    """

    @property
    def has_all_subsets(self) -> bool:
        """True if a record holds the answers for all subsets of a clip's modalities."""
        return self.header.memory_subsets == "all"

    def find(self, source: Source, kept_M: np.ndarray, present_M: np.ndarray) -> Tensor | None:
        """Return the answer (E, A) for a clip of which the teacher sees the kept modalities, or None.

        Args:
            source: Place of the clip's view.
            kept_M: bool, True = the teacher sees the modality.
            present_M: bool, True = the clip has the modality.

        Raises:
            UserError: the disk fails.
        """
        stored_M = present_M if self.has_all_subsets else kept_M
        content = self._files.read(source.epoch, source.shard, source.row, set_of(stored_M))
        if content is None:
            return None
        answer = torch.frombuffer(bytearray(content), dtype=DTYPES[self.header.dtype]).reshape(self.header.shape)
        return answer[set_of(kept_M) - 1] if self.has_all_subsets else answer

    def store(self, source: Source, stored_M: np.ndarray, answer: Tensor) -> None:
        """Store a record, which must be in host memory.

        Args:
            source: Place of the clip's view.
            stored_M: bool, the set of modalities of the record: those that the teacher saw or, with `has_all_subsets`,
                those that the clip has.
            answer: Content of the record, of the header's shape.

        Raises:
            DiskError: the disk is full or fails.
            UserError: the folder cannot be written.
        """
        content = answer.contiguous().view(torch.uint8).numpy().tobytes()
        self._files.write(source.epoch, source.shard, source.row, set_of(stored_M), content)
