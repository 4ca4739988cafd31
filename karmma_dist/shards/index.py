"""The index of a shard: each clip's labels, and offset, size and crc32 of every member.

Each index carries a copy of the manifest's facts, which the tars do not hold: a lost manifest can be written again,
byte for byte, from any index and the tars; with a manifest, any index.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

from karmma_dist.modalities import MODALITIES
from karmma_dist.shards.format import (
    FACTS,
    SCHEMA,
    Clip,
    DamageError,
    Member,
    check_key,
    expect,
    index_path,
    optional_int,
)

_MEMBERS = {m.member: m.name for m in MODALITIES.values()} | {"json": "json"}


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


_COPY = "manifest"


def copied_facts(index: dict[str, Any]) -> dict[str, Any] | None:
    """The facts that an index carries, or None when it has no copy of them."""
    copy = index.get(_COPY)
    return copy if isinstance(copy, dict) and set(copy) == set(FACTS) else None


def shard_index(tar: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Read a whole tar and return its index with a copy of the facts.

    Raises:
        DamageError: as `build_index`.
    """
    return with_facts(build_index(tar, facts["modalities"]), facts)


def with_facts(index: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """An index with a copy of the facts."""
    return {**index, _COPY: facts}


def read_index(tar: Path) -> tuple[dict[str, Any], list[Clip]]:
    """Read the index beside a tar, and its clips.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no index.
    """
    index = json.loads(index_path(tar).read_bytes())
    try:
        expect(index["bytes"], int)
        clips = [
            Clip(
                check_key(entry["key"]),
                tar.name,
                {head: optional_int(label, head) for head, label in entry["labels"].items()},
                {name: None if member is None else _member(*member) for name, member in entry["members"].items()},
            )
            for entry in index["clips"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an index: {error!r}") from None
    return index, clips


def _member(offset: Any, size: Any, crc32: Any) -> Member:
    for value in (offset, size, crc32):
        expect(value, int)
        if value < 0:
            raise ValueError(f"member [{offset}, {size}, {crc32}]")
    return Member(offset, size, crc32)


def indexed_clips(index: dict[str, Any], shard: str | None = None) -> list[Clip]:
    """Return the clips of an index whose hash is known to be right: nothing of it is checked.

    Args:
        index: What the file holds.
        shard: Name of the tar, where the manifest gives it; None: the one that the index was written for.
    """
    return [
        Clip(
            entry["key"], shard or index["shard"], entry["labels"],
            {name: None if member is None else Member(*member) for name, member in entry["members"].items()},
        )
        for entry in index["clips"]
    ]  # fmt: skip
