"""Errors of the disk that is written to: each names the file and says what to do, whichever library wrote.

    with naming(Path("runs/a/weights.safetensors")):
        save_file(...)
    # DiskError: runs/a/weights.safetensors: No space left on device: free some space in runs/a, then run the same
    # command again to resume

A library may hide the operating system's error: safetensors raises its own exception with the number in its text,
pyarrow puts it into a longer message, and most give no name of a file. Only an error that bears such a number is
translated; any other exception is a bug and stays as it is.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from karmma_dist.errors import UserError

_AGAIN = "then run the same command again to resume"
_ADVICE = {
    errno.ENOSPC: f"free some space in {{folder}}, {_AGAIN}",
    errno.EDQUOT: f"your quota is used up: remove files of yours from the disk of {{folder}}, {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files in {{folder}} (ulimit -f, or its disk's), {_AGAIN}",
    errno.EROFS: f"make {{folder}} writable, {_AGAIN}, or name another folder",
    errno.EIO: f"the disk of {{folder}} fails (see dmesg): mend it, {_AGAIN}",
    errno.ESTALE: f"the server of {{folder}} has lost it: mount it again, {_AGAIN}",
}
"""Errors that are the disk's and not the program's."""
_NO_INODES = f"the disk takes no more files: remove some in {{folder}}, {_AGAIN}"
_OS_ERROR = re.compile(r"\(os error ([0-9]{1,5})\)")
"""Number of an error in the messages of libraries written in Rust."""


class DiskError(OSError, UserError):
    """A disk that does not take a file: it is full, over a quota, read-only or failing. Its text is one line."""

    def __str__(self) -> str:
        """Return file, problem and remedy."""
        folder = _nearest(Path(self.filename))
        assert self.errno is not None
        advice = _NO_INODES if self.errno == errno.ENOSPC and _has_no_inodes(folder) else _ADVICE[self.errno]
        return f"{self.filename}: {self.strerror}: {advice.format(folder=folder)}"


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Give errors of the disk in the block the name of the file that is being written.

    An error that names another file, such as one that is read meanwhile, stays as it is.

    Args:
        path: The file or folder to name.
        temporary: Its name until it is whole; errors that name this, or a file in it, name `path` instead.

    Raises:
        DiskError: the disk is full, over a quota, read-only or failing.
        OSError: another error of the operating system, such as a missing permission.
    """
    try:
        yield
    except Exception as error:
        number, named = _number(error), _named(getattr(error, "filename", None), path, temporary or path)
        if number is None or named is None:
            raise
        if number in _ADVICE:
            raise DiskError(number, os.strerror(number), named) from error
        if not isinstance(error, OSError):
            raise OSError(number, os.strerror(number), named) from error
        error.filename = named
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        DiskError: see `naming`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        with naming(Path(error.filename or path)):
            raise


def free_bytes(folder: Path) -> int | None:
    """Return how many bytes this user may still write to the disk of a folder; None if it does not say."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def _number(error: Exception) -> int | None:
    """Return the operating system's number of an error; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return None if match is None else int(match[1])


def _named(filename: object, path: Path, temporary: Path) -> str | None:
    """Return the name that an error is to bear; None if it names another file than the temporary one."""
    if not isinstance(filename, str | bytes | os.PathLike) or not filename:
        return str(path)
    named = Path(os.fsdecode(filename))
    if named.is_relative_to(path):
        return str(named)
    return str(path / named.relative_to(temporary)) if named.is_relative_to(temporary) else None


def _nearest(path: Path) -> Path:
    """Return the folder of a file, or the next one above that exists: one that was being made may be gone again."""
    return next((above for above in path.parents if above.is_dir()), path.parent)


def _has_no_inodes(folder: Path) -> bool:
    """Return True if there is space for bytes but none for names."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return False
    return status.f_files > 0 and status.f_favail == 0 and status.f_bavail > 0
