"""Downloads from a web server or an object store: repeated if that may help, checked, without secrets in messages.

Shards (`shards/remote.py`) and starting weights (`models/weights.py`) are downloaded here into a `cache`.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback

from karmma_dist.errors import URL, UserError, masked, one_line
from karmma_dist.io.cache import Content, FetchError
from karmma_dist.io.json_fields import JsonObject

TRIES = 5
"""Number of tries to download one file."""

FIRST_WAIT_S = 1.0
"""Mean pause in seconds before the second try; it doubles with each further try."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 30.0, 60.0
"""Seconds of silence after which a web server counts as failed; the time for a whole file is not limited."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_PASSING_STATUS = {408, 425, 429}

_jitter = random.SystemRandom()  # ranks that share a seed must not all retry at the same moment

T = TypeVar("T")


def is_url(text: str) -> bool:
    """Return True if the text is a URL and not a path."""
    return URL.match(text) is not None


def fetch(url: str, content: Content, path: Path, moved: Callable[[int, int], None] | None = None) -> None:
    """Download a file to `path` and check it; after a passing failure it tries again, with growing pauses.

    Args:
        url: URL of the file.
        content: Expected content.
        path: Path to write.
        moved: Callback that receives the downloaded and the total bytes from time to time (0: total unknown).

    Raises:
        FetchError: the file is missing or stays wrong (`damaged`), or the server refuses or cannot be reached.
        OSError: the local disk is full.
    """

    def attempt() -> None:
        path.unlink(missing_ok=True)
        try:
            _ask(url, lambda system: system.get_file(url, str(path), callback=_Moved(moved)))
        except FetchError as error:
            if path.exists() and path.stat().st_size and error.passing:
                message = f"broke off after {path.stat().st_size} of {content.size or '?'} bytes ({error.what})"
                raise FetchError(message, damaged=True, passing=True) from None
            raise
        if path.is_dir():
            path.rmdir()
        if not path.exists():
            raise FetchError("is a folder", damaged=True)
        if problem := content.problem(path):
            raise FetchError(problem, damaged=True, passing=True)

    _with_tries(attempt)


def fetch_json(url: str) -> bytes:
    """Download the text of a JSON file.

    Raises:
        FetchError: the file is missing or is not JSON, or the server refuses or cannot be reached.
    """
    return _with_tries(partial(_read_json, url))


class _Moved(Callback):
    """An fsspec callback that passes the progress of a download on as two numbers."""

    def __init__(self, moved: Callable[[int, int], None] | None) -> None:
        super().__init__()
        self._moved = moved

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002 - fsspec's signature
        """Pass on the progress; fsspec calls this after each change of `size` and `value`."""
        if self._moved:
            self._moved(self.value, self.size or 0)


def _read_json(url: str) -> bytes:
    text: bytes = _ask(url, lambda system: system.cat_file(url))
    try:
        JsonObject.parse(text, may_repeat=True)
    except ValueError:
        raise FetchError("not valid JSON", damaged=True, passing=True) from None
    return text


def _with_tries(attempt: Callable[[], T]) -> T:
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except FetchError as error:
            if not error.passing:
                raise
            if number == TRIES:
                raise FetchError(f"{error.what}, after {TRIES} tries", error.damaged) from None
        time.sleep(FIRST_WAIT_S * 2 ** (number - 1) * _jitter.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _ask(url: str, request: Callable[[Any], T]) -> T:
    scheme = urlsplit(url).scheme
    try:
        system = _file_system(scheme, READ_TIMEOUT_S, os.getpid())
    except ImportError as error:
        advice = "it needs s3fs: pip install 'karmma-dist[s3]'" if scheme in ("s3", "s3a") else str(error)
        raise UserError(f"{masked(url)}: {advice}") from None
    except ValueError:
        raise UserError(f"{masked(url)}: '{scheme}' is not a protocol of fsspec") from None
    try:
        return request(system)
    except OSError as error:
        if error.errno in _DISK:
            raise
        raise _failure(error) from None
    except Exception as error:  # every file system of fsspec raises its own exceptions
        raise _failure(error) from None


@functools.cache
def _file_system(scheme: str, read_timeout_s: float, pid: int) -> Any:  # noqa: ARG001
    """Return this process's file system: connections and event loops do not survive a fork, so each process has one.

    It is never collected, not even in children that inherit it: collection would close its connections at an arbitrary
    point of the program and wait for an event loop that may itself wait for that point.
    """
    if scheme not in ("http", "https"):
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s)
    # trust_env: proxies from the environment, passwords from ~/.netrc
    options = {"timeout": timeout, "trust_env": True}
    return fsspec.filesystem(scheme, client_kwargs=options, skip_instance_cache=True)


def _failure(error: Exception) -> FetchError:
    """Translate a file system's exception. Its text is not shown if it may contain the URL with its secrets."""
    status = getattr(error, "status", None)
    reason = one_line(f"HTTP {status}" if status else getattr(error, "strerror", None) or type(error).__name__)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FetchError("not found on the server", damaged=True)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    if refused or isinstance(error, (PermissionError, ValueError)):
        return FetchError(f"refused ({reason})", damaged=False)
    return FetchError(f"cannot be reached ({reason})", damaged=False, passing=True)
