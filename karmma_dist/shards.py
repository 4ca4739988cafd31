"""The on-disk contract between packing and streaming: manifest, per-shard index, clip metadata.

    FOLDER/
      manifest.json              schema, modalities, class names, splits, shards with sizes and sha256, settings
      train-000000.tar           per clip: KEY.json plus any of KEY.video.mp4, KEY.flow.mp4, KEY.audio.flac, ...
      train-000000.index.json    key, labels, and offset, size, crc32 of every member

`KEY.json` and the index declare every modality of the dataset for every clip: a description, or null where the
dataset has none. **Declared but not readable is damage; null is absence.** The tars are plain POSIX tars that any
WebDataset reader takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.modality import MODALITIES

SCHEMA = 1
"""Version of the layout; readers refuse any other."""

MANIFEST = "manifest.json"

TAR_NAME = re.compile(r"([A-Za-z0-9_-]+)-\d{6}\.tar")
"""Of a shard; its group is the split."""

_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEMBERS = {m.member: m.name for m in MODALITIES.values()} | {"json": "json"}


class DamageError(Exception):
    """A member that the index declares cannot be read as declared: cut, overwritten or undecodable."""

    def __init__(self, shard: str, key: str, member: str, what: str) -> None:
        super().__init__(f"{shard}: clip {key}: {member}: {what}")
        self.shard, self.key, self.member, self.what = shard, key, member, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.key, self.member, self.what)


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file of a clip lies in its tar."""

    offset: int
    """First byte of the payload."""
    size: int
    """Bytes."""
    crc32: int
    """zlib.crc32 of the payload."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip as the index declares it."""

    key: str
    shard: str
    """File name of its tar."""
    labels: dict[str, int | None]
    """Class per head; None where the split is unlabelled."""
    members: dict[str, Member | None]
    """Per modality of the dataset, and under "json" for the metadata; None: the dataset has none for this clip."""

    def has(self, modality: str) -> bool:
        """Whether the dataset has this modality for this clip."""
        return self.members.get(modality) is not None


def check_key(key: str) -> str:
    """Return `key` if it can name a clip in a tar: letters, digits, `_` and `-` only (a dot would split it).

    Raises:
        UserError: any other character.
    """
    if not _KEY.fullmatch(key):
        raise UserError(f"clip key '{key}': only letters, digits, '_' and '-' are allowed")
    return key


def member_name(key: str, modality: str) -> str:
    """File name inside the tar: `member_name("P01_01_0", "video") == "P01_01_0.video.mp4"`."""
    return f"{key}.json" if modality == "json" else f"{key}.{MODALITIES[modality].member}"


def shard_name(split: str, number: int) -> str:
    """`shard_name("train", 3) == "train-000003.tar"`."""
    return f"{split}-{number:06d}.tar"


def index_path(tar: Path) -> Path:
    """The index beside a tar."""
    return tar.with_suffix(".index.json")


def build_index(tar: Path, modalities: list[str]) -> dict[str, Any]:
    """Read a whole tar and return its index: every member's offset, size and crc32, and each clip's labels.

    Raises:
        DamageError: the tar is cut, a clip has no metadata, or its members are not the declared ones.
    """
    clips: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                key, _, suffix = info.name.partition(".")
                if suffix not in _MEMBERS:
                    raise DamageError(tar.name, key, suffix, "not a member of this format")
                payload = archive.extractfile(info)
                data = payload.read() if payload else b""
                if len(data) != info.size:
                    raise DamageError(tar.name, key, suffix, f"cut: {len(data)} of {info.size} bytes")
                clip = clips.setdefault(key, {"key": key, "labels": {}, "members": {}})
                clip["members"][_MEMBERS[suffix]] = [info.offset_data, info.size, zlib.crc32(data)]
                if suffix == "json":
                    clip["metadata"] = json.loads(data)
    except tarfile.TarError as error:
        raise DamageError(tar.name, "?", "tar", str(error)) from None
    for key, clip in clips.items():
        _finish_index_entry(tar.name, key, clip, modalities)
    return {"schema": SCHEMA, "shard": tar.name, "bytes": tar.stat().st_size, "clips": list(clips.values())}


def _finish_index_entry(shard: str, key: str, clip: dict[str, Any], modalities: list[str]) -> None:
    metadata = clip.pop("metadata", None)
    if metadata is None:
        raise DamageError(shard, key, "json", "no metadata")
    clip["labels"] = metadata["labels"]
    found = clip["members"]
    clip["members"] = {"json": found["json"]}
    for modality in modalities:
        declared = metadata["modalities"].get(modality)
        stored = found.get(modality)
        if (declared is None) != (stored is None):
            raise DamageError(shard, key, modality, "declared and stored presence differ")
        if declared is not None and [declared["bytes"], declared["crc32"]] != stored[1:]:
            raise DamageError(shard, key, modality, "bytes or crc32 differ from the declared ones")
        clip["members"][modality] = stored


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file so that it is whole or not there, and what was there before stays until then.

    Temporary name, fsync, rename. Who may read it is what the umask says, whatever its writer thinks of that:
    safetensors' files are their owner's alone.

    Args:
        path: The file.
        content: What to write, or what writes it under the path it is given.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content if isinstance(content, bytes) else b"")
        if not isinstance(content, bytes):
            mode = temporary.stat().st_mode
            content(temporary)
            temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write compact JSON, whole or not at all."""
    write_whole(path, (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Read the text of a manifest; `where` is what messages call it.

    Raises:
        UserError: it is no manifest, or of another schema.
    """
    try:
        return check_manifest(text, where)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: not a manifest of packed shards: {error}: write it again with karmma-dist verify --repair"
        ) from None


def check_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Read the text of a manifest and check its shape, so that what follows can rely on it.

    Names and hashes of shards become paths, so nothing but the expected form passes.

    Raises:
        ValueError: it is no manifest.
        UserError: it is of a newer schema.
    """
    try:
        manifest = json.loads(text)
        schema = manifest["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise UserError(f"{where}: of schema {schema}, newer than {SCHEMA}: update karmma-dist")
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}")
        _check_shape(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from None
    return dict(manifest)


def _check_shape(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or ValueError where a part is missing or of another kind."""
    for modality in manifest["modalities"]:
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r}")
    for head, names in manifest["heads"].items():
        if not isinstance(names, list):
            raise ValueError(f"classes of {head!r}")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not TAR_NAME.fullmatch(shard["name"]):
                raise ValueError(f"shard {shard['name']!r}: not the name of a shard")
            for name in ("sha256", "index_sha256"):
                if not _SHA256.fullmatch(shard[name]):
                    raise ValueError(f"shard {shard['name']!r}: {name} {shard[name]!r}")
            for name in ("clips", "bytes"):
                if type(shard[name]) is not int:
                    raise ValueError(f"shard {shard['name']!r}: {name} {shard[name]!r}")


class ShardFolder:
    """A folder of packed shards, opened for reading. Cheap to pickle: it holds no open file.

    Shards that lie elsewhere override where a tar and an index come from: `open_tar` and `read_index`.

    Attributes:
        root: The folder.
        where: What messages call it.

    Raises:
        UserError: the folder is missing, empty, half packed, or of another schema.
    """

    def __init__(self, root: str | Path) -> None:
        self.root, self.where = Path(root), str(root)
        path = self.root / MANIFEST
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such shards folder (pack one with: karmma-dist shard)")
        if not path.is_file():
            raise UserError(f"{self.root}: no {MANIFEST}, so no packed shards (pack some with: karmma-dist shard)")
        content = path.read_bytes()
        self.manifest: dict[str, Any] = parse_manifest(content, str(path))
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Of the manifest's bytes, which name every shard's sha256: equal only for the same clips in the same order."""

    @property
    def modalities(self) -> list[str]:
        """Modalities every clip declares, present or null."""
        return list(self.manifest["modalities"])

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per head, in the order of their ids."""
        return {head: list(names) for head, names in self.manifest["heads"].items()}

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest["splits"])

    def clips(self, split: str) -> list[Clip]:
        """All clips of a split, in shard order.

        Raises:
            UserError: no such split, or an index that is missing or does not belong to its tar.
        """
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.where}: no split '{split}'; there are {', '.join(self.splits) or 'none'}")
        return [clip for shard in self.manifest["splits"][split]["shards"] for clip in self._shard_clips(shard)]

    def _shard_clips(self, shard: dict[str, Any]) -> Iterator[Clip]:
        name = shard["name"]
        path = f"{self.where}/{index_path(Path(name))}"
        self._check_tar(shard)
        try:
            content = self.read_index(shard)
        except OSError as error:
            raise UserError(
                f"{path}: index cannot be read ({error}): write it again with karmma-dist verify --repair {self.where}"
            ) from None
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise UserError(
                f"{path}: not the index that the manifest names, but one of another packing, older or cut: "
                f"write it again with karmma-dist verify --repair {self.where}"
            )
        index = json.loads(content)
        for entry in index["clips"]:
            members = {name: None if m is None else Member(*m) for name, m in entry["members"].items()}
            yield Clip(entry["key"], name, entry["labels"], members)

    def read_index(self, shard: dict[str, Any]) -> bytes:
        """The index of a shard, given the shard's entry in the manifest.

        Raises:
            OSError: it cannot be read.
        """
        return index_path(self.root / shard["name"]).read_bytes()

    def open_tar(self, name: str) -> int:
        """Return a descriptor of a shard, open for reading; the caller closes it.

        Raises:
            OSError: it cannot be opened.
        """
        return os.open(self.root / name, os.O_RDONLY)

    def _check_tar(self, shard: dict[str, Any]) -> None:
        """Refuse a tar that was never the manifest's. One that is too short is damage, found clip by clip."""
        tar = self.root / shard["name"]
        if not tar.is_file():
            raise UserError(f"{tar}: no such shard, but the manifest names it: copy it here or pack again")
        size = tar.stat().st_size
        if size > shard["bytes"]:
            raise UserError(
                f"{tar}: {size} bytes, {shard['bytes']} by the manifest and the index, so they are of another tar: "
                "copy the folder again or pack again"
            )

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return one member's bytes, checked against its crc32. `modality` may be "json".

        Raises:
            DamageError: the tar is missing or cut, or the bytes are not the ones that were written.
            KeyError: the clip has no such member.
        """
        member = clip.members[modality]
        if member is None:
            raise KeyError(f"clip {clip.key} has no {modality}")
        name = member_name(clip.key, modality)
        try:
            descriptor = self.open_tar(clip.shard)
        except OSError as error:
            raise DamageError(clip.shard, clip.key, name, f"shard cannot be opened: {error.strerror}") from None
        try:
            data = os.pread(descriptor, member.size, member.offset)
        except OSError as error:
            raise DamageError(clip.shard, clip.key, name, f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if len(data) != member.size:
            raise DamageError(clip.shard, clip.key, name, f"cut: {len(data)} of {member.size} bytes")
        if zlib.crc32(data) != member.crc32:
            raise DamageError(clip.shard, clip.key, name, "crc32 differs")
        return data

    def metadata(self, clip: Clip) -> dict[str, Any]:
        """The clip's KEY.json.

        Raises:
            DamageError: it cannot be read as written.
        """
        result: dict[str, Any] = json.loads(self.read(clip, "json"))
        return result
