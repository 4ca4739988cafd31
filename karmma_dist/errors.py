"""Exceptions whose message is meant for a person, as one line, and the line that a process ends with."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit, urlunsplit

from karmma_dist.terminal import print_line

ERROR_FILE = "KARMMA_DIST_ERROR_FILE"
"""Environment variable by which `karmma-dist launch` tells a rank where to leave its last line."""
LOST_RANK = "lost rank: "
"""Begins a line in that file that only tells of another rank, which may have said more itself."""


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""Beginning of a URL."""


class UserError(ValueError):
    """Bad input or usage: the command line prints its one line on stderr and exits with 2.

    The message says what was wrong, where (file, key, clip, rank) and what to do about it.
    """


class Stopped(Exception):
    """Work ended early, in good order: the command line prints its one line on stderr and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostRank(Stopped):
    """Another rank has ended or hangs; the message says which."""


def one_line(error: object, limit: int | None = None) -> str:
    """Return the text of an error, or any other, as one line that may be shown: without line breaks and secrets.

    Args:
        error: runs of white space in its text become a space each, and its URLs are `masked`.
        limit: characters at most; None: all of them.
    """
    return re.sub(rf"{URL.pattern}\S+", lambda match: masked(match[0]), " ".join(str(error).split()))[:limit]


def masked(url: str) -> str:
    """Return a URL as messages show it: without user, password and query, which may be secret. A path is left alone."""
    if not URL.match(url):
        return url
    try:
        scheme, host, path, _, _ = urlsplit(url)
    except ValueError:  # a bracket that is not closed in its host
        return f"{url.partition('://')[0]}://***"
    user, at, host = host.rpartition("@")
    return urlunsplit((scheme, f"***@{host}" if user or at else host, path, "", ""))


def say(line: str, of_another: bool = False) -> None:
    """Say the line that a process ends with, on stderr.

    Ranks often end for the same reason. Those of `karmma-dist launch` leave the line to it, and it shows equal ones
    once; those of srun or torchrun say which rank they are.

    Args:
        line: what to say.
        of_another: it tells of another rank: `launch` shows it only if that one has said nothing.
    """
    file = os.environ.get(ERROR_FILE)
    if file:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(descriptor, "a") as target:
                target.write((LOST_RANK if of_another else "") + line + "\n")
            return
        except OSError as error:
            line = f"{line} (not left in {file}: {error.strerror})"
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in os.environ else None)
    print_line(f"rank {rank}: {line}" if rank not in (None, "0") else line, err=True)


def nearest(word: str, choices: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `choices`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
