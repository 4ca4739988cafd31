"""Advisory locks that allow one packer per folder, or one per part of it, and vanish with their process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.io.locks import FileLock


@contextmanager
def folder_lock(out: Path, part: tuple[int, int] | None) -> Iterator[Callable[[], bool]]:
    """Hold the folder, or one part of it, and yield a function that returns True if this packer may assemble.

    Parts share the folder with each other but not with a packer of the whole folder; only one part assembles.

    Raises:
        UserError: another packer holds the folder or the part.
    """
    with ExitStack() as held:
        alone = _take(held, out / ".lock", shared=part is not None)
        if alone and part is not None:
            alone = _take(held, out / f".lock-part-{part[0]}-of-{part[1]}")
        if not alone:
            raise UserError(f"{out}: another packer works in this folder: wait for it or choose another --out")
        yield lambda: part is None or _take(held, out / ".lock-assembly")


def _take(held: ExitStack, path: Path, *, shared: bool = False) -> bool:
    """Lock a file until `held` closes, without waiting. The last exclusive holder removes it."""
    while True:
        lock = held.enter_context(FileLock(path))
        if not lock.take(shared=shared, wait=False):
            return False
        if lock.is_at_its_path():
            if not shared:
                held.callback(path.unlink, missing_ok=True)
            return True
        lock.release()  # the last holder removed the file after it was opened here, before it was locked
