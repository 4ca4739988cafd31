"""The hand-over of batches from loader workers to the trainer: what it needs of the machine, and how its errors read.

A batch's tensors lie in /dev/shm. Their descriptors pass through a socket in a folder for temporary files, sent by a
thread of the worker, whose errors `multiprocessing` prints and forgets: the trainer would wait for the batch in vain.
"""

from __future__ import annotations

import errno
import multiprocessing.queues
import os
import resource
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, one_line

_SHARED_MEMORY = Path("/dev/shm")
_LONGEST_SOCKET = 107
"""Bytes of the longest path of a Unix socket (sun_path of unix(7), less its end)."""
_SOCKET_NAME = "/pymp-12345678/listener-12345678"
"""Path of a socket of `multiprocessing` below the folder for temporary files."""
_NO_FILES = os.strerror(errno.EMFILE)
_OF_HANDOVER = (_NO_FILES, "ancillary data", "shared memory", "unable to mmap", "unable to open file")
"""Words in the errors that torch raises in the trainer if it cannot receive a batch."""


def temporary_folder_problem(folder: str) -> str | None:
    """Return why sockets in a folder for temporary files would fail, as far as its path tells; None if it does not."""
    num_bytes = len(os.fsencode(folder))
    longest = _LONGEST_SOCKET - len(_SOCKET_NAME)
    if num_bytes <= longest:
        return None
    return f"{folder} has {num_bytes} bytes, but the path of a socket below it allows only {longest}"


def check_handover() -> None:
    """Open a socket where workers will open theirs.

    Raises:
        UserError: the folder for temporary files does not allow it.
    """
    try:
        problem = temporary_folder_problem(tempfile.gettempdir())
        if problem is not None:
            raise OSError(problem)
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder:
            Listener(os.path.join(folder, "listener"), family="AF_UNIX").close()
    except OSError as error:
        raise UserError(f"loader workers cannot hand over batches: {described(error)}") from None


def report_unsent(report: Callable[[BaseException], None]) -> None:
    """Let this worker call `report` with an error that keeps a batch from being sent, or the sending thread away."""
    queue_type: Any = multiprocessing.queues.Queue
    start_thread = queue_type._start_thread

    def on_error(error: BaseException, item: object) -> None:  # noqa: ARG001
        report(error)

    def start_or_report(queue: object) -> None:
        try:
            start_thread(queue)
        except RuntimeError as error:
            report(error)

    queue_type._on_queue_feeder_error, queue_type._start_thread = staticmethod(on_error), start_or_report


def is_of_handover(error: BaseException) -> bool:
    """Return True if receiving a batch failed: workers hand over their own errors as items, so these are none."""
    if isinstance(error, OSError | EOFError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_HANDOVER)


def described(error: BaseException) -> str:
    """Return an error of a worker or of the hand-over in one line, with what to do about it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if _NO_FILES in text:
        text = _NO_FILES  # torch adds advice of its own
    elif not isinstance(error, OSError | RuntimeError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {text}"
    return f"{one_line(text, 300)}: {_remedy(error, text)}"


def _remedy(error: BaseException, text: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EMFILE, errno.ENFILE) or _NO_FILES in text or "ancillary data" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"raise the limit of open files (ulimit -n, now {limit}), or lower data.num_workers"
    if number == errno.EAGAIN or "start new thread" in text:
        limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        shown = "unlimited" if limit == resource.RLIM_INFINITY else limit
        return f"raise the limit of processes (ulimit -u, now {shown}, or the container's), or lower data.num_workers"
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return "lower data.num_workers or training.batch_size, or request more memory"
    if "shared memory" in text or "torch_" in text or "mmap" in text:
        return f"{_shared_memory()}: make it larger, or lower data.num_workers"
    if isinstance(error, ImportError):
        return "install it on this node"
    if isinstance(error, OSError):
        return f"set TMPDIR (now {os.environ.get('TMPDIR', 'unset')}) to a short path that can be written"
    return "see its output"


def _shared_memory() -> str:
    try:
        stats = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return f"{_SHARED_MEMORY}: {error.strerror}"
    return f"{_SHARED_MEMORY} has {stats.f_bavail * stats.f_frsize / 2**20:,.0f} MiB free"
