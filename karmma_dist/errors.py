"""Exceptions whose message is meant for the person at the terminal, and how a process says its last line."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ERROR_FILE = "KARMMA_DIST_ERROR_FILE"
"""Environment variable by which `karmma-dist launch` tells a rank where to leave its last line."""
LOST_RANK = "error: another rank has ended: see what it says"


class UserError(ValueError):
    """Bad input or usage: the command line prints its one line on stderr and exits with 2.

    The message says what was wrong, where (file, key, clip, rank) and what to do about it.
    """


class LostRankError(Exception):
    """Another rank ended while this one was talking to it; the other one knows why."""


def say(line: str) -> None:
    """Say the line that a process ends with, on stderr.

    Ranks often end for the same reason. Those of `karmma-dist launch` leave the line to it, and it shows equal ones
    once; those of srun or torchrun say which rank they are.
    """
    file = os.environ.get(ERROR_FILE)
    if file:
        try:
            with Path(file).open("a") as target:
                target.write(line + "\n")
            return
        except OSError as error:
            line = f"{line} (not left in {file}: {error.strerror})"
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in os.environ else None)
    print(f"rank {rank}: {line}" if rank not in (None, "0") else line, file=sys.stderr, flush=True)


class Stopped(Exception):
    """Work ended early, in good order: the command line prints its one line on stderr and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, choices: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `choices`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
