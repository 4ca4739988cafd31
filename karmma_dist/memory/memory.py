"""Memories on disk, as the loader reads them and the trainer extends them.

    memory = AnswerMemory(Path("memories/teacher"), header)
    answer_EA = memory.find(Source(epoch, shard, row), kept_M)      # None: the teacher has to be asked

`tokens.py` has the memory of a frozen encoder.

Legend: M modalities, E experts, A logits of all heads side by side.
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
    """A memory of logits: an answer belongs to the set of modalities that the teacher saw."""

    def find(self, source: Source, kept_M: np.ndarray) -> Tensor | None:
        """Return the answer (E, A) for a clip with these modalities, or None.

        Raises:
            UserError: the disk fails.
        """
        answer = self._files.read(source.epoch, source.shard, source.row, set_of(kept_M))
        if answer is None:
            return None
        return torch.frombuffer(bytearray(answer), dtype=DTYPES[self.header.dtype]).reshape(self.header.shape)

    def store(self, source: Source, kept_M: np.ndarray, answer_EA: Tensor) -> None:
        """Store an answer, which must be in host memory.

        Raises:
            DiskError: the disk is full or fails.
            UserError: the folder cannot be written.
        """
        content = answer_EA.contiguous().view(torch.uint8).numpy().tobytes()
        self._files.write(source.epoch, source.shard, source.row, set_of(kept_M), content)
