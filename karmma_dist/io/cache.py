"""A folder of whole downloaded files named by the sha256 of their bytes, shared by all processes of a node.

    CACHE/
      3f0c...e1                 an entry: downloaded whole, checked, then renamed to its sha256 (or, where nobody
                                said which bytes to expect, to the sha256 of its URL)
      .3f0c...e1.partial        a download on its way
      .3f0c...e1.lock           held (flock) by the process that downloads; the others wait for it
      .lock                     held while entries get their names and while old ones are removed
      weights/                  starting weights: a cache of its own, which nothing is removed from

Every lock is the kernel's and goes with its process: when a downloader is killed, one of those who wait takes over.
An entry is removed while others read it without harm, because they hold it open; the next one fetches it again.
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
    """The cache folder of this node: the one that is given, else $KARMMA_DIST_CACHE, else ~/.cache/karmma-dist."""
    root = cache_dir or os.environ.get("KARMMA_DIST_CACHE") or "~/.cache/karmma-dist"
    return Path(root).expanduser().absolute()


class FetchError(Exception):
    """A file could not be had.

    Attributes:
        what: The reason, fit for a message: no credentials in it.
        damaged: The server was there but this file is gone or is not the one that was packed.
        passing: Trying again may help.
    """

    def __init__(self, what: str, damaged: bool, passing: bool = False) -> None:
        super().__init__(what, damaged, passing)
        self.what, self.damaged, self.passing = what, damaged, passing


@dataclass(frozen=True, slots=True)
class Content:
    """What a file must hold."""

    sha256: str | None
    """Hex; None where it is not known beforehand."""
    size: int | None
    """Bytes; None where it is not known beforehand."""
    url: str = ""
    """Where it comes from; required where `sha256` is None."""

    @property
    def name(self) -> str:
        """Its name in the cache."""
        return self.sha256 or hashlib.sha256(self.url.encode()).hexdigest()

    def problem(self, path: Path) -> str:
        """What is wrong with the file at `path`, or an empty string."""
        found = path.stat().st_size
        if self.size is not None and found != self.size:
            return f"{found} bytes instead of {self.size}"
        return "" if self.sha256 in (None, sha256_of(path)) else "sha256 differs from the manifest's"


Fetch = Callable[[Path], None]
"""Writes a whole file to the path it is given and has checked it, or raises `FetchError`."""


@dataclass(frozen=True)
class Cache:
    """The folder and its limit. Cheap to pickle; every process of a node opens its own on the same folder."""

    root: Path
    limit_bytes: float = math.inf
    """Entries together stay below this; downloads on their way come on top."""

    def open(self, content: Content, fetch: Fetch) -> int:
        """Return a descriptor of an entry, downloading it first where it is not there.

        Of several processes that ask for the same entry one downloads it. Those who waited for a download that failed
        share its failure instead of repeating it.

        Raises:
            FetchError: it could not be downloaded.
            UserError: the folder cannot be written, or its disk is full.
        """
        try:
            while True:
                descriptor = self._open_entry(content)
                if descriptor is None:
                    descriptor = self._download(content, fetch)
                if descriptor is not None:
                    os.utime(descriptor)  # the least recently used go first; file systems may not keep access times
                    return descriptor
        except OSError as error:
            lower = f", or lower data.cache_bytes ({self.limit_bytes}) below what its disk has room for"
            raise UserError(
                f"cache folder {self.root}: {error.strerror}: name another one (data.cache_dir or KARMMA_DIST_CACHE)"
                f"{lower if self.limit_bytes < math.inf else ''}"
            ) from None

    def remove_if_damaged(self, content: Content) -> bool:
        """Read a whole entry and remove it if its bytes have changed since they were checked; True if so."""
        try:
            damaged = bool(content.problem(self.root / content.name))
        except FileNotFoundError:
            return True  # removed by another process that found the same
        if damaged:
            self.remove(content)
        return damaged

    def remove(self, content: Content) -> None:
        """Remove an entry if it is there."""
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
        """Download an entry and open it; None where another process did, or gave up its turn, while we waited."""
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
                    return os.open(entry, os.O_RDONLY)  # before anybody can remove it
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
        """Remove the least recently used entries until `size` bytes fit, and what dead downloads left behind."""
        entries: list[tuple[int, int, str]] = []
        for item in os.scandir(self.root):
            if _ENTRY.fullmatch(item.name):
                stat = item.stat()
                entries.append((stat.st_mtime_ns, stat.st_size, item.path))
            elif found := _PARTIAL.fullmatch(item.name):
                self._remove_if_dead(found[1])
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
    """Wait for a lock file and yield it, or None where its holder ended properly meanwhile.

    A holder removes the file before letting go of it, so whoever finds it removed has waited for somebody who is done;
    what that one wrote into it is its failure. A file that is still there was left by a dead process, or is new.

    Raises:
        FetchError: the one that was waited for failed with it.
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
