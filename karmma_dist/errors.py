"""The exceptions whose messages are meant for the person at the terminal."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input or usage: the command line prints its one line on stderr and exits with 2.

    The message says what was wrong, where (file, key, clip, rank) and what to do about it.
    """


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
