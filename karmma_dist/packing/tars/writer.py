"""Writes a tar of clips and its index, whole or not at all, and with the same bytes for the same clips."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from karmma_dist.io.files import sha256_of, whole_file, write_whole
from karmma_dist.modalities.recording import Recording
from karmma_dist.packing.records import CutClip
from karmma_dist.shards.format import index_path, member_name
from karmma_dist.shards.index import ShardIndex, build_index
from karmma_dist.shards.manifest import DatasetHeader, ShardEntry

Sample = Mapping[str, bytes]
"""A clip's members: bytes per modality, and its metadata under "json"."""


def clip_sample(cut: CutClip, recording: Recording, modalities: list[str]) -> dict[str, bytes]:
    """Return a cut clip's members. KEY.json declares every modality: bytes, crc32 and description, or null."""
    record = cut.record
    declared: dict[str, Any] = {}
    for modality in modalities:
        payload = cut.payloads.get(modality)
        declared[modality] = None if payload is None else {
            "bytes": len(payload), "crc32": zlib.crc32(payload), **cut.described[modality],
        }  # fmt: skip
    metadata = {
        "key": record.key, "split": record.split, "recording": recording.name, "participant": recording.participant,
        "start_s": record.start_s, "stop_s": cut.stop_s, "narration": record.narration, "labels": record.labels,
        "modalities": declared,
    }  # fmt: skip
    payloads = {modality: cut.payloads[modality] for modality in modalities if modality in cut.payloads}
    return {"json": json.dumps(metadata, separators=(",", ":"), ensure_ascii=False).encode(), **payloads}


def write_tar(path: Path, samples: Iterable[tuple[str, Sample]]) -> int:
    """Write (key, members) pairs as a WebDataset tar, whole or not at all; return the number of clips."""
    num = 0
    # The writer of webdataset gives the same bytes, but loads PyTorch: 350 MB in each packing process.
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for name, data in sorted((member_name(key, modality), data) for modality, data in members.items()):
                tar.addfile(_header(name, len(data)), io.BytesIO(data))
            num += 1
    return num


def write_shard(path: Path, samples: Iterable[tuple[str, Sample]], header: DatasetHeader) -> ShardEntry:
    """Write a shard and its index, which carries a copy of the manifest's header; return its manifest entry.

    Raises:
        DamageError: the bytes that were read back are not those that were written.
    """
    write_tar(path, samples)
    index = build_index(path, header.modalities, header)
    write_index(path, index)
    return shard_entry(path, index)


def write_index(tar: Path, index: ShardIndex) -> None:
    """Write the index of a tar, whole or not at all."""
    write_whole(index_path(tar), index.to_bytes())


def shard_entry(path: Path, index: ShardIndex) -> ShardEntry:
    """Return the manifest entry of a shard whose tar and index are written."""
    return ShardEntry(path.name, len(index.clips), index.num_bytes, sha256_of(path), sha256_of(index_path(path)))


def _header(name: str, size: int) -> tarfile.TarInfo:
    """Return a member's header. Owner, time and mode are fixed: the bytes depend on neither machine nor time."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = size, 0o444, 0
    header.uname = header.gname = "karmma"
    return header
