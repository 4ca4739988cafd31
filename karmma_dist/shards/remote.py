"""Shards on a web server or an object store: manifest and indexes first, then each shard whole, into a local cache.

    folder = open_folder(DataRecipe(shards="https://data.example.org/epic_kitchens"))

The URL is that of an unchanged packed folder: manifest.json, tars and indexes side by side. Every file but the manifest
is checked against the sha256 that the manifest names, and cached under it (see `io.cache`), so versions never mix.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from karmma_dist.errors import UserError
from karmma_dist.io.cache import Cache, Content, FetchError, cache_root
from karmma_dist.io.download import fetch, fetch_json, is_url, masked
from karmma_dist.io.files import MOST_BYTES
from karmma_dist.recipe import DataRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST, Clip, DamageError, index_path
from karmma_dist.shards.manifest import Manifest, ShardEntry, SplitEntry, usable_manifest

_INDEXES_AT_ONCE = 8
_INDEX_BYTES, _INDEX_BYTES_OF_A_CLIP = 16 << 20, 64 << 10
"""Largest size of an index: the manifest does not declare it, but the number of its clips."""
_MANIFEST_BYTES = MOST_BYTES
_logger = logging.getLogger(__name__)


def open_folder(data: DataRecipe) -> ShardFolder:
    """Open the recipe's shards: a folder, or the URL of one. A mixture is opened by `mixture.open_datasets`.

    Raises:
        UserError: the shards are missing, cannot be reached, or do not fit into the cache.
    """
    assert data.shards is not None
    if not is_url(data.shards):
        return ShardFolder(data.shards)
    return RemoteShards(data.shards, Cache(cache_root(data.cache_dir), data.cache_bytes))


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
        self.manifest = usable_manifest(text, f"{self.where}/{MANIFEST}")
        self.sha256 = hashlib.sha256(text).hexdigest()
        self._tars = _contents(self.manifest)
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
        """Return all clips of a split, in shard order. Fetches the indexes that are not in the cache yet.

        Raises:
            UserError: the split does not exist, or an index cannot be fetched or is damaged.
        """
        entry = self.manifest.splits.get(split, SplitEntry(0, ()))
        with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
            list(pool.map(self.read_index, entry.shards))
        if entry.num_bytes > self._cache.limit_bytes:
            _warn_once(
                f"{self.where}: the {len(entry.shards)} shards of {split} have {entry.num_bytes} bytes, "
                f"data.cache_bytes is {self._cache.limit_bytes}: each epoch downloads again what was removed; raise it "
                "if the disk allows"
            )
        return super().clips(split)

    def read_index(self, shard: ShardEntry) -> bytes:
        """Return the content of a shard's index, checked against its sha256.

        Args:
            shard: The shard's entry in the manifest.

        Raises:
            UserError: the index cannot be fetched.
        """
        name = index_path(Path(shard.name)).name
        most_bytes = min(_INDEX_BYTES + shard.num_clips * _INDEX_BYTES_OF_A_CLIP, MOST_BYTES)
        content = Content(shard.index_sha256, None, most_bytes=most_bytes)
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
            OSError: the server answers, but the shard is gone or is not what the manifest describes.
            UserError: the server cannot be reached, or its shards have changed.
        """
        if name not in self._lost:
            try:
                return self._open(name, self._tars[name])
            except FetchError as error:
                if not error.damaged:
                    raise UserError(f"{self.where}/{name}: {error.what}") from None
                if hashlib.sha256(self._fetch_manifest()).hexdigest() != self.sha256:
                    raise UserError(
                        f"{self.where}: the shards on the server have changed since they were opened: start again"
                    ) from None
                self._lost[name] = error.what
        raise OSError(errno.EIO, self._lost[name])

    def read(self, clip: Clip, modality: str) -> bytes:
        """Read a member as `ShardFolder.read` does; download a shard again that was damaged in the cache."""
        try:
            return super().read(clip, modality)
        except DamageError:
            if clip.shard in self._lost or clip.shard in self._rechecked:
                raise
            self._rechecked.add(clip.shard)  # once: checking a whole shard is expensive, and it has many clips
            if not self._cache.remove_if_damaged(self._tars[clip.shard]):
                raise
            return super().read(clip, modality)

    def _open(self, name: str, content: Content) -> int:
        return self._cache.open(content, partial(fetch, _join(self._url, name), content))

    def _check_tar(self, shard: ShardEntry) -> None:
        """Check nothing: a tar is checked when it is downloaded."""

    def _fetch_manifest(self) -> bytes:
        url = _join(self._url, MANIFEST)
        try:
            return fetch_json(url, _MANIFEST_BYTES)
        except FetchError as error:
            advice = "is this the URL of a packed folder?" if error.damaged else "check URL, network and password"
            raise UserError(f"{masked(url)}: {error.what}: {advice}") from None


def _contents(manifest: Manifest) -> dict[str, Content]:
    """Return the content that each tar must have."""
    return {shard.name: Content(shard.sha256, shard.num_bytes) for shard in manifest.shards}


def _join(url: str, name: str) -> str:
    """Return the URL of a file in the folder; a query, such as a storage service's signature, stays at the end."""
    scheme, host, path, query, _ = urlsplit(url)
    return urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, ""))


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
