"""The cache of downloaded files, named by the sha256 of their bytes and shared by all processes of a node.

    CACHE/
      3f0c...e1                 an entry: downloaded completely, checked, then renamed to its sha256 (or, if the
                                expected bytes are unknown, to the sha256 of its URL)
      .3f0c...e1.partial        a download in progress
      .3f0c...e1.lock           held (flock) by the process that downloads; the others wait for it
      .lock                     held while entries get their names and while old entries are removed
      weights/                  starting weights: a separate cache, from which no entry is removed for space

Every lock belongs to the kernel and ends with its process: if a downloader is killed, a waiting process takes over.
An entry may be removed while other processes read it, because they hold it open; the next reader fetches it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of

_ENTRY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.([0-9a-f]{64})\.partial")


def cache_root(cache_dir: str | None) -> Path:
    """Return the cache folder of this node: `cache_dir`, else $KARMMA_DIST_CACHE, else ~/.cache/karmma-dist."""
    root = cache_dir or os.environ.get("KARMMA_DIST_CACHE") or "~/.cache/karmma-dist"
    return Path(root).expanduser().absolute()


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


@dataclass(frozen=True, slots=True)
class Content:
    """The expected content of a file."""

    sha256: str | None
    """Hexadecimal sha256; None if unknown."""
    size: int | None
    """Size in bytes; None if unknown."""
    url: str = ""
    """URL of the file; required if `sha256` is None."""

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
            UserError: the folder cannot be written, or its disk is full.
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
                f"cache folder {self.root}: {error.strerror}: name another one (data.cache_dir or KARMMA_DIST_CACHE)"
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
        try:
            descriptor = os.open(self.root / content.name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if content.size is not None and os.fstat(descriptor).st_size != content.size:
            os.close(descriptor)
            self.remove(content)
            return None
        return descriptor

    def _download(self, content: Content, fetch: Fetch) -> int | None:
        """Download an entry and open it; return None if another process held the lock and released it meanwhile."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry, partial = self.root / content.name, self.root / f".{content.name}.partial"
        with _turn(self.root / f".{content.name}.lock") as held:
            if held is None or entry.exists():
                return None
            try:
                fetch(partial)
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                with self._alone():
                    self._make_room(partial.stat().st_size)
                    os.replace(partial, entry)
                    return os.open(entry, os.O_RDONLY)  # before another process can remove it
            except FetchError as error:
                held.write(json.dumps(error.args))
                raise
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.root / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Remove the least recently used entries until `size` bytes fit, and the partial files of dead downloads."""
        entries: list[tuple[int, int, str]] = []
        for item in os.scandir(self.root):
            if _ENTRY.fullmatch(item.name):
                stat = item.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, item.path))
            elif match := _PARTIAL.fullmatch(item.name):
                self._remove_if_dead(match[1])
        excess = sum(entry[1] for entry in entries) + size - self.limit_bytes
        for _, freed, path in sorted(entries):
            if excess <= 0:
                return
            os.unlink(path)
            excess -= freed

    def _remove_if_dead(self, sha256: str) -> None:
        lock = self.root / f".{sha256}.lock"
        with open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # its download is alive
            if _is_at(file, lock):
                (self.root / f".{sha256}.partial").unlink(missing_ok=True)
                file.truncate(0)
                lock.unlink()


@contextmanager
def _turn(lock: Path) -> Iterator[TextIO | None]:
    """Wait for a lock file and yield it, or yield None if its holder finished meanwhile.

    A holder removes the file before releasing the lock, so a process that finds the file removed has waited for a
    finished holder; the file then contains the holder's error, if any. A file that still exists is new or was left by a
    dead process.

    Raises:
        FetchError: the download of the holder failed.
    """
    with open(lock, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_at(file, lock):
            file.seek(0)
            if failure := file.read():
                raise FetchError(*json.loads(failure))
            yield None
            return
        file.truncate(0)
        try:
            yield file
        finally:
            file.flush()
            lock.unlink()


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
