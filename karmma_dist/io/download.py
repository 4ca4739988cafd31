"""Files from a web server or an object store: tried again where that may help, checked, and no secret in a message.

Shards (`streaming/remote.py`) and starting weights (`models/starting_weights.py`) come through here into a `cache`.
"""

from __future__ import annotations

import errno
import functools
import json
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

TRIES = 5
"""Downloads of one file before giving up."""

FIRST_WAIT_S = 1.0
"""Pause before the second try on average; it doubles with each further one."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 30.0, 60.0
"""A web server that stays silent this long has failed; a whole shard may take as long as it takes."""

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_PASSING_STATUS = {408, 425, 429}

_jitter = random.SystemRandom()  # ranks that share a seed must not all come back in the same moment

T = TypeVar("T")


def is_url(text: str) -> bool:
    """Whether this is a URL, and not a path."""
    return URL.match(text) is not None


def fetch(url: str, content: Content, path: Path, moved: Callable[[int, int], None] | None = None) -> None:
    """Download a file to `path` and check it; what may pass is tried again, with growing pauses.

    Args:
        url: Where from.
        content: What it must hold.
        path: Where to.
        moved: Called now and then with the bytes that are there and those there will be (0: not known).

    Raises:
        FetchError: it is gone or stays wrong (`damaged`), or the server refuses or cannot be reached.
        OSError: the local disk is full.
    """

    def attempt() -> None:
        path.unlink(missing_ok=True)
        try:
            _ask(url, lambda system: system.get_file(url, str(path), callback=_Moved(moved)))
        except FetchError as error:
            if path.exists() and path.stat().st_size and error.passing:
                what = f"broke off after {path.stat().st_size} of {content.size or '?'} bytes ({error.what})"
                raise FetchError(what, damaged=True, passing=True) from None
            raise
        if path.is_dir():
            path.rmdir()
        if not path.exists():
            raise FetchError("is a folder", damaged=True)
        if wrong := content.problem(path):
            raise FetchError(wrong, damaged=True, passing=True)

    _with_tries(attempt)


def fetch_json(url: str) -> bytes:
    """The text of a JSON file.

    Raises:
        FetchError: as `fetch`.
    """
    return _with_tries(partial(_read_json, url))


class _Moved(Callback):
    """What fsspec tells about a download, as two numbers."""

    def __init__(self, moved: Callable[[int, int], None] | None) -> None:
        super().__init__()
        self._moved = moved

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002 - fsspec's signature
        """Called by fsspec after each change of `size` and `value`."""
        if self._moved:
            self._moved(self.value, self.size or 0)


def _read_json(url: str) -> bytes:
    text: bytes = _ask(url, lambda system: system.cat_file(url))
    try:
        json.loads(text)
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


def _ask(url: str, what: Callable[[Any], T]) -> T:
    scheme = urlsplit(url).scheme
    try:
        system = _file_system(scheme, READ_TIMEOUT_S, os.getpid())
    except ImportError as error:
        advice = "it needs s3fs: pip install 'karmma-dist[s3]'" if scheme in ("s3", "s3a") else str(error)
        raise UserError(f"{masked(url)}: {advice}") from None
    except ValueError:
        raise UserError(f"{masked(url)}: '{scheme}' is no protocol that fsspec knows") from None
    try:
        return what(system)
    except OSError as error:
        if error.errno in _DISK:
            raise
        raise _failure(error) from None
    except Exception as error:  # every file system of fsspec has exceptions of its own
        raise _failure(error) from None


@functools.cache
def _file_system(scheme: str, read_timeout_s: float, pid: int) -> Any:  # noqa: ARG001
    """The file system of a process: connections and event loops do not cross a fork, so each has its own.

    It is kept for good, also by the children that inherit it and never use it: collected, it would close its
    connections wherever the collection happens to run, and wait for an event loop that may wait for that very place.
    """
    if scheme not in ("http", "https"):
        return fsspec.filesystem(scheme, skip_instance_cache=True)
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=read_timeout_s)
    # trust_env: proxies from the environment, passwords from ~/.netrc
    options = {"timeout": timeout, "trust_env": True}
    return fsspec.filesystem(scheme, client_kwargs=options, skip_instance_cache=True)


def _failure(error: Exception) -> FetchError:
    """What a file system's exception means. Its text is not shown where it may hold the URL with its secrets."""
    status = getattr(error, "status", None)
    said = one_line(f"HTTP {status}" if status else getattr(error, "strerror", None) or type(error).__name__)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FetchError("not found on the server", damaged=True)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    if refused or isinstance(error, (PermissionError, ValueError)):
        return FetchError(f"refused ({said})", damaged=False)
    return FetchError(f"cannot be reached ({said})", damaged=False, passing=True)
