"""The cache of downloaded files, named by the sha256 of their bytes and shared by all processes of a node.

    CACHE/
      3f0c...e1                 an entry: downloaded completely, checked, then renamed to its sha256 (or, if the
                                expected bytes are unknown, to the sha256 of its URL)
      .3f0c...e1.RANDOM.partial/  a download in progress, in a folder of its own
      .3f0c...e1.lock           held by the process that downloads; the others wait for it (see `io.locks`)
      .lock                     held while entries get their names and while old entries are removed
      weights/                  starting weights: a separate cache, from which no entry is removed for space

Room is made before a download: where the size of an entry is known, the least recently used ones go first, so that it
fits below the limit and onto the disk, and what cannot fit is not downloaded.
Every lock ends with its process: if a downloader is killed, a waiting process takes over.
An entry may be removed while other processes read it, because they hold it open; the next reader fetches it again.

The folder is made for its owner alone. A folder of another user, or one that others may write to, is refused. If others
may only add files (the sticky bit, as in /tmp), an entry of another user or one that others may write to is refused.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import free_bytes
from karmma_dist.io.files import MOST_BYTES, remove, sha256_of
from karmma_dist.io.json_fields import JsonObject, parse_strictly, shown
from karmma_dist.io.locks import FileLock

_ENTRY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.([0-9a-f]{64})\.(?:[0-9a-f]+\.)?partial")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SETTINGS = "data.cache_dir or KARMMA_DIST_CACHE"


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder of this node: `cache_dir`, else $KARMMA_DIST_CACHE, else ~/.cache/karmma-dist.

    Raises:
        UserError: its home folder is unknown.
    """
    root = cache_dir or os.environ.get("KARMMA_DIST_CACHE") or "~/.cache/karmma-dist"
    expanded = os.path.expanduser(root)
    if expanded.startswith("~"):
        raise UserError(f"cache folder {root}: no such home folder is known: name another one ({_SETTINGS})")
    return Path(expanded).absolute()


class FetchError(Exception):
    """A file that could not be downloaded.

    Attributes:
        what: The reason, for messages; it contains no credentials.
        damaged: True if the server responded but the file is missing or differs from the packed one.
        passing: True if another try may help.
    """

    def __init__(self, what: str, damaged: bool, passing: bool = False) -> None:
        super().__init__(what, damaged, passing)
        self.what, self.damaged, self.passing = what, damaged, passing


class NotFoundError(FetchError):
    """A file that the server does not have."""


@dataclass(frozen=True, slots=True)
class Content:
    """The expected content of a file."""

    sha256: str | None
    """Hexadecimal sha256; None if unknown."""
    size: int | None
    """Size in bytes; None if unknown."""
    url: str = ""
    """URL of the file; required if `sha256` is None."""
    most_bytes: int = MOST_BYTES
    """Largest number of bytes that such a file may have, where `size` is unknown."""

    def __post_init__(self) -> None:
        """Take a known size as the largest."""
        if self.size is not None:
            object.__setattr__(self, "most_bytes", self.size)

    @property
    def name(self) -> str:
        """Name of the file in the cache."""
        return self.sha256 or hashlib.sha256(self.url.encode()).hexdigest()

    def problem(self, path: Path) -> str:
        """Return the problem of the file at `path`, or an empty string."""
        actual_size = path.stat().st_size
        if self.size is not None and actual_size != self.size:
            return f"{actual_size} bytes instead of {self.size}"
        return "" if self.sha256 in (None, sha256_of(path)) else "sha256 differs from the manifest's"


Fetch = Callable[[Path], None]
"""Function that writes a complete, checked file to the given path, or raises `FetchError`."""


@dataclass(frozen=True)
class Cache:
    """The cache folder and its limit. It is cheap to pickle; every process of a node opens the same folder."""

    root: Path
    limit_bytes: float = math.inf
    """Limit of the total size of entries; downloads in progress are not counted."""

    def open(self, content: Content, fetch: Fetch) -> int:
        """Return a file descriptor of an entry, after downloading the entry if needed.

        Of several processes that open the same entry, one downloads it. Processes that waited for a failed download
        raise its error instead of repeating the download.

        Raises:
            FetchError: the file could not be downloaded.
            UserError: the folder cannot be written, its disk is full, others may write to it, or an entry of this
                size does not fit.
        """
        try:
            while True:
                descriptor = self._open_entry(content)
                if descriptor is None:
                    descriptor = self._download(content, fetch)
                if descriptor is not None:
                    os.utime(descriptor)  # for removal in order of use: file systems may not keep access times
                    return descriptor
        except OSError as error:
            lower = f", or lower data.cache_bytes ({self.limit_bytes}) below what its disk has room for"
            raise UserError(
                f"cache folder {self.root}: {error.strerror}: name another one ({_SETTINGS})"
                f"{lower if self.limit_bytes < math.inf else ''}"
            ) from None

    def remove_if_damaged(self, content: Content) -> bool:
        """Read an entry and remove it if its bytes have changed since they were checked; return True if removed."""
        try:
            damaged = bool(content.problem(self.root / content.name))
        except FileNotFoundError:
            return True  # another process has removed it
        if damaged:
            self.remove(content)
        return damaged

    def remove(self, content: Content) -> None:
        """Remove an entry if it exists."""
        with self._alone():
            (self.root / content.name).unlink(missing_ok=True)

    def _open_entry(self, content: Content) -> int | None:
        entry = self.root / content.name
        try:
            is_shared = _is_shared(self.root)
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self.remove(content)  # the link, not its target
            return None
        status = os.fstat(descriptor)
        if is_shared and (not _is_ours(status) or status.st_mode & _OTHERS_WRITE):
            os.close(descriptor)
            raise UserError(f"{entry}: in the hands of another user: name another cache folder ({_SETTINGS})")
        if content.size is not None and status.st_size != content.size:
            os.close(descriptor)
            self.remove(content)
            return None
        return descriptor

    def _download(self, content: Content, fetch: Fetch) -> int | None:
        """Download an entry and open it; return None if another process held the lock and released it meanwhile."""
        _make_private(self.root)
        _is_shared(self.root)
        entry = self.root / content.name
        with _turn(self.root / f".{content.name}.lock") as held:
            if held is None or entry.exists():
                return None
            partial = self.root / f".{content.name}.{secrets.token_hex(8)}.partial"
            try:
                self._remove_partials(content.name)
                if content.size is not None:
                    with self._alone():
                        self._make_room(content.size, is_new=True)
                partial.mkdir(mode=0o700)  # nobody else can put a link into it between two tries
                file = partial / "file"
                fetch(file)
                descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~_OTHERS_WRITE)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                with self._alone():
                    self._make_room(file.stat().st_size)
                    os.replace(file, entry)
                    return os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # before anybody can remove it
            except FetchError as error:
                held.write(json.dumps(error.args))
                raise
            finally:
                remove(partial)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.root / ".lock") as lock:
            lock.take()
            yield

    def _make_room(self, size: int, is_new: bool = False) -> None:
        """Remove the least recently used entries until `size` bytes fit, and the partial files of dead downloads.

        Args:
            size: Number of bytes.
            is_new: The bytes are yet to be written, so the disk needs room for them too.

        Raises:
            UserError: they cannot fit; nothing was removed for them.
        """
        entries: list[tuple[int, int, str]] = []
        for item in os.scandir(self.root):
            if _ENTRY.fullmatch(item.name):
                status = item.stat(follow_symlinks=False)
                entries.append((status.st_mtime_ns, status.st_size, item.path))
            elif match := _PARTIAL.fullmatch(item.name):
                self._remove_if_dead(match[1])
        used = sum(entry[1] for entry in entries)
        excess = used + size - self.limit_bytes
        if is_new:
            excess = max(excess, self._missing_bytes(size, used))
        for _, freed, path in sorted(entries):
            if excess <= 0:
                return
            os.unlink(path)
            excess -= freed

    def _missing_bytes(self, size: int, used: int) -> int:
        """Return how many bytes of entries must go, so that the disk has room for `size` more."""
        if size > self.limit_bytes:
            raise UserError(
                f"cache folder {self.root}: a file of {size} bytes does not fit into data.cache_bytes "
                f"({self.limit_bytes}): raise it"
            )
        free = free_bytes(self.root)
        if free is not None and size > free + used:
            raise UserError(
                f"cache folder {self.root}: no room for a file of {size} bytes: {free} bytes of its disk are free, "
                f"{used} are the cache's: free some space, or name another folder ({_SETTINGS})"
            )
        return 0 if free is None else size - free

    def _remove_if_dead(self, name: str) -> None:
        with FileLock(self.root / f".{name}.lock") as lock:
            if lock.take(wait=False) and lock.is_at_its_path():  # otherwise its download is alive, or just done
                self._remove_partials(name)
                lock.file.truncate(0)
                lock.path.unlink()

    def _remove_partials(self, name: str) -> None:
        """Remove what dead downloads of an entry left; the caller has its turn."""
        for left in self.root.glob(f".{name}.*partial"):
            remove(left)


def _make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone."""
    for missing in reversed([above for above in (folder, *folder.parents) if not above.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)  # raises where it is no folder


@functools.cache
def _is_shared(folder: Path) -> bool:
    """Return True if others may add files to a folder, but not change those of this user.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it is another user's, or others may write to it.
    """
    status = folder.stat()
    if not _is_ours(status):
        raise UserError(f"cache folder {folder}: belongs to another user: name one of your own ({_SETTINGS})")
    if not status.st_mode & _OTHERS_WRITE:
        return False
    if not status.st_mode & stat.S_ISVTX:
        raise UserError(
            f"cache folder {folder}: others may write to it (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"chmod go-w {folder}, or name another one ({_SETTINGS})"
        )
    return True


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _failure(text: str) -> FetchError:
    """Return the error that the holder of a lock file wrote into it, with its cause alone if it is not whole."""
    try:
        message, damaged, passing = JsonObject({"arguments": parse_strictly(text)}).items("arguments")
    except ValueError:
        return FetchError(f"failed in another process: {shown(text)}", damaged=False)
    return FetchError(str(message), damaged is True, passing is True)


@contextmanager
def _turn(path: Path) -> Iterator[IO[str] | None]:
    """Wait for a lock file and yield it, or yield None if its holder finished meanwhile.

    A holder removes the file before releasing the lock, so a process that finds the file removed has waited for a
    finished holder; the file then contains the holder's error, if any. A file that still exists is new or was left by a
    dead process.

    Raises:
        FetchError: the download of the holder failed.
    """
    with FileLock(path) as lock:
        lock.take()
        if not lock.is_at_its_path():
            lock.file.seek(0)
            if failure := lock.file.read():
                raise _failure(failure)
            yield None
            return
        lock.file.truncate(0)
        try:
            yield lock.file
        finally:
            lock.file.flush()
            path.unlink()
