"""Is a folder the same one on all nodes, and can every rank write it? A folder of the moment in it, a file per rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from karmma_dist.errors import UserError


class MeetingFolder:
    """Rank 0 makes it and removes it, with what it had to make above it; the others write and look.

    Args:
        parent: the folder in question; it need not exist yet.
        token: of this meeting, equal on all ranks.
    """

    def __init__(self, parent: Path, token: str) -> None:
        self.parent = parent.absolute()
        self._token = token
        self._folder = self.parent / f".preflight-{token}"
        self._made: list[Path] = []

    def make(self) -> None:
        """Make it, with rank 0's file.

        Raises:
            UserError: it cannot be written.
        """
        self._made = [path for path in (self.parent, *self.parent.parents) if not path.exists()]
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self.write(0)

    def write(self, rank: int) -> None:
        """Write a rank's file, down to the disk.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with open(self._folder / str(rank), "w") as file:
                file.write(f"{self._token} {rank}")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def sees(self, rank: int) -> bool:
        """Whether a rank's file is there, with what it wrote."""
        try:
            return (self._folder / str(rank)).read_text() == f"{self._token} {rank}"
        except OSError:
            return False

    def join(self, rank: int) -> bool:
        """Look for rank 0's file and write one's own.

        Raises:
            UserError: one of them is impossible.
        """
        if not self.sees(0):
            raise UserError(
                f"{self.parent}: does not show what rank 0 wrote into it, so it is not the same folder on all nodes: "
                "set runs_dir to one on a shared file system"
            )
        if rank:
            self.write(rank)
        return True

    def remove(self) -> None:
        """Leave nothing that was not there before, except what others put there meanwhile."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                return

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.parent}: cannot be written ({error.strerror}): change its rights or set runs_dir")
