"""What a memory holds: records per epoch, damaged ones, bytes on disk; and the removal of what is of no use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, quoted
from karmma_dist.io.files import open_regular, remove
from karmma_dist.memory.header import MemoryHeader, read_header
from karmma_dist.memory.records import SEAL_BYTES, SUFFIX, stored_set
from karmma_dist.terminal import print_table

_EPOCH = re.compile(r"epoch-([0-9]{5,})")


@dataclass
class Epoch:
    """The records of an epoch."""

    number: int
    """0-based epoch."""
    num_answers: int = 0
    """Clips with an answer."""
    num_damaged: int = 0
    """Clips whose answer has a wrong checksum; only counted with `verify`."""
    disk_bytes: int = 0
    """Bytes that its files take on disk."""


@dataclass
class Contents:
    """A memory's contents."""

    folder: Path
    header: MemoryHeader
    epochs: list[Epoch]

    @property
    def num_clips(self) -> int:
        """Number of clips of the split."""
        return sum(self.header.num_clips.values())

    @property
    def num_complete(self) -> int:
        """Number of epochs with an answer for every clip."""
        return sum(epoch.num_answers == self.num_clips for epoch in self.epochs)

    @property
    def num_damaged(self) -> int:
        """Number of damaged answers."""
        return sum(epoch.num_damaged for epoch in self.epochs)

    def to_json(self) -> dict[str, Any]:
        """Return the contents for JSON."""
        return {
            "path": str(self.folder), **self.header.to_json(), "clips": self.num_clips,
            "complete_epochs": self.num_complete, "damaged": self.num_damaged,
            "disk_bytes": sum(epoch.disk_bytes for epoch in self.epochs),
            "epochs": [asdict(epoch) for epoch in self.epochs],
        }  # fmt: skip


def read_contents(folder: Path, *, verify: bool = False) -> Contents:
    """Count the records of a memory.

    Args:
        folder: Folder of the memory.
        verify: True to check every record's checksum; otherwise only whether there is a record.

    Raises:
        UserError: the folder holds no memory, or cannot be read.
    """
    try:
        header = read_header(folder)
        epochs = []
        for path in sorted(folder.iterdir()):
            if match := _EPOCH.fullmatch(path.name):
                epochs.append(_read_epoch(path, int(match[1]), header, verify))
    except FileNotFoundError:
        raise UserError(f"{folder}: no memory: name the folder that distill.memory of a recipe names") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return Contents(folder, header, epochs)


def _read_epoch(folder: Path, number: int, header: MemoryHeader, verify: bool) -> Epoch:
    epoch = Epoch(number)
    for shard, num_clips in header.num_clips.items():
        path = folder / f"{shard.removesuffix('.tar')}{SUFFIX}"
        if not path.exists():
            continue
        epoch.disk_bytes += 512 * path.stat().st_blocks
        for record in _records(path, header.answer_bytes + SEAL_BYTES, num_clips):
            stored = stored_set(record) if verify else any(record[-SEAL_BYTES:])
            epoch.num_answers += bool(stored)
            epoch.num_damaged += stored is None
    return epoch


def _records(path: Path, record_bytes: int, num_clips: int) -> Iterator[bytes]:
    with open_regular(path) as file:
        for _ in range(num_clips):
            record = file.read(record_bytes)
            if len(record) == record_bytes:
                yield record


def prune(contents: Contents) -> list[str]:
    """Remove the epochs that lack answers, and what killed writers left; return a line about each."""
    lines = []
    for epoch in contents.epochs:
        if epoch.num_answers < contents.num_clips:
            path = contents.folder / f"epoch-{epoch.number:05d}"
            remove(path)
            lines.append(f"{path}: removed, it had {epoch.num_answers} of {contents.num_clips} answers")
    return lines


def print_contents(contents: Contents, *, verified: bool) -> None:
    """Print a table of epochs, and what the memory is of."""
    header = contents.header
    rows = [
        [str(epoch.number), f"{epoch.num_answers:,}", str(epoch.num_damaged) if verified else "?",
         f"{epoch.disk_bytes / 1e6:,.1f}"]
        for epoch in contents.epochs
    ]  # fmt: skip
    total_mb = sum(epoch.disk_bytes for epoch in contents.epochs) / 1e6
    footer = [
        f"{contents.num_complete} of {len(contents.epochs)} epochs are complete ({contents.num_clips:,} clips); "
        f"{total_mb:,.1f} MB, {header.answer_bytes} bytes per answer ({header.dtype})",
        *(f"{name}: {quoted(value, 200)}" for name, value in header.facts.items()),
    ]
    numbers = ["epoch", "answers", "damaged", "MB"]
    print_table(numbers, rows, right=numbers, title=f"{contents.folder}: {header.kind}", footer=footer)
