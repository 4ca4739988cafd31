"""The contents of a memory: records per epoch, damaged ones, bytes on disk; the removal of what is of no use; and the
merging of the parts that nodes without a shared disk have written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, quoted
from karmma_dist.io.disk_errors import DiskError
from karmma_dist.io.files import open_regular, remove
from karmma_dist.memory.header import MemoryHeader, read_header
from karmma_dist.memory.records import SEAL_BYTES, AnswerFiles, answers_path, epoch_folder, stored_set
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
        """Number of epochs with as many answers as an epoch of the run that made the memory stores."""
        return sum(epoch.num_answers >= self.header.num_expected for epoch in self.epochs)

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
                epochs.append(_read_epoch(folder, int(match[1]), header, verify))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no memory: name a folder that distill.memory or model.encoders.X.memory of a recipe names"
        ) from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return Contents(folder, header, epochs)


def _read_epoch(folder: Path, number: int, header: MemoryHeader, verify: bool) -> Epoch:
    epoch = Epoch(number)
    for _, path, num_clips in _files(folder, number, header):
        epoch.disk_bytes += 512 * path.stat().st_blocks
        for _, record in _records(path, header.answer_bytes + SEAL_BYTES, num_clips, only_seal=not verify):
            stored = stored_set(record) if verify else any(record)
            epoch.num_answers += bool(stored)
            epoch.num_damaged += stored is None
    return epoch


def _files(folder: Path, epoch: int, header: MemoryHeader) -> Iterator[tuple[str, Path, int]]:
    """Yield the shard, the path and the number of clips of each file of an epoch that exists."""
    for shard, num_clips in header.num_clips.items():
        path = answers_path(folder, epoch, shard)
        if path.exists():
            yield shard, path, num_clips


def _records(
    path: Path, record_bytes: int, num_clips: int, *, only_seal: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield the place and the bytes of each record that the file reaches to; with `only_seal`, only its last bytes."""
    with open_regular(path) as file:
        for row in range(min(num_clips, os.fstat(file.fileno()).st_size // record_bytes)):
            file.seek(row * record_bytes + (record_bytes - SEAL_BYTES if only_seal else 0))
            yield row, file.read(SEAL_BYTES if only_seal else record_bytes)


def prune(contents: Contents) -> list[str]:
    """Remove the damaged answers, and the epochs of a teacher's memory that lack some; return a line about each.

    A view of an encoder's memory is never removed: modality dropout fills it over several epochs.

    Raises:
        DiskError: the disk fails.
        UserError: the memory cannot be read or written.
    """
    lines, expected = [], contents.header.num_expected
    try:
        for epoch in contents.epochs:
            path = epoch_folder(contents.folder, epoch.number)
            if contents.header.kind == "logits" and epoch.num_answers < expected:
                remove(path)
                lines.append(f"{path}: removed, it had {epoch.num_answers} of {expected} answers")
                continue
            lines += [f"{place}: removed, it was damaged" for place in _remove_damaged(epoch.number, contents)]
    except DiskError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or contents.folder}: cannot be changed: {error.strerror}") from None
    return lines


def change_contents(folder: Path, others: Iterable[Path], *, is_pruned: bool) -> Iterator[str]:
    """Merge other memories into one, then prune it if asked to; yield a line about each change.

    Raises:
        UserError: see `merge`, `prune` and `read_contents`.
    """
    for other in others:
        num_added = merge(read_contents(folder), read_contents(other))
        yield f"{folder}: {num_added:,} answers added from {other}"
    if is_pruned:
        yield from prune(read_contents(folder))


def _remove_damaged(number: int, contents: Contents) -> Iterator[str]:
    """Remove the damaged answers of an epoch; yield the place of each."""
    with _opened(contents) as files:
        for shard, path, num_clips in _files(contents.folder, number, contents.header):
            records = _records(path, files.record_bytes, num_clips)
            damaged = [row for row, record in records if stored_set(record) is None]
            for row in damaged:
                files.remove(number, shard, row)
                yield f"{path}, record {row}"


@contextmanager
def _opened(contents: Contents) -> Iterator[AnswerFiles]:
    files = AnswerFiles(contents.folder, contents.header.answer_bytes, dict(contents.header.num_clips))
    try:
        yield files
    finally:
        files.close()


def merge(contents: Contents, other: Contents) -> int:
    """Add to a memory the answers of another of the same that it lacks; return their number.

    Raises:
        DiskError: the disk is full or fails.
        UserError: the other memory is of something else, or a file cannot be read or written.
    """
    if difference := contents.header.difference(other.header, "the other's"):
        raise UserError(f"{other.folder}: not a part of {contents.folder}: {difference}")
    num_added = 0
    try:
        with _opened(contents) as files:
            for epoch in other.epochs:
                for shard, path, num_clips in _files(other.folder, epoch.number, other.header):
                    for row, record in _records(path, files.record_bytes, num_clips):
                        if modalities := stored_set(record):
                            answer = record[: files.answer_bytes]
                            num_added += files.write(epoch.number, shard, row, modalities, answer)
    except DiskError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or other.folder}: cannot be read: {error.strerror}") from None
    return num_added


def print_contents(contents: Contents, *, verified: bool) -> None:
    """Print a table of epochs, and what the memory is of."""
    header = contents.header
    what = "epoch" if header.kind == "logits" else "view"
    rows = [
        [str(epoch.number), f"{epoch.num_answers:,}", str(epoch.num_damaged) if verified else "?",
         f"{epoch.disk_bytes / 1e6:,.1f}"]
        for epoch in contents.epochs
    ]  # fmt: skip
    total_mb = sum(epoch.disk_bytes for epoch in contents.epochs) / 1e6
    footer = [
        f"{contents.num_complete} of {len(contents.epochs)} {what}s are complete ({header.num_expected:,} of "
        f"{contents.num_clips:,} clips); "
        f"{total_mb:,.1f} MB, {header.answer_bytes} bytes per answer ({header.dtype})",
        *(f"{name}: {quoted(value, 200)}" for name, value in header.facts.items()),
    ]
    numbers = [what, "answers", "damaged", "MB"]
    title = f"{contents.folder}: {header.kind}"
    if header.memory_subsets == "all":
        title += f", an answer is for all {header.shape[0]} subsets of the modalities"
    print_table(numbers, rows, right=numbers, title=title, footer=footer)
