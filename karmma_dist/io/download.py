"""Downloads from a web server or an object store: repeated if that may help, checked, without secrets in messages.

Shards (`shards/remote.py`) and starting weights (`models/weights.py`) are downloaded here into a `cache`. No server can
keep a download going: each has a largest size, whatever the server declares, and a lowest rate (`io/transfer.py`).
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

from karmma_dist.errors import URL, UserError, masked, one_line
from karmma_dist.io.cache import Content, FetchError, NotFoundError
from karmma_dist.io.disk_errors import DiskError, naming
from karmma_dist.io.files import MOST_BYTES, create
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.io.transfer import Sink, receive

TRIES = 5
"""Number of tries to download one file."""

FIRST_WAIT_S = 1.0
"""Mean pause in seconds before the second try; it doubles with each further try."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 30.0, 60.0
"""Seconds of silence after which a web server counts as failed; for one that sends little see `transfer.WINDOW_S`."""

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
            _download(url, content, path, moved)
        except FetchError as error:
            if path.exists() and path.stat().st_size and error.passing and not error.damaged:
                message = f"broke off after {path.stat().st_size} of {content.size or '?'} bytes ({error.what})"
                raise FetchError(message, damaged=True, passing=True) from None
            raise
        if problem := content.problem(path):
            raise FetchError(problem, damaged=True, passing=True)

    _with_tries(attempt)


def fetch_json(url: str, most_bytes: int = MOST_BYTES) -> bytes:
    """Download the text of a JSON file of at most `most_bytes`.

    Raises:
        FetchError: the file is missing, too large or not JSON, or the server refuses or cannot be reached.
    """
    return _with_tries(partial(_read_json, url, most_bytes))


def _download(url: str, content: Content, path: Path, moved: Callable[[int, int], None] | None) -> None:
    with naming(path):
        file = open(create(path), "wb", buffering=0)  # noqa: SIM115 - closed below, where errors have a name

    def write(data: bytes) -> None:
        with naming(path):
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]

    try:
        _ask(url, lambda system: receive(system, url, Sink(write, content, path, moved)))
    finally:
        with naming(path):
            file.close()


def _read_json(url: str, most_bytes: int) -> bytes:
    text = bytearray()
    _ask(url, lambda system: receive(system, url, Sink(text.extend, Content(None, None, url, most_bytes))))
    try:
        JsonObject.parse(bytes(text), may_repeat=True)
    except ValueError:
        raise FetchError("not valid JSON", damaged=True, passing=True) from None
    return bytes(text)


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
    except (FetchError, DiskError):
        raise
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
        return NotFoundError("not found on the server", damaged=True)
    if isinstance(error, IsADirectoryError):
        return FetchError("is a folder", damaged=True)
    if type(error).__name__ == "TooManyRedirects":
        return FetchError("redirects without an end", damaged=False)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    if refused or isinstance(error, (PermissionError, ValueError)):
        return FetchError(f"refused ({reason})", damaged=False)
    return FetchError(f"cannot be reached ({reason})", damaged=False, passing=True)
