"""Shards on a web server or an object store: manifest and indexes first, then each shard whole, into a local cache.

    folder = open_folder(DataRecipe(shards="https://data.example.org/epic_kitchens"))

The URL is that of a packed folder as it is: manifest.json, tars and indexes side by side. Everything but the manifest
is checked against the sha256 that the manifest gives, and is cached under it (see `cache`), so versions never mix.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec

from karmma_dist.errors import UserError
from karmma_dist.packing.manifest import TAR_NAME
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards import MANIFEST, Clip, DamageError, ShardFolder, index_path, parse_manifest
from karmma_dist.streaming.cache import Cache, Content, FetchError

TRIES = 5
"""Downloads of one file before giving up."""

FIRST_WAIT_S = 1.0
"""Pause before the second try on average; it doubles with each further one."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 30.0, 60.0
"""A web server that stays silent this long has failed; a whole shard may take as long as it takes."""

_INDEXES_AT_ONCE = 8
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_PASSING_STATUS = {408, 425, 429}

_jitter = random.SystemRandom()  # ranks that share a seed must not all come back in the same moment
_logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_folder(data: DataRecipe) -> ShardFolder:
    """Open the recipe's shards, a folder or the URL of one.

    Raises:
        UserError: they are not there, cannot be reached, or do not fit into the cache.
    """
    if not _URL.match(data.shards):
        return ShardFolder(data.shards)
    root = data.cache_dir or os.environ.get("KARMMA_DIST_CACHE") or "~/.cache/karmma-dist"
    return RemoteShards(data.shards, Cache(Path(root).expanduser().absolute(), data.cache_bytes))


def masked(url: str) -> str:
    """A URL as messages show it: without user, password and query, all of which may be secret. A path is left alone."""
    if not _URL.match(url):
        return url
    scheme, host, path, _, _ = urlsplit(url)
    user, at, host = host.rpartition("@")
    return urlunsplit((scheme, f"***@{host}" if user or at else host, path, "", ""))


class RemoteShards(ShardFolder):
    """A folder of packed shards under a URL, opened for reading. Cheap to pickle: it holds no connection.

    Raises:
        UserError: the server cannot be reached, has no manifest there, or its manifest is not one of packed shards;
            the cache is smaller than the largest shard.
    """

    def __init__(self, url: str, cache: Cache) -> None:
        self._url, self._cache = url, cache
        self.root, self.where = cache.root, masked(url).rstrip("/")
        text = self._fetch_manifest()
        self.manifest = parse_manifest(text, f"{self.where}/{MANIFEST}")
        self.sha256 = hashlib.sha256(text).hexdigest()
        self._tars = _check_shards(self.manifest, f"{self.where}/{MANIFEST}")
        self._lost: dict[str, str] = {}
        self._rechecked: set[str] = set()
        sizes = {name: content.size or 0 for name, content in self._tars.items()}
        largest = max(sizes, key=lambda name: sizes[name], default="")
        if largest and sizes[largest] > cache.limit_bytes:
            raise UserError(
                f"{self.where}: {largest} has {sizes[largest]} bytes, data.cache_bytes is {cache.limit_bytes}: "
                f"{sizes[largest] - cache.limit_bytes} too few to hold even one shard"
            )

    def clips(self, split: str) -> list[Clip]:
        """All clips of a split, in shard order. Fetches the indexes that are not in the cache yet.

        Raises:
            UserError: no such split, or an index that cannot be had.
        """
        shards = self.manifest["splits"].get(split, {"shards": []})["shards"]
        with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
            list(pool.map(self.read_index, shards))
        total = sum(shard["bytes"] for shard in shards)
        if total > self._cache.limit_bytes:
            _say_once(
                f"{self.where}: the {len(shards)} shards of {split} have {total} bytes, data.cache_bytes is "
                f"{self._cache.limit_bytes}: each epoch downloads again what was removed; raise it if the disk allows"
            )
        return super().clips(split)

    def read_index(self, shard: dict[str, Any]) -> bytes:
        """The checked index of a shard, given the shard's entry in the manifest.

        Raises:
            UserError: it cannot be had.
        """
        name = index_path(Path(shard["name"])).name
        content = Content(shard["index_sha256"], None)
        self._cache.remove_if_damaged(content)
        try:
            descriptor = self._open(name, content)
        except FetchError as error:
            raise UserError(f"{self.where}/{name}: index cannot be read ({error.what})") from None
        with open(descriptor, "rb") as file:
            return file.read()

    def open_tar(self, name: str) -> int:
        """Return a descriptor of a shard in the cache.

        Raises:
            OSError: the server is there, but the shard is gone or is not the one that the manifest describes.
            UserError: the server cannot be reached, or has other shards by now.
        """
        if name not in self._lost:
            try:
                return self._open(name, self._tars[name])
            except FetchError as error:
                if not error.damaged:
                    raise UserError(f"{self.where}/{name}: {error.what}") from None
                if hashlib.sha256(self._fetch_manifest()).hexdigest() != self.sha256:
                    raise UserError(
                        f"{self.where}: the shards on the server are other ones than when they were opened: start again"
                    ) from None
                self._lost[name] = error.what
        raise OSError(errno.EIO, self._lost[name])

    def read(self, clip: Clip, modality: str) -> bytes:
        """As `ShardFolder.read`; damage done to a shard in the cache since its download is mended by another one."""
        try:
            return super().read(clip, modality)
        except DamageError:
            if clip.shard in self._lost or clip.shard in self._rechecked:
                raise
            self._rechecked.add(clip.shard)  # once: reading a whole shard is dear, and its clips are many
            if not self._cache.remove_if_damaged(self._tars[clip.shard]):
                raise
            return super().read(clip, modality)

    def _open(self, name: str, content: Content) -> int:
        return self._cache.open(content, partial(fetch, _join(self._url, name), content))

    def _check_tar(self, shard: dict[str, Any]) -> None:
        """Nothing to see from afar: a tar is checked when it is downloaded."""

    def _fetch_manifest(self) -> bytes:
        url = _join(self._url, MANIFEST)
        try:
            return _with_tries(partial(_read_json, url))
        except FetchError as error:
            advice = "is this the URL of a packed folder?" if error.damaged else "check URL, network and password"
            raise UserError(f"{masked(url)}: {error.what}: {advice}") from None


def fetch(url: str, content: Content, path: Path) -> None:
    """Download a file to `path` and check it; what may pass is tried again, with growing pauses.

    Raises:
        FetchError: it is gone or stays wrong (`damaged`), or the server refuses or cannot be reached.
        OSError: the local disk is full.
    """

    def attempt() -> None:
        path.unlink(missing_ok=True)
        try:
            _ask(url, lambda system: system.get_file(url, str(path)))
        except FetchError as error:
            if path.exists() and path.stat().st_size and error.passing:
                what = f"broke off after {path.stat().st_size} of {content.size or '?'} bytes ({error.what})"
                raise FetchError(what, damaged=True, passing=True) from None
            raise
        if not path.exists():
            raise FetchError("is a folder", damaged=True)
        if wrong := content.problem(path):
            raise FetchError(wrong, damaged=True, passing=True)

    _with_tries(attempt)


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
    said = f"HTTP {status}" if status else getattr(error, "strerror", None) or type(error).__name__
    said = re.sub(r"\S+://\S+", lambda found: masked(found[0]), str(said))
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FetchError("not found on the server", damaged=True)
    refused = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
    if refused or isinstance(error, (PermissionError, ValueError)):
        return FetchError(f"refused ({said})", damaged=False)
    return FetchError(f"cannot be reached ({said})", damaged=False, passing=True)


def _check_shards(manifest: dict[str, Any], where: str) -> dict[str, Content]:
    """What each tar must hold. Names and hashes become paths, so nothing but the expected form passes."""
    contents = {}
    try:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                hashes = (shard["sha256"], shard["index_sha256"])
                if not TAR_NAME.fullmatch(shard["name"]) or not all(_SHA256.fullmatch(text) for text in hashes):
                    raise UserError(f"{where}: shard {shard['name']!r}: not the name and sha256 of a shard")
                contents[shard["name"]] = Content(shard["sha256"], int(shard["bytes"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: not a manifest of packed shards: {error!r}") from None
    return contents


def _join(url: str, name: str) -> str:
    """The URL of a file in the folder; a query, such as a storage service's signature, stays at the end."""
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, ""))


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)
