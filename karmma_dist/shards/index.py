"""The index of a shard: each clip's labels, and offset, size and crc32 of every member.

Each index carries a copy of the manifest's header, which the tars do not hold: a lost manifest can be written again,
byte for byte, from any index and the tars; with a manifest, any index.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karmma_dist.io.files import json_bytes, read_file
from karmma_dist.io.json_fields import JsonObject, shown
from karmma_dist.modalities import MODALITIES
from karmma_dist.shards.format import CLIP_KEY, SCHEMA, Clip, DamageError, Member, index_path, parse_declarations
from karmma_dist.shards.manifest import DatasetHeader

_MODALITY_OF = {m.member: m.name for m in MODALITIES.values()} | {"json": "json"}
"""Modality of a member, or "json", by the member's file name behind the key."""

_HEADER = "manifest"
"""Field that holds the copy of the header."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The index of one shard."""

    shard: str
    """File name of the tar."""
    num_bytes: int
    """Size of the tar."""
    clips: tuple[Clip, ...]
    header: DatasetHeader | None = None
    """Copy of the manifest's header; None in indexes that carry none."""

    @classmethod
    def parse(cls, content: bytes, shard: str) -> ShardIndex:
        """Parse the content of an index file.

        Args:
            content: The file's bytes.
            shard: File name of the tar.

        Raises:
            ValueError: the content is not an index; the message names the field.
        """
        return cls.from_fields(JsonObject.parse(content, may_repeat=True), shard)  # its hash is in the manifest

    @classmethod
    def from_fields(cls, values: JsonObject, shard: str) -> ShardIndex:
        """Read an index from parsed JSON, as `parse` does."""
        if values.whole("schema") != SCHEMA:
            raise values.problem("schema")
        clips = tuple(_clips(values.items("clips"), values.path_of("clips"), shard))
        header = None
        if _HEADER in values:
            header = DatasetHeader.from_fields(values.nested(_HEADER), with_extra=True)
        return cls(values.text("shard"), values.whole("bytes"), clips, header)

    def with_header(self, header: DatasetHeader) -> ShardIndex:
        """Return the index with a copy of a header."""
        return replace(self, header=header)

    def to_dict(self) -> dict[str, Any]:
        """Return the index as JSON values."""
        clips = [
            {
                "key": clip.key,
                "labels": clip.labels,
                "members": {
                    name: None if member is None else [member.offset, member.size, member.crc32]
                    for name, member in clip.members.items()
                },
            }
            for clip in self.clips
        ]
        header = {} if self.header is None else {_HEADER: self.header.to_dict()}
        return {"schema": SCHEMA, "shard": self.shard, "bytes": self.num_bytes, "clips": clips, **header}

    def to_bytes(self) -> bytes:
        """Return the content of an index file."""
        return json_bytes(self.to_dict())


def _clips(entries: list[Any], path: str, shard: str) -> Iterator[Clip]:
    """Read the clips of an index, checked in place and without `JsonObject`: an index has thousands of them."""
    names = {*MODALITIES, "json"}
    make = tuple.__new__  # a third of the time of `Member(...)`: checked like this, indexes load as fast as unchecked
    for number, entry in enumerate(entries):
        if type(entry) is not dict:
            raise ValueError(f"{path}[{number}] is {shown(entry)}, not an object")
        key, labels, declared = entry.get("key"), entry.get("labels"), entry.get("members")
        if type(key) is not str or not CLIP_KEY.fullmatch(key):
            raise ValueError(f"{path}[{number}].key is {shown(key)}")
        if type(labels) is not dict or type(declared) is not dict:
            wrong = "members" if type(labels) is dict else "labels"
            raise ValueError(f"{path}[{number}].{wrong} is {shown(entry.get(wrong))}, not an object")
        for head, label in labels.items():
            if label is not None and (type(label) is not int or label < 0):
                raise ValueError(f"{path}[{number}].labels.{head} is {shown(label)}")
        members: dict[str, Member | None] = {}
        for name, place in declared.items():
            if place is None:
                members[name] = None
            elif type(place) is list and len(place) == 3:
                offset, size, crc32 = place
                if type(offset) is type(size) is type(crc32) is int and offset >= 0 <= size and crc32 >= 0:
                    members[name] = make(Member, place)
        if len(members) < len(declared) or not members.keys() <= names:
            wrong = next(name for name in declared if name not in members or name not in names)
            raise ValueError(f"{path}[{number}].members.{wrong} is {shown(declared[wrong])}")
        if members.get("json") is None:
            raise ValueError(f"{path}[{number}].members.json is missing: every clip has metadata")
        yield Clip(key, shard, labels, members, number)


def read_index(tar: Path) -> ShardIndex:
    """Read the index of a tar.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an index.
    """
    return ShardIndex.parse(read_file(index_path(tar)), tar.name)


def build_index(tar: Path, modalities: tuple[str, ...], header: DatasetHeader | None = None) -> ShardIndex:
    """Read a whole tar and return its index: every member's offset, size and crc32, and each clip's labels.

    Args:
        tar: The shard.
        modalities: Modalities that every clip must declare.
        header: Header to carry a copy of, if any.

    Raises:
        DamageError: the tar is cut, a clip has no metadata, or its members are not the declared ones.
        OSError: the tar cannot be read.
    """
    members: dict[str, dict[str, Member]] = {}
    metadata: dict[str, bytes] = {}
    for key, suffix, offset, data in _tar_members(tar):
        if suffix not in _MODALITY_OF or not CLIP_KEY.fullmatch(key):
            raise DamageError(tar.name, key, suffix, "not a member of this format")
        members.setdefault(key, {})[_MODALITY_OF[suffix]] = Member(offset, len(data), zlib.crc32(data))
        if suffix == "json":
            metadata[key] = data
    clips = tuple(
        _indexed_clip(tar.name, row, key, metadata.get(key), stored, modalities)
        for row, (key, stored) in enumerate(members.items())
    )
    return ShardIndex(tar.name, tar.stat().st_size, clips, header)


def _tar_members(tar: Path) -> Iterator[tuple[str, str, int, bytes]]:
    """Yield key, name behind the key, offset and bytes of every member."""
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                key, _, suffix = info.name.partition(".")
                payload = archive.extractfile(info)
                data = payload.read() if payload else b""
                if len(data) != info.size:
                    raise DamageError(tar.name, key, suffix, f"cut: {len(data)} of {info.size} bytes")
                yield key, suffix, info.offset_data, data
    except (tarfile.TarError, ValueError) as error:  # tarfile raises ValueError for some damaged headers
        raise DamageError(tar.name, "?", "tar", str(error)) from None


def _indexed_clip(
    shard: str, row: int, key: str, metadata: bytes | None, stored: dict[str, Member], modalities: tuple[str, ...]
) -> Clip:
    """Return a clip's entry, its members compared with those that its metadata declares."""
    if metadata is None:
        raise DamageError(shard, key, "json", "no metadata")
    try:
        labels, declared = parse_declarations(JsonObject.parse(metadata))
    except ValueError as error:
        raise DamageError(shard, key, "json", f"not a clip's metadata: {error}") from None
    members: dict[str, Member | None] = {"json": stored["json"]}
    for modality in modalities:
        size_and_crc32, member = declared.get(modality), stored.get(modality)
        if (size_and_crc32 is None) != (member is None):
            raise DamageError(shard, key, modality, "declared and stored presence differ")
        if member is not None and size_and_crc32 != (member.size, member.crc32):
            raise DamageError(shard, key, modality, "bytes or crc32 differ from the declared ones")
        members[modality] = member
    return Clip(key, shard, labels, members, row)
