"""Writing of files so that each is complete or absent, and their hashes; planted names are neither followed nor kept.

    .NAME.MACHINE-PID-RANDOM.partial      a file that is being written; it is renamed to NAME once it is complete

Every write uses a new temporary name and creates it exclusively. If the final name is a symbolic link, the file
replaces the link, and the link's target stays as it is. The leftover of a killed writer has a hidden name that ends in
`.partial`, so it is never taken for data; the next process that writes into the folder removes it at once if its
writer ran on this machine, otherwise once it has not been written to for a day.

Whatever the disk refuses comes out with the final name of the file (`disk_errors.DiskError`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import naming
from karmma_dist.processes import machine, started_at

MOST_BYTES = 256 << 20
"""Bytes of a file that is read whole, unless its reader allows for more or less."""
_LEFT_AFTER_S = 86_400.0
"""A temporary file of another machine that has not changed for so long was left by a killed writer."""
_MOST_NAME_BYTES = 200
"""Bytes of the final name that go into a temporary one: file systems allow 255 in all."""
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{8}\.partial", re.DOTALL)
_LINK = "is a symbolic link, and what is written would go elsewhere: remove it"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: Path, mode: int = 0o666) -> int:
    """Create a file and return its descriptor, open for reading and writing.

    Raises:
        FileExistsError: something has this name, be it a link to nowhere.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def append(path: Path) -> IO[bytes]:
    """Open a file, new or not, to write at its end.

    Raises:
        DiskError: the disk is full or fails.
        UserError: it is a symbolic link.
    """
    return io.BufferedWriter(_NamedFile(path, path, _open_end(path)))


def append_whole(path: Path, content: bytes) -> None:
    """Write at the end of a file, new or not: all of it, or nothing if the disk does not take it.

    Raises:
        DiskError: the disk is full or fails.
        UserError: it is a symbolic link.
    """
    descriptor = _open_end(path)
    written = 0
    try:
        with naming(path):
            while written < len(content):
                written += os.write(descriptor, content[written:])
    except OSError:
        end = os.lseek(descriptor, 0, os.SEEK_CUR)
        if written and os.fstat(descriptor).st_size == end:  # otherwise another process has written after it
            os.ftruncate(descriptor, end - written)
        raise
    finally:
        with naming(path):
            os.close(descriptor)


def _open_end(path: Path) -> int:
    try:
        with naming(path):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: {_LINK}") from None
        raise


class _NamedFile(io.FileIO):
    """An open file whose errors of writing bear the name that the file is to have."""

    def __init__(self, path: Path, temporary: Path, descriptor: int) -> None:
        super().__init__(descriptor, "wb")
        self._path, self._temporary = path, temporary

    def write(self, data: Any, /) -> int:
        """Write bytes, maybe not all of them, and return how many."""
        with naming(self._path, self._temporary):
            return super().write(data)

    def close(self) -> None:
        """Close the file; some file systems say only now that they could not write."""
        with naming(self._path, self._temporary):
            super().close()


def refuse_link(path: Path) -> None:
    """Refuse a folder that is to be filled and emptied where a symbolic link has its name.

    Raises:
        UserError: it is a symbolic link.
    """
    if path.is_symlink():
        raise UserError(f"{path}: {_LINK}")


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, whose target stays; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name, new at every call, for what becomes `path` when it is whole; it is in the same folder.

    Raises:
        UserError: `path` is a device, a pipe or a socket, which a file would replace.
    """
    _refuse_device(path)
    _tidy(path.parent)
    short = path.name.encode(errors="surrogateescape")[:_MOST_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{short}.{_short_machine()}-{os.getpid()}-{secrets.token_hex(4)}.partial")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write, which gets the name `path` at the end of the block, and none at all if the block fails.

    Raises:
        DiskError: the disk is full or fails.
    """
    temporary = temporary_name(path)
    try:
        with naming(path, temporary):
            raw = _NamedFile(path, temporary, create(temporary))
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            with naming(path, temporary):
                os.fsync(file.fileno())
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only disk must not hide the error
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file completely or not at all; an earlier file stays until the new one is complete.

    It is written under a temporary name, synced and renamed. The umask decides who may read it, whatever mode the
    writer sets: safetensors writes files that only their owner may read.

    Args:
        path: Path of the file.
        content: Bytes to write, or a function that writes the file to the given path.

    Raises:
        DiskError: the disk is full or fails, as the operating system or a library says.
    """
    if isinstance(content, bytes):
        with whole_file(path) as file:
            file.write(content)
        return
    temporary = temporary_name(path)
    try:
        with naming(path, temporary):
            descriptor = create(temporary)
            try:
                mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            finally:
                os.close(descriptor)
            content(temporary)
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # it may have been made anew
            try:
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a read-only disk must not hide the error
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which gets the name `path` at the end of the block, and is removed if the block fails.

    Raises:
        DiskError: the disk is full or fails.
    """
    temporary = temporary_name(path)
    with naming(path, temporary):
        temporary.mkdir()
        try:
            yield temporary
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder for temporary files ($TMPDIR, else /tmp), which is removed with all that is in it.

    Raises:
        UserError: none can be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"no folder for temporary files can be made ({error.strerror or error}): free some space, or set TMPDIR to "
            "a folder that can be written"
        ) from None
    with folder as name:
        yield Path(name)


def _rename(temporary: Path, path: Path) -> None:
    with naming(path, temporary):
        os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write compact JSON, completely or not at all."""
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return compact JSON in UTF-8: one line with its line break."""
    return (json_text(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def json_text(value: Any, **layout: Any) -> str:
    """Return JSON, with null for each number that is not finite: JSON has no NaN.

    Args:
        value: The value.
        layout: Arguments of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except ValueError:
        return json.dumps(_with_gaps(value), allow_nan=False, **layout)


def _with_gaps(value: Any) -> Any:
    """Return a JSON value in which None replaces each number that is not finite."""
    if isinstance(value, dict):
        return {name: _with_gaps(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_with_gaps(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read, at once even if it is a FIFO that nobody writes.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return file


def read_file(path: Path, limit: int = MOST_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        path: Path of the file.
        limit: Largest number of bytes that such a file may have.

    Raises:
        OSError: it cannot be read, is larger, or is no regular file (a FIFO would block and a device never end);
            `strerror` says what.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else None  # one that grows is read to the limit
    if content is None or len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return content


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_left(folder: Path) -> None:
    """Remove from a folder what killed writers left in it; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            with contextlib.suppress(OSError):
                is_of_here = machine() is not None and match[1] == _short_machine()
                is_dead = is_of_here and started_at(int(match[2])) is None
                if is_dead or (not is_of_here and _age_s(folder, entry) > _LEFT_AFTER_S):
                    remove(Path(entry.path))


def _refuse_device(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing there, or nothing can be written there, which the writer finds out
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
    if not is_file or path.absolute().parent == Path("/dev"):
        raise UserError(f"{path}: a device or pipe: name a file to write")


def _age_s(folder: Path, entry: os.DirEntry[str]) -> float:
    """Return how long an entry has not changed, by the clock of its file system alone."""
    probe = folder / f".{secrets.token_hex(4)}.partial"
    os.close(create(probe))
    try:
        return os.stat(probe).st_mtime - entry.stat(follow_symlinks=False).st_mtime
    finally:
        probe.unlink(missing_ok=True)


@functools.cache
def _tidy(folder: Path) -> None:
    """Remove what killed writers left, when this process first writes into a folder: scanning it each time is slow."""
    remove_left(folder)


@functools.cache
def _short_machine() -> str:
    return hashlib.sha256((machine() or socket.gethostname()).encode()).hexdigest()[:8]
