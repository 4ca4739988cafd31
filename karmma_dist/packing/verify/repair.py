"""Writes a lost or wrong index or manifest again from what is whole. No tar is ever changed.

A tar is the root of trust: its index follows from its bytes, and what the tars cannot tell (class names, settings) is
both in the manifest and in every index.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import sha256_of, sync, write_json
from karmma_dist.modalities.recording import is_of_the_machine
from karmma_dist.packing.pack import STAGING
from karmma_dist.packing.tars.lock import folder_lock
from karmma_dist.packing.tars.writer import shard_entry
from karmma_dist.packing.verify.problems import Finding
from karmma_dist.packing.verify.shard import check_headers
from karmma_dist.progress import Report, silent
from karmma_dist.shards.format import (
    MANIFEST,
    TAR_NAME,
    Clip,
    DamageError,
    count_labels,
    facts_of,
    index_path,
    label_problem,
    read_manifest,
    whole_manifest,
)
from karmma_dist.shards.index import copied_facts, indexed_clips, read_index, shard_index


@dataclass(slots=True)
class Repair:
    """What was done."""

    written: list[str] = field(default_factory=list)
    """Files written again."""
    findings: list[Finding] = field(default_factory=list)
    """What stands in the way of more."""


def repair(root: Path, *, progress: Report | None = None) -> Repair:
    """Write lost and wrong indexes again, and the manifest.

    With a manifest, an index is written from a tar whose sha256 is the manifest's. Without one, the manifest is written
    from the tars that are whole by their own headers and checksums, and the copy of its facts in any index; the clips
    of the other tars are then missing from it, and packing again adds them.

    Raises:
        UserError: the folder is missing, not finished, or in the hands of a packer; it cannot be written to.
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
            raise UserError(f"{error.filename or root}: {error.strerror}: it cannot be repaired here") from None
        if error.errno == errno.EIO or is_of_the_machine(error):
            raise UserError(f"{error.filename or root}: {error.strerror}: mend that and repair again") from None
        raise
    return done


def _mend(root: Path, manifest: dict[str, Any], done: Repair, progress: Report) -> None:
    """Write wrong indexes again, then the manifest if it is not what the indexes say."""
    trusted = {
        shard["name"]: index
        for entry in manifest["splits"].values()
        for shard in entry["shards"]
        if (index := _index_as_written(root / shard["name"], shard["index_sha256"])) is not None
    }
    copies = _distinct([copy for index, _ in trusted.values() if (copy := copied_facts(index)) is not None])
    facts = copies[0] if len(copies) == 1 else facts_of(manifest)
    splits: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    total, number = sum(len(entry["shards"]) for entry in manifest["splits"].values()), 0
    for split, entry in manifest["splits"].items():
        entries, clips = [], []
        for shard in entry["shards"]:
            tar = root / shard["name"]
            kept = trusted.get(tar.name) or _written_again(tar, shard["sha256"], facts, done)
            entries.append(shard if kept is None else _entry(shard, tar, *kept))
            clips += [] if kept is None else kept[1]
            number += 1
            progress("repair", number, total)
        splits[split] = {"clips": sum(shard["clips"] for shard in entries), "shards": entries}
        complete = len(clips) == splits[split]["clips"] and not _bad_labels(facts, clips)
        counts[split] = _counts(facts, clips) if complete else manifest["label_counts"][split]
    _write_manifest(root, whole_manifest(facts, splits, counts), manifest, done)


def _index_as_written(tar: Path, sha256: str) -> tuple[dict[str, Any], list[Clip]] | None:
    try:
        return read_index(tar) if sha256_of(index_path(tar)) == sha256 else None
    except (OSError, ValueError):
        return None


def _written_again(
    tar: Path, sha256: str, facts: dict[str, Any], done: Repair
) -> tuple[dict[str, Any], list[Clip]] | None:
    """Write the index of a tar that has this sha256; None when it has not."""
    try:
        if sha256_of(tar) != sha256:
            what = "its sha256 is not the manifest's: no index can be made from it"
            done.findings.append(Finding(tar.name, None, None, "sha256", what))
            return None
        index = shard_index(tar, facts)
    except FileNotFoundError:
        return None
    except (DamageError, OSError, ValueError) as error:
        if is_of_the_machine(error):
            raise
        done.findings.append(_unusable(tar, error))
        return None
    write_json(index_path(tar), index)
    done.written.append(index_path(tar).name)
    return index, indexed_clips(index)


def _entry(shard: dict[str, Any], tar: Path, index: dict[str, Any], clips: list[Clip]) -> dict[str, Any]:
    """A shard's entry with what its index says; the tar's own sha256 stays as the manifest has it."""
    sha256 = sha256_of(index_path(tar))
    return shard | {"clips": len(clips), "bytes": index["bytes"], "index_sha256": sha256}


def _rebuild_manifest(root: Path, done: Repair, progress: Report) -> None:
    """Write the manifest from whole tars and the copy of its facts in their indexes."""
    if (root / STAGING).is_dir():
        raise UserError(f"{root}: packing is not finished: run the same karmma-dist shard again")
    facts = _facts_of_indexes(root, done)
    if facts is None:
        return
    found: dict[str, list[tuple[Path, dict[str, Any], list[Clip]]]] = {split: [] for split in facts["plan"]["clips"]}
    tars = sorted(path for path in root.glob("*.tar") if TAR_NAME.fullmatch(path.name))
    for number, tar in enumerate(tars, start=1):
        split = TAR_NAME.fullmatch(tar.name)[1]  # type: ignore[index]
        index = _index_of_whole_tar(tar, facts, done) if split in found else None
        if index is not None:
            found[split].append((tar, index, indexed_clips(index)))
        progress("repair", number, len(tars))
    if not any(found.values()):
        return
    splits, counts = {}, {}
    for split, shards in found.items():
        entries = [shard_entry(tar, index) for tar, index, _ in shards]
        splits[split] = {"clips": sum(entry["clips"] for entry in entries), "shards": entries}
        counts[split] = _counts(facts, [clip for _, _, clips in shards for clip in clips])
    _write_manifest(root, whole_manifest(facts, splits, counts), None, done)


def _facts_of_indexes(root: Path, done: Repair) -> dict[str, Any] | None:
    copies = []
    for path in sorted(root.glob("*.index.json")):
        try:
            copies.append(copied_facts(read_index(path.with_name(path.name.removesuffix(".index.json") + ".tar"))[0]))
        except (OSError, ValueError):
            continue  # an index that cannot be read has nothing to give; it is written again from its tar
    distinct = _distinct([copy for copy in copies if copy is not None])
    if len(distinct) == 1:
        return distinct[0]
    if distinct:
        what = f"the indexes are of {len(distinct)} different packing runs: remove those that do not belong here"
    else:
        what = (
            "class names and settings are lost: no index holds a copy of them, and the tars have none; put back a copy "
            f"of {MANIFEST} or of any index, or pack again into another folder"
        )
    done.findings.append(Finding(MANIFEST, None, None, "manifest", what))
    return None


def _index_of_whole_tar(tar: Path, facts: dict[str, Any], done: Repair) -> dict[str, Any] | None:
    """The index of a tar that is whole by its own word, written where it was lost; None when anything contradicts."""
    try:
        index = shard_index(tar, facts)
    except (DamageError, OSError, ValueError, KeyError, TypeError) as error:
        if is_of_the_machine(error):
            raise
        done.findings.append(_unusable(tar, error))
        return None
    clips = indexed_clips(index)
    problems = [*check_headers(tar, clips), *_bad_labels(facts, clips)]
    if problems:
        done.findings += problems
        return None
    try:
        former, _ = read_index(tar)
    except (OSError, ValueError):
        former = None
    if former is not None and former["clips"] != index["clips"]:
        what = "the tar and its index disagree, and there is no manifest to tell which is right: remove both"
        done.findings.append(Finding(tar.name, None, None, "index", what))
        return None
    if former != index:
        write_json(index_path(tar), index)
        done.written.append(index_path(tar).name)
    return index


def _unusable(tar: Path, error: Exception) -> Finding:
    if isinstance(error, DamageError):
        return Finding(tar.name, error.key, error.member, "unreadable", error.what)
    return Finding(tar.name, None, None, "unreadable", f"cannot be read as a shard: {error!r}")


def _bad_labels(facts: dict[str, Any], clips: list[Clip]) -> list[Finding]:
    return [
        Finding(clip.shard, clip.key, None, "labels", problem)
        for clip in clips
        if (problem := label_problem(facts["heads"], clip.labels))
    ]


def _counts(facts: dict[str, Any], clips: list[Clip]) -> dict[str, list[int]]:
    return count_labels(facts["heads"], (clip.labels for clip in clips))


def _distinct(copies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(copy, sort_keys=True): copy for copy in copies}.values())


def _write_manifest(root: Path, manifest: dict[str, Any], former: dict[str, Any] | None, done: Repair) -> None:
    if manifest != former:
        write_json(root / MANIFEST, manifest)
        done.written.append(MANIFEST)
