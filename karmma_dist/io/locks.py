"""Locks between processes, of one machine or of several, on any file system.

    with FileLock(out / ".lock") as lock:
        if not lock.take(wait=False):
            ...  # another process holds it

Where the file system has flock, the lock is the kernel's and goes with its process. Lustre without `-o flock` and some
NFS have none. There every holder has a file of its own beside the lock file, created exclusively and never reused:

    .lock.holder-RANDOM    JSON: host, machine, pid, start of the process, shared or not, held or only asked for

A process announces itself first and looks at the others then, so of two that come together at least one sees the other;
where both only ask, both withdraw and try again. The modification time of the file is the heartbeat: a thread renews it
every `BEAT_S` seconds. A holder counts no longer, and its file is removed, as soon as its process is gone from this
machine, or once its heartbeat is `STALE_S` seconds old for one of another machine. A holder that was stopped for longer
than that (SIGSTOP, a hanging disk) has lost its lock, and so has one whose file system takes times from machines whose
clocks differ by so much.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import multiprocessing
import os
import random
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import naming
from karmma_dist.io.files import create
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.processes import machine, started_at

BEAT_S = 5.0
"""Seconds between two heartbeats."""
STALE_S = 60.0
"""Seconds without a heartbeat after which a holder on another machine counts as dead."""

_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, 524}
"""524 is the kernel's ENOTSUPP, which some file systems let through."""
_HOLDER = "holder"
_TRIES = 20
"""Times that a process which must not wait asks again, where others ask at the same moment."""
_PAUSE_S = (0.02, 0.2)
_MOST_BYTES = 4096

_logger = logging.getLogger(__name__)
_pause = random.SystemRandom()  # ranks that share a seed must not all come back in the same moment


class FileLock:
    """A lock file, open; a context manager that closes it and lets go of the lock.

    Two of them exclude each other also within one process.

    Raises:
        UserError: something else than a file has its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] = open(path, "a+", encoding="utf-8", errors="replace", opener=_open)  # noqa: SIM115 - closed by `release`
        self._announced: Announcement | None = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock; return False where another process holds it and `wait` is False.

        Args:
            shared: Several processes may hold it so at once, and none then exclusively.
            wait: Wait until the others have let go of it.
        """
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(self.file, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            _warn_once(self.path, error.strerror or str(error))
            self._announced = _announce(self.path, shared, wait)
            return self._announced is not None
        return True

    def is_at_its_path(self) -> bool:
        """Return True if the file still has its name: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go of the lock and close the file; the file stays."""
        if self._announced is not None:
            self._announced.withdraw()
            self._announced = None
        self.file.close()


@dataclass(frozen=True, slots=True)
class _Other:
    """Another process that asks for a lock or holds it."""

    holds: bool
    shared: bool


class Announcement:
    """A file of this process alone, which says something about it in JSON; its modification time is a heartbeat.

    Args:
        path: Path of the file, a new one.
        about: What it says first.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._pid = path, os.getpid()
        self._descriptor = create(path)
        self._end = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat of {path.name}", daemon=True)
        try:
            self.write(about)
            self._heart.start()
        except BaseException:
            os.close(self._descriptor)
            self.path.unlink(missing_ok=True)
            raise

    def write(self, about: Mapping[str, Any]) -> None:
        """Replace what the file says; the new text may be shorter by one character at most."""
        os.pwrite(self._descriptor, f"{json.dumps(about)} ".encode(), 0)  # in place: a name that changes can be missed

    def now(self) -> float:
        """Return the time by the clock of the file system, in seconds since the epoch."""
        os.utime(self._descriptor)
        return os.fstat(self._descriptor).st_mtime

    def withdraw(self) -> None:
        """Remove the file and end the heartbeat. A process that was forked leaves that to its parent."""
        if os.getpid() == self._pid:
            self._end.set()
            self._heart.join()
            with contextlib.suppress(OSError):  # a disk that is gone: the heartbeat has stopped
                self.path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the disk may be back at the next one
                os.utime(self._descriptor)


def _about(*, shared: bool, holds: bool) -> dict[str, Any]:
    """Return what a file beside a lock says about this process."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(), "machine": machine(), "pid": pid, "started": started_at(pid),
        "shared": shared, "holds": holds,
    }  # fmt: skip


def _announce(lock: Path, shared: bool, wait: bool) -> Announcement | None:
    """Take a lock where there is no flock; None where another holds it and this process must not wait."""
    tries = 0
    while True:
        path = lock.with_name(f"{lock.name}.{_HOLDER}-{secrets.token_hex(8)}")
        own = Announcement(path, _about(shared=shared, holds=False))
        try:
            against = [other for other in _others(own, lock) if not (shared and other.shared)]
            if not against:
                own.write(_about(shared=shared, holds=True))
                return own
        except BaseException:
            own.withdraw()
            raise
        own.withdraw()
        tries += 1
        if not wait and (any(other.holds for other in against) or tries == _TRIES):
            return None
        time.sleep(_pause.uniform(*_PAUSE_S))


def _others(own: Announcement, lock: Path) -> Iterator[_Other]:
    """Yield who else asks for a lock or holds it; remove the files of those that are dead."""
    for name in os.listdir(lock.parent):
        path = lock.with_name(name)
        if not name.startswith(f"{lock.name}.{_HOLDER}-") or path == own.path:
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # it has just let go
        with open(descriptor, "rb") as file:  # opened, not only looked at: NFS asks its server then
            beat, text = os.fstat(file.fileno()).st_mtime, file.read(_MOST_BYTES)
        about = _parsed(text)
        if _is_dead(about, own.now() - beat):
            path.unlink(missing_ok=True)
        else:
            yield _Other(about.get("holds") is True, about.get("shared") is True)


def _parsed(text: bytes) -> dict[str, Any]:
    """Return what a holder says of itself; nothing where it has not been written yet."""
    try:
        return JsonObject.parse(text).unchecked()
    except ValueError:
        return {}


def _is_dead(about: dict[str, Any], silent_s: float) -> bool:
    here, pid = machine(), about.get("pid")
    if here is not None and about.get("machine") == here and isinstance(pid, int):
        return started_at(pid) != about.get("started")
    return silent_s > STALE_S


def _open(path: str, flags: int) -> int:
    try:
        with naming(Path(path)):
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path}: is a symbolic link, and cannot be a lock: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a file, and cannot be a lock: remove it")
    return descriptor


@functools.cache
def _warn_once_of_this_process(text: str) -> None:
    if multiprocessing.parent_process() is None and os.environ.get("RANK") in (None, "0"):
        _logger.warning(text)


def _warn_once(path: Path, reason: str) -> None:
    _warn_once_of_this_process(
        f"{path.parent}: this file system has no flock ({reason}): lock files with a heartbeat are used instead; one "
        f"of a killed process counts until {STALE_S:.0f} s after its last beat where another machine looks at it"
    )
