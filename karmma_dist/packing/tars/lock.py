"""Advisory locks that allow one packer per folder, or one per part of it, and vanish with their process."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from karmma_dist.errors import UserError


@contextmanager
def folder_lock(out: Path, part: tuple[int, int] | None) -> Iterator[Callable[[], bool]]:
    """Hold the folder, or one part of it, and yield a function that returns True if this packer may assemble.

    Parts share the folder with each other but not with a packer of the whole folder; only one part assembles.

    Raises:
        UserError: another packer holds the folder or the part.
    """
    with ExitStack() as held:
        alone = _take(held, out / ".lock", fcntl.LOCK_EX if part is None else fcntl.LOCK_SH)
        if alone and part is not None:
            alone = _take(held, out / f".lock-part-{part[0]}-of-{part[1]}", fcntl.LOCK_EX)
        if not alone:
            raise UserError(f"{out}: another packer works in this folder: wait for it or choose another --out")
        yield lambda: part is None or _take(held, out / ".lock-assembly", fcntl.LOCK_EX)


def _take(held: ExitStack, path: Path, operation: int) -> bool:
    """Lock a file until `held` closes, without waiting. The last holder removes it."""
    while True:
        file = held.enter_context(open(path, "a"))  # noqa: SIM115 - closed by `held`
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            is_same = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            is_same = False
        if is_same:  # otherwise the last holder removed the file after it was opened here, before it was locked
            if operation == fcntl.LOCK_EX:
                held.callback(path.unlink, missing_ok=True)
            return True
