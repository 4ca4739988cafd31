"""The answers of a memory: a file per epoch and shard, with a record of fixed size per clip.

    PATH/epoch-00003/train-000012.answers

    record    answer | set of modalities, uint32 | crc32 of both, uint32      little-endian; zeros: not there yet

A record is written in one call by the rank that has the clip, so any number of runs may read a memory and extend it at
the same time. A record that a killed writer left half-written has a wrong checksum, like one
that was damaged since, and its answer is computed anew. Files are read by position and not mapped: a mapped file whose
disk disappears ends the process without a word.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import naming

_SUFFIX = ".answers"
_MOST_OPEN = 128
_SEAL = struct.Struct("<II")
SEAL_BYTES = _SEAL.size
"""Bytes at the end of a record: the set of modalities and the checksum."""


def epoch_folder(folder: Path, epoch: int) -> Path:
    """Return the folder of an epoch of a memory."""
    return folder / f"epoch-{epoch:05d}"


def answers_path(folder: Path, epoch: int, shard: str) -> Path:
    """Return the path of the file of an epoch and a shard, whose tar has the name `shard`."""
    return epoch_folder(folder, epoch) / f"{shard.removesuffix('.tar')}{_SUFFIX}"


def stored_set(record: bytes) -> int | None:
    """Return the set of modalities of a record's answer: 0 if there is no answer yet, None if it is damaged."""
    modalities, crc32 = _SEAL.unpack_from(record, len(record) - SEAL_BYTES)
    if not modalities and not crc32:
        return 0  # the seal is written last: a writer is at it, or was killed
    return int(modalities) if zlib.crc32(record[:-4]) == crc32 else None


@dataclass
class Lookups:
    """Counts of what was looked for."""

    found: int = 0
    absent: int = 0
    damaged: int = 0
    """Records with a wrong checksum."""
    first_damaged: str = ""
    """File and place of the first of them."""
    num_bytes: int = 0
    """Bytes that were read."""

    def __add__(self, other: Lookups) -> Lookups:
        """Return the counts of both."""
        return Lookups(
            self.found + other.found, self.absent + other.absent, self.damaged + other.damaged,
            self.first_damaged or other.first_damaged, self.num_bytes + other.num_bytes,
        )  # fmt: skip


class AnswerFiles:
    """The files of a memory, opened when they are first needed; cheap to pickle, without open files.

    Args:
        folder: Folder of the memory.
        answer_bytes: Bytes of an answer.
        num_clips: Number of clips by shard name.
    """

    def __init__(self, folder: Path, answer_bytes: int, num_clips: dict[str, int]) -> None:
        self.folder, self.answer_bytes, self._num_clips = folder, answer_bytes, num_clips
        self.lookups = Lookups()
        self._open: dict[tuple[int, str, bool], int] = {}

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        return self.answer_bytes + _SEAL.size

    def __getstate__(self) -> dict[str, object]:
        """Return the state without open files."""
        return {**self.__dict__, "_open": {}, "lookups": Lookups()}

    def read(self, epoch: int, shard: str, row: int, modalities: int) -> bytes | None:
        """Return a clip's answer; None if it is not there, damaged, or for another set of modalities.

        Args:
            epoch: 0-based epoch.
            shard: File name of the clip's tar.
            row: 0-based place of the clip in it.
            modalities: Set of modalities of the answer, bit m for modality m.

        Raises:
            UserError: the disk fails.
        """
        descriptor = self._descriptor(epoch, shard, writes=False)
        record = b"" if descriptor is None else self._pread(descriptor, epoch, shard, row)
        self.lookups.num_bytes += len(record)
        stored = 0 if len(record) < self.record_bytes else stored_set(record)
        if stored is None:
            place = f"{self.path(epoch, shard)}, record {row}"
            self.lookups.first_damaged = self.lookups.first_damaged or place
            self.lookups.damaged += 1
            return None
        if stored != modalities:
            self.lookups.absent += 1
            return None
        self.lookups.found += 1
        return record[: self.answer_bytes]

    def write(self, epoch: int, shard: str, row: int, modalities: int, answer: bytes) -> bool:
        """Store a clip's answer; see `read`. Return False if a whole answer is there already, which is kept.

        Raises:
            DiskError: the disk is full or fails.
        """
        if len(answer) != self.answer_bytes:
            raise ValueError(f"an answer of {len(answer)} bytes, expected {self.answer_bytes}")
        sealed = answer + struct.pack("<I", modalities)
        record = sealed + struct.pack("<I", zlib.crc32(sealed))
        descriptor = self._descriptor(epoch, shard, writes=True)
        assert descriptor is not None
        before = self._pread(descriptor, epoch, shard, row)
        if len(before) == self.record_bytes and stored_set(before):
            return False  # others have read it; runs with other modality dropout would take turns in replacing theirs
        with naming(self.path(epoch, shard)):
            if os.pwrite(descriptor, record, row * self.record_bytes) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return True

    def remove(self, epoch: int, shard: str, row: int) -> None:
        """Remove a clip's answer, whole or damaged; see `read`.

        Raises:
            DiskError: the disk fails.
            UserError: the file cannot be opened.
        """
        descriptor = self._descriptor(epoch, shard, writes=True)
        assert descriptor is not None
        with naming(self.path(epoch, shard)):
            os.pwrite(descriptor, bytes(self.record_bytes), row * self.record_bytes)

    def path(self, epoch: int, shard: str) -> Path:
        """Return the path of the file of an epoch and a shard."""
        return answers_path(self.folder, epoch, shard)

    def close(self) -> None:
        """Close all files; the next read or write opens them again."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def _pread(self, descriptor: int, epoch: int, shard: str, row: int) -> bytes:
        try:
            return os.pread(descriptor, self.record_bytes, row * self.record_bytes)
        except OSError as error:
            raise UserError(
                f"{self.path(epoch, shard)}: cannot be read: {error.strerror}: mount its disk again, or train without "
                "this memory"
            ) from None

    def _descriptor(self, epoch: int, shard: str, *, writes: bool) -> int | None:
        """Return an open file; None if it does not exist yet and is only to be read."""
        key = (epoch, shard, writes)
        if key not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self.close()
            flags = (os.O_RDWR | os.O_CREAT if writes else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            path = self.path(epoch, shard)
            if writes:
                self._make_folder(path.parent)
            try:
                with naming(path):
                    descriptor = os.open(path, flags, 0o666)
            except FileNotFoundError:
                return None  # it may be there at the next look
            except OSError as error:
                raise UserError(f"{path}: cannot be opened: {error.strerror}: name another folder") from None
            self._open[key] = descriptor
            if writes:
                self._extend(path, descriptor, self._num_clips[shard] * self.record_bytes)
        return self._open[key]

    def _make_folder(self, folder: Path) -> None:
        """Make the folder of an epoch, but not that of a memory that is gone: its header would be missing."""
        try:
            with naming(folder):
                folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise UserError(
                f"{self.folder}: the memory is gone: mount its disk again, or name another folder"
            ) from None

    def _extend(self, path: Path, descriptor: int, num_bytes: int) -> None:
        """Give a new file its size; the disk takes room for records as they are written."""
        with naming(path):
            if os.fstat(descriptor).st_size < num_bytes:
                os.ftruncate(descriptor, num_bytes)
