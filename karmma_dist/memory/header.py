"""The header of a memory: everything that decides what it holds, so that nobody reads another model's answers.

    PATH/memory.json    format, kind, layout of a record, and the facts that the answers follow from

A fact is, for instance, the sha256 of the teacher's weights, or the version of the decoders. A memory is used only by
runs with the same facts: what a frozen model says of a view is a function of them, the epoch and the clip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, quoted
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_json
from karmma_dist.io.json_fields import JsonObject, read_json

FORMAT = 2
"""Version of the layout."""
MOST_BYTES = 1 << 30
"""Largest size of an answer."""
HEADER = "memory.json"
"""File name of the header."""

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def answer_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of an answer; int8 has a float32 scale for each row, which is a token."""
    scales = 4 * shape[0] if dtype == "int8" else 0
    return _ITEM_BYTES[dtype] * math.prod(shape) + scales


@dataclass(frozen=True)
class MemoryHeader:
    """What a memory holds."""

    kind: str
    """`logits` of a teacher, or `tokens` of a frozen encoder."""
    dtype: str
    """Type of the stored numbers: float64, float32, float16, bfloat16 or int8."""
    shape: tuple[int, ...]
    """Shape of an answer: (experts, classes) or (subsets, experts, classes) of logits, (tokens, width) of tokens."""
    num_clips: Mapping[str, int]
    """Number of clips by shard: file name of its tar."""
    num_expected: int
    """Number of answers in a complete epoch of the run that made the memory: it leaves clips out, by the size of its
    batches or since they lack a modality. Other runs may store others."""
    facts: Mapping[str, Any]
    """What decides the answers, by name, in the order in which differences are looked for; JSON values."""

    @property
    def answer_bytes(self) -> int:
        """Bytes of an answer."""
        return answer_bytes(self.dtype, self.shape)

    @property
    def memory_subsets(self) -> str:
        """`all` if an answer is a teacher's for every subset of a clip's modalities, else `drawn`."""
        return "all" if self.kind == "logits" and len(self.shape) == 3 else "drawn"

    def to_json(self) -> dict[str, Any]:
        """Return the content of memory.json."""
        return {
            "format": FORMAT, "kind": self.kind, "dtype": self.dtype, "shape": list(self.shape),
            "num_clips": dict(self.num_clips), "num_expected": self.num_expected, "facts": dict(self.facts),
        }  # fmt: skip

    @classmethod
    def from_fields(cls, fields: JsonObject) -> MemoryHeader:
        """Parse the content of memory.json.

        Raises:
            ValueError: a field is missing or of another type, or another version wrote it.
        """
        if fields.value("format") != FORMAT:
            raise fields.problem("format")
        dtype = fields.text("dtype")
        if dtype not in _ITEM_BYTES:
            raise fields.problem("dtype")
        shards = fields.nested("num_clips")
        num_clips = {name: shards.whole(name) for name in shards}
        for name in num_clips:
            if not _SHARD.fullmatch(name):
                raise ValueError(f"num_clips names {quoted(name)}, which is no tar")
        shape = tuple(fields.wholes("shape"))
        if min(shape, default=0) < 1:
            raise fields.problem("shape")
        facts = fields.nested("facts").unchecked()
        header = cls(fields.text("kind"), dtype, shape, num_clips, fields.whole("num_expected"), facts)
        if header.answer_bytes > MOST_BYTES:
            raise ValueError(f"an answer would have {header.answer_bytes} bytes, at most {MOST_BYTES} are possible")
        return header

    def difference(self, stored: MemoryHeader, own_name: str = "this run's") -> str:
        """Return in words how a stored memory differs from this one, or an empty string.

        Args:
            stored: Header of the stored memory.
            own_name: Words for this header, as in "its seed is 4, this run's 5".
        """
        subsets = "memory_subsets"
        own, other = (
            header.to_json() | {"num_expected": 0, subsets: header.memory_subsets} for header in (self, stored)
        )
        names = {"kind": "kind", "dtype": "precision", subsets: subsets, "shape": "shape of an answer"}
        for name, shown in names.items():
            if own[name] != other[name]:
                return f"its {shown} is {quoted(other[name])}, {own_name} {quoted(own[name])}"
        for name in [*self.facts, *(stored.facts.keys() - self.facts.keys())]:
            if self.facts.get(name) != stored.facts.get(name):
                return f"its {name} is {quoted(stored.facts.get(name))}, {own_name} {quoted(self.facts.get(name))}"
        return "" if own == other else "its numbers of clips per shard differ"


def read_header(folder: Path) -> MemoryHeader:
    """Read the header of a memory.

    Raises:
        FileNotFoundError: the folder holds no memory.
        UserError: the header is damaged, or of another version.
    """
    path = folder / HEADER
    try:
        return MemoryHeader.from_fields(read_json(path))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not the header of a memory ({reason}): name another folder, or remove this") from None


def open_header(folder: Path, header: MemoryHeader) -> None:
    """Check that a folder holds the memory that a header describes, or make it if nothing is there.

    Raises:
        DiskError: the disk is full or fails.
        UserError: the folder holds another memory; the message says in what it differs.
    """
    try:
        stored = read_header(folder)
    except FileNotFoundError:
        if any(folder.glob("epoch-*")):
            raise UserError(
                f"{folder}: holds answers without {HEADER}, so what they are of is unknown: remove this folder, or "
                "name another"
            ) from None
        make_folder(folder)
        write_json(folder / HEADER, header.to_json())
        stored = read_header(folder)
    if difference := header.difference(stored):
        raise UserError(
            f"{folder}: this memory is of something else: {difference}: name another folder, or remove this one"
        )
