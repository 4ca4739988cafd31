"""Writes a lost or wrong index or manifest again from undamaged files. No tar is ever changed.

A tar is the root of trust: its index follows from its bytes. The header, which the tars do not hold (class names,
settings), is both in the manifest and in every index.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of, sync, write_whole
from karmma_dist.modalities.recording import is_of_the_machine
from karmma_dist.packing.pack import STAGING
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.tars.writer import shard_entry, write_index
from karmma_dist.packing.verify.problems import Finding
from karmma_dist.packing.verify.shard import check_headers
from karmma_dist.progress import Report, silent
from karmma_dist.shards.format import (
    MANIFEST,
    TAR_NAME,
    Clip,
    DamageError,
    count_labels,
    index_path,
    label_problem,
)
from karmma_dist.shards.index import ShardIndex, build_index, read_index
from karmma_dist.shards.manifest import (
    DatasetHeader,
    LabelCounts,
    Manifest,
    ShardEntry,
    SplitEntry,
    read_manifest,
)


@dataclass(slots=True)
class Repair:
    """The result of a repair."""

    written: list[str] = field(default_factory=list)
    """Files written again."""
    findings: list[Finding] = field(default_factory=list)
    """Problems that prevent a complete repair."""


def repair(root: Path, *, progress: Report | None = None) -> Repair:
    """Write lost and wrong indexes again, and the manifest.

    With a manifest, an index is written from a tar whose sha256 is the manifest's. Without a manifest, it is written
    from the tars that their own headers and checksums prove whole, and from the copy of its header in any index; the
    clips of the other tars are then missing from it, and packing again adds them.

    Raises:
        UserError: the folder is missing, not finished, locked by a packer, or cannot be written to.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such shards folder (pack one with: karmma-dist shard)")
    done = Repair()
    try:
        with folder_lock(root, None):
            try:
                manifest = read_manifest(root)
            except (OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                _rebuild_manifest(root, done, progress or silent)
            else:
                _mend(root, manifest, done, progress or silent)
            sync(root)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{root}: disk full: free some space and repair again, no tar was touched") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{error.filename or root}: {error.strerror}: the folder cannot be repaired") from None
        if error.errno == errno.EIO or is_of_the_machine(error):
            raise UserError(f"{error.filename or root}: {error.strerror}: mend that and repair again") from None
        raise
    return done


def _mend(root: Path, manifest: Manifest, done: Repair, progress: Report) -> None:
    """Write wrong indexes again, then the manifest if it contradicts the indexes."""
    trusted = {
        shard.name: index
        for shard in manifest.shards
        if (index := _index_as_written(root / shard.name, shard.index_sha256)) is not None
    }
    copies = _distinct(index.header for index in trusted.values())
    header = copies[0] if len(copies) == 1 else manifest.header
    splits: dict[str, SplitEntry] = {}
    counts: dict[str, LabelCounts] = {}
    total, number = len(list(manifest.shards)), 0
    for split, entry in manifest.splits.items():
        entries: list[ShardEntry] = []
        clips: list[Clip] = []
        for shard in entry.shards:
            tar = root / shard.name
            index = trusted.get(tar.name) or _written_again(tar, shard.sha256, header, done)
            entries.append(shard if index is None else _entry(shard, tar, index))
            clips += () if index is None else index.clips
            number += 1
            progress("repair", number, total)
        splits[split] = replace(SplitEntry.of_shards(entries), extra=entry.extra)
        complete = len(clips) == splits[split].num_clips and not _bad_labels(header, clips)
        counts[split] = _counts(header, clips) if complete else manifest.label_counts[split]
    _write_manifest(root, replace(manifest, header=header, splits=splits, label_counts=counts), manifest, done)


def _index_as_written(tar: Path, sha256: str) -> ShardIndex | None:
    try:
        return read_index(tar) if sha256_of(index_path(tar)) == sha256 else None
    except (OSError, ValueError):
        return None


def _written_again(tar: Path, sha256: str, header: DatasetHeader, done: Repair) -> ShardIndex | None:
    """Write the index of a tar that has this sha256; return None if the tar has another."""
    try:
        if sha256_of(tar) != sha256:
            problem = "its sha256 is not the manifest's: no index can be made from it"
            done.findings.append(Finding(tar.name, None, None, "sha256", problem))
            return None
        index = build_index(tar, header.modalities, header)
    except FileNotFoundError:
        return None
    except (DamageError, OSError) as error:
        if is_of_the_machine(error):
            raise
        done.findings.append(_unusable(tar, error))
        return None
    write_index(tar, index)
    done.written.append(index_path(tar).name)
    return index


def _entry(shard: ShardEntry, tar: Path, index: ShardIndex) -> ShardEntry:
    """Return a shard's entry as its index says; the sha256 of the tar stays that of the manifest."""
    index_sha256 = sha256_of(index_path(tar))
    return replace(shard, num_clips=len(index.clips), num_bytes=index.num_bytes, index_sha256=index_sha256)


def _rebuild_manifest(root: Path, done: Repair, progress: Report) -> None:
    """Write the manifest from whole tars and the copy of its header in their indexes."""
    if (root / STAGING).is_dir():
        raise UserError(f"{root}: packing is not finished: run the same karmma-dist shard again")
    header = _header_of_indexes(root, done)
    if header is None:
        return
    shards: dict[str, list[tuple[Path, ShardIndex]]] = {split: [] for split in header.plan.clips}
    tars = sorted(path for path in root.glob("*.tar") if TAR_NAME.fullmatch(path.name))
    for number, tar in enumerate(tars, start=1):
        split = TAR_NAME.fullmatch(tar.name)[1]  # type: ignore[index]
        index = _index_of_whole_tar(tar, header, done) if split in shards else None
        if index is not None:
            shards[split].append((tar, index))
        progress("repair", number, len(tars))
    if not any(shards.values()):
        return
    splits, counts = {}, {}
    for split, indexed in shards.items():
        splits[split] = SplitEntry.of_shards([shard_entry(tar, index) for tar, index in indexed])
        counts[split] = _counts(header, [clip for _, index in indexed for clip in index.clips])
    _write_manifest(root, Manifest(header, splits, counts, header.extra), None, done)


def _header_of_indexes(root: Path, done: Repair) -> DatasetHeader | None:
    copies = []
    for path in sorted(root.glob("*.index.json")):
        try:
            copies.append(read_index(path.with_name(path.name.removesuffix(".index.json") + ".tar")).header)
        except (OSError, ValueError):
            continue  # an unreadable index has no copy; it is written again from its tar
    distinct = _distinct(copies)
    if len(distinct) == 1:
        return distinct[0]
    if distinct:
        problem = f"the indexes are of {len(distinct)} different packing runs: remove those that do not belong here"
    else:
        problem = (
            "class names and settings are lost: no index holds a copy of them, and the tars have none; put back a copy "
            f"of {MANIFEST} or of any index, or pack again into another folder"
        )
    done.findings.append(Finding(MANIFEST, None, None, "manifest", problem))
    return None


def _index_of_whole_tar(tar: Path, header: DatasetHeader, done: Repair) -> ShardIndex | None:
    """Return the index of a tar that its own headers and checksums prove whole, or None; write it where it was lost."""
    try:
        index = build_index(tar, header.modalities, header)
    except (DamageError, OSError) as error:
        if is_of_the_machine(error):
            raise
        done.findings.append(_unusable(tar, error))
        return None
    problems = [*check_headers(tar, index.clips), *_bad_labels(header, index.clips)]
    if problems:
        done.findings += problems
        return None
    try:
        former = read_index(tar)
    except (OSError, ValueError):
        former = None
    if former is not None and former.clips != index.clips:
        problem = "the tar and its index disagree, and no manifest tells which of them is right: remove both"
        done.findings.append(Finding(tar.name, None, None, "index", problem))
        return None
    if former != index:
        write_index(tar, index)
        done.written.append(index_path(tar).name)
    return index


def _unusable(tar: Path, error: Exception) -> Finding:
    if isinstance(error, DamageError):
        return Finding(tar.name, error.key, error.member, "unreadable", error.what)
    return Finding(tar.name, None, None, "unreadable", f"cannot be read as a shard: {error!r}")


def _bad_labels(header: DatasetHeader, clips: Sequence[Clip]) -> list[Finding]:
    return [
        Finding(clip.shard, clip.key, None, "labels", problem)
        for clip in clips
        if (problem := label_problem(header.heads, clip.labels))
    ]


def _counts(header: DatasetHeader, clips: Sequence[Clip]) -> LabelCounts:
    return count_labels(header.heads, (clip.labels for clip in clips))


def _distinct(copies: Iterable[DatasetHeader | None]) -> list[DatasetHeader]:
    return list({json.dumps(copy.to_dict(), sort_keys=True): copy for copy in copies if copy is not None}.values())


def _write_manifest(root: Path, manifest: Manifest, former: Manifest | None, done: Repair) -> None:
    if manifest != former:
        write_whole(root / MANIFEST, manifest.to_bytes())
        done.written.append(MANIFEST)
