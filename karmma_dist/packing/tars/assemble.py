"""Assembles cut clips into shards, in an order that depends on the plan and the seed alone."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2

from karmma_dist import __version__
from karmma_dist.io.files import sync
from karmma_dist.modalities.recording import is_of_the_machine
from karmma_dist.packing.records import Plan
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.tars.writer import Sample, shard_entry, write_index, write_shard
from karmma_dist.progress import Report
from karmma_dist.seeding import generator
from karmma_dist.shards.format import Clip, DamageError, count_labels, index_path, shard_name
from karmma_dist.shards.index import build_index, read_index
from karmma_dist.shards.manifest import DatasetHeader, LabelCounts, Manifest, ShardEntry, SplitEntry


@dataclass(frozen=True, slots=True)
class Source:
    """A cut clip and the tar that holds it: a unit's tar, or an existing shard."""

    tar: Path
    clip: Clip


def shard_keys(keys: list[str], split: str, seed: int, clips_per_shard: int) -> list[list[str]]:
    """Spread a split's planned keys over shards of nearly equal size, by a permutation of their sorted order."""
    ordered = [sorted(keys)[place] for place in generator(seed, split).permutation(len(keys))]
    num_shards = -(-len(keys) // clips_per_shard)
    return [
        ordered[number * len(keys) // num_shards : (number + 1) * len(keys) // num_shards]
        for number in range(num_shards)
    ]


def assemble(
    out: Path, plan: Plan, sources: dict[str, Source], spec: PackingSpec, header: DatasetHeader, progress: Report
) -> Manifest:
    """Write every shard that does not exist yet, remove those of an earlier attempt, and return the manifest.

    Each index gets a copy of the header.

    Raises:
        DamageError: a cut clip cannot be read back as it was written.
    """
    total, done = sum(len(plan.keys(split)) for split in plan.splits), 0
    splits: dict[str, SplitEntry] = {}
    counts: dict[str, LabelCounts] = {}
    for split in plan.splits:
        entries: list[ShardEntry] = []
        written: list[Source] = []
        for number, planned in enumerate(shard_keys(plan.keys(split), split, spec.seed, spec.clips_per_shard)):
            tar = out / shard_name(split, number)
            cut = [sources[key] for key in planned if key in sources]
            if cut:
                entries.append(_write(tar, cut, header))
            written += cut
            done += len(planned)
            progress("write", done, total)
        counts[split] = count_labels(plan.classes, (source.clip.labels for source in written))
        splits[split] = SplitEntry.of_shards(entries)
        _remove_others(out, split, {entry.name for entry in entries})
    sync(out)
    return Manifest(header, splits, counts)


def packed_clips(out: Path, manifest: Manifest) -> dict[str, Source]:
    """Index the shards again and return every clip of the undamaged ones."""
    sources: dict[str, Source] = {}
    for entry in manifest.shards:
        tar = out / entry.name
        try:
            index = build_index(tar, manifest.header.modalities, manifest.header)
        except (DamageError, OSError) as error:
            if is_of_the_machine(error):
                raise
            continue
        write_index(tar, index)
        sources |= {clip.key: Source(tar, clip) for clip in index.clips}
    return sources


def shards_are_whole(out: Path, manifest: Manifest) -> bool:
    """Return True if every tar and index exists with the manifest's size. `verify` checks their content."""
    try:
        for entry in manifest.shards:
            tar = out / entry.name
            if tar.stat().st_size != entry.num_bytes or len(read_index(tar).clips) != entry.num_clips:
                return False
    except (OSError, ValueError):
        return False
    return True


def made_with() -> dict[str, str]:
    """Return the versions that the bytes depend on."""
    return {"karmma_dist": __version__, "av": av.__version__, "opencv": cv2.__version__}


def _write(tar: Path, sources: list[Source], header: DatasetHeader) -> ShardEntry:
    if all(source.tar == tar for source in sources):
        index = read_index(tar)
        if [clip.key for clip in index.clips] == [source.clip.key for source in sources]:
            if index.header != header:
                index = index.with_header(header)
                write_index(tar, index)
            return shard_entry(tar, index)
    return write_shard(tar, _samples(sources), header)


def _samples(sources: list[Source]) -> Iterator[tuple[str, Sample]]:
    for source in sources:
        names = [name for name, member in source.clip.members.items() if member is not None]
        yield source.clip.key, {name: _read(source, name) for name in names}


def _read(source: Source, name: str) -> bytes:
    member = source.clip.members[name]
    assert member is not None
    with open(source.tar, "rb") as file:
        data = os.pread(file.fileno(), member.size, member.offset)
    if len(data) != member.size or zlib.crc32(data) != member.crc32:
        raise DamageError(source.tar.name, source.clip.key, name, "not the bytes that were written: pack again")
    return data


def _remove_others(out: Path, split: str, kept: set[str]) -> None:
    for tar in out.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
        if tar.name not in kept:
            index_path(tar).unlink(missing_ok=True)
            tar.unlink()
