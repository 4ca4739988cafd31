"""Exceptions with a one-line message for the user, and the last line of a process."""

from __future__ import annotations

import os
import re
import reprlib
from urllib.parse import urlsplit, urlunsplit

from karmma_dist.terminal import print_line, silence

ERROR_FILE = "KARMMA_DIST_ERROR_FILE"
"""Environment variable by which `karmma-dist launch` gives a rank the path of the file for its last line."""
LOST_RANK = "lost rank: "
"""Prefix of a line in that file that only reports another rank, whose own line may say more."""

_LONGEST_WORD, _CUT_WORD = 200, 80
"""Longest word, most often a path, that a message shows whole, and the characters that are left of a longer one."""
_LONGEST_LINE = 2000
"""Characters of a message."""

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://")
"""Beginning of a URL; the limit keeps the search in a long text from taking its length squared."""


class UserError(ValueError):
    """Bad input or usage: the command line prints the message on stderr and exits with 2.

    The message is one line with the problem, its place (file, key, clip, rank) and the remedy.
    """


class Stopped(Exception):
    """An early but orderly end: the command line prints the one-line message on stderr and exits with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class LostRank(Stopped):
    """The end of this rank because another rank has ended or hangs; the message names it."""


def one_line(error: object, limit: int | None = None) -> str:
    """Return the text of an error, or any text, as one line without line breaks and secrets.

    Args:
        error: Error or text; each run of white space becomes one space, and URLs are `masked`.
        limit: Largest number of characters; None for no limit.
    """
    return _without_secrets(" ".join(str(error).split()))[:limit]


def quoted(value: object, most: int = 60) -> str:
    """Return a value as messages quote it: its repr without secrets, of at most `most` characters."""
    if isinstance(value, str):
        text = repr(_without_secrets(value[:2_000]))
        return text if len(text) <= most else f"{text[: most - 4]}...{text[0]}"
    text = _without_secrets(reprlib.repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _without_secrets(text: str) -> str:
    return re.sub(rf"{URL.pattern}\S+", lambda match: masked(match[0]), text)


def shortened(text: str) -> str:
    """Return a message whose long words, such as names of 5,000 characters, and which itself, are cut in the middle."""
    words = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda match: _cut(match[0], _CUT_WORD), text)
    return words if len(words) <= _LONGEST_LINE else _cut(words, _LONGEST_LINE)


def _cut(text: str, length: int) -> str:
    tail = length // 3
    return f"{text[: length - tail - 3]}...{text[-tail:]}"


def masked(url: str) -> str:
    """Return a URL for messages, without user, password and query, which may be secret. Leave a path unchanged."""
    if not URL.match(url):
        return url
    try:
        scheme, host, path, _, _ = urlsplit(url)
    except ValueError:  # a bracket that is not closed in its host
        return f"{url.partition('://')[0]}://***"
    user, at, host = host.rpartition("@")
    return urlunsplit((scheme, f"***@{host}" if user or at else host, path, "", ""))


def say(line: str, of_another: bool = False) -> None:
    """Print the last line of a process on stderr, `shortened`.

    Ranks often end for the same reason. Ranks of `karmma-dist launch` write the line to a file, and `launch` prints
    equal lines once; ranks of srun or torchrun add their rank.

    Args:
        line: The line.
        of_another: True if the line reports another rank: `launch` shows it only if that rank left no line.
    """
    line = shortened(line)
    file = os.environ.get(ERROR_FILE)
    if file:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            with open(descriptor, "a", encoding="utf-8", errors="backslashreplace") as target:
                target.write((LOST_RANK if of_another else "") + line + "\n")
            return
        except OSError as error:
            line = f"{line} (not left in {file}: {error.strerror})"
    rank = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if "SLURM_STEP_NUM_TASKS" in os.environ else None)
    try:
        print_line(f"rank {rank}: {line}" if rank not in (None, "0") else line, err=True)
    except BrokenPipeError:  # nobody reads it; the exit code still says what happened
        silence(2)


def nearest(word: str, choices: list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `choices`, or an empty string if none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
