"""Checks one shard against its manifest entry, its index and its tar headers, independently of other shards.

Format: POSIX.1-2001 pax interchange, blocks of 512 bytes (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html).
A name of more than 100 bytes has an extended header before its own.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from karmma_dist.io.files import sha256_of
from karmma_dist.packing.verify.clip import Shown, check_clip
from karmma_dist.packing.verify.problems import Finding
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, Member, index_path, label_problem, member_name
from karmma_dist.shards.index import read_index
from karmma_dist.shards.manifest import DatasetHeader, ShardEntry

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 100
_TAIL_BYTES = 2 * _BLOCK


def check_headers(tar: Path, clips: Sequence[Clip]) -> Iterator[Finding]:
    """Yield every difference between the clips of an index and the headers of their tar."""
    members = sorted(
        ((member, clip.key, name) for clip in clips for name, member in clip.members.items() if member is not None),
        key=lambda entry: entry[0].offset,
    )
    try:
        descriptor = os.open(tar, os.O_RDONLY)
    except OSError as error:
        yield Finding(tar.name, None, None, "unreadable", f"cannot be opened: {error.strerror}")
        return
    try:
        yield from _check_members(descriptor, tar.name, members)
    except OSError as error:
        yield Finding(tar.name, None, None, "unreadable", f"cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)


def _check_members(descriptor: int, shard: str, members: list[tuple[Member, str, str]]) -> Iterator[Finding]:
    size, end = os.fstat(descriptor).st_size, 0
    for member, key, modality in members:
        name = member_name(key, modality)
        gap = member.offset - _BLOCK - end
        if gap < 0:
            yield Finding(shard, key, modality, "index", f"byte {member.offset} lies in the previous member")
            continue
        if gap and len(name) <= _LONGEST_NAME:
            yield _undeclared(descriptor, shard, end)
        if problem := _header_problem(os.pread(descriptor, _BLOCK, member.offset - _BLOCK), name, member):
            yield Finding(shard, key, modality, "header", f"{problem}, byte {member.offset - _BLOCK}")
        if member.offset + member.size > size:
            num_left = max(size - member.offset, 0)
            yield Finding(shard, key, modality, "presence", f"declared, but cut: {num_left} of {member.size} bytes")
        end = member.offset + _blocks(member.size)
    tail = os.pread(descriptor, max(size - end, 0), end)
    if tail.strip(b"\0"):
        yield _undeclared(descriptor, shard, end)
    elif len(tail) < _TAIL_BYTES:
        yield Finding(shard, None, None, "size", f"cut: no end-of-archive mark at byte {end}")


def _header_problem(block: bytes, name: str, member: Member) -> str:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"not a tar header ({error})"
    if info.name != name[:_LONGEST_NAME] or not info.isreg():
        return f"header names {info.name!r}, not {name}"
    if info.size != member.size:
        return f"header says {info.size} bytes, the index {member.size}"
    return ""


def _undeclared(descriptor: int, shard: str, offset: int) -> Finding:
    """Return the finding for bytes, between members or after the last, that the index does not know."""
    try:
        info = tarfile.TarInfo.frombuf(os.pread(descriptor, _BLOCK, offset), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return Finding(shard, None, None, "undeclared", f"bytes at {offset} belong to no member of the index")
    key, _, suffix = info.name.partition(".")
    return Finding(shard, key, suffix, "undeclared", f"in the tar at byte {offset}, but not in the index")


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


@dataclass(slots=True)
class ShardReport:
    """Results of one shard: small, since another process may send them."""

    shard: str
    """File name of the tar."""
    exists: bool
    """True if the tar is a file."""
    findings: list[Finding] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    """Keys of all clips in the index."""
    labels: list[dict[str, int | None]] | None = None
    """Labels of all clips; None if the index or any label is damaged."""
    other_field: str = ""
    """Name of a header field in which the index's copy differs from the manifest."""
    shown: list[Shown] = field(default_factory=list)
    """Ends of the stored frames of each clip; only of a full check."""


def check_shard(
    root: Path,
    split: str,
    entry: ShardEntry,
    header: DatasetHeader,
    full: bool,
    progress: Callable[[int], None] | None = None,
) -> ShardReport:
    """Check one shard.

    Args:
        root: The shards folder.
        split: Split of the shard, as the manifest says.
        entry: The manifest's entry of the shard.
        header: The manifest's header.
        full: Read and decode the payloads too.
        progress: Called with the number of clips that have been read in full.
    """
    tar = root / entry.name
    report = ShardReport(tar.name, tar.is_file())
    clips = _index(tar, entry, header, report)
    if not report.exists:
        _add(report, "missing", f"no such file: {entry.num_clips} clips")
    elif tar.stat().st_size != entry.num_bytes:
        _add(report, "size", f"{tar.stat().st_size} bytes, the manifest says {entry.num_bytes}")
    if report.exists and full:
        _sha256(tar, entry, report)
    if clips is None:
        return report
    report.keys = [clip.key for clip in clips]
    problems = [_declarations(clip, header, report) for clip in clips]
    report.labels = None if any(problems) else [clip.labels for clip in clips]
    if report.exists:
        header_findings = list(check_headers(tar, clips))
        report.findings += header_findings
        if full:
            # A member whose header or place is damaged is not named again.
            blamed, folder = {(finding.key, finding.member) for finding in header_findings}, ShardFolder(root)
            for num, clip in enumerate(clips, start=1):
                _payloads(folder, clip, split, blamed, report)
                if progress is not None:
                    progress(num)
    return report


def _add(report: ShardReport, kind: str, problem: str, key: str | None = None, shard: str = "") -> None:
    report.findings.append(Finding(shard or report.shard, key, None, kind, problem))


def _index(tar: Path, entry: ShardEntry, header: DatasetHeader, report: ShardReport) -> tuple[Clip, ...] | None:
    path = index_path(tar)
    try:
        index = read_index(tar)
        if sha256_of(path) != entry.index_sha256:
            raise ValueError("its sha256 is not the manifest's")
    except FileNotFoundError:
        _add(report, "index", "lost: no such file", shard=path.name)
        return None
    except (OSError, ValueError) as error:
        _add(report, "index", f"cannot be used: {error}", shard=path.name)
        return None
    if (len(index.clips), index.num_bytes) != (entry.num_clips, entry.num_bytes):
        expected = f"the manifest says {entry.num_clips} in {entry.num_bytes}"
        _add(report, "manifest", f"{len(index.clips)} clips in {index.num_bytes} bytes, {expected}", shard=path.name)
    if index.header is not None:
        report.other_field = index.header.first_difference(header)
    return index.clips


def _sha256(tar: Path, entry: ShardEntry, report: ShardReport) -> None:
    try:
        if sha256_of(tar) != entry.sha256:
            _add(report, "sha256", "not the bytes that were packed")
    except OSError as error:
        _add(report, "unreadable", f"cannot be read: {error.strerror}")


def _declarations(clip: Clip, header: DatasetHeader, report: ShardReport) -> str:
    """Check a clip's entry in the index. Return the problem with its labels, or an empty string."""
    declared = {"json", *header.modalities}
    if set(clip.members) != declared or clip.members.get("json") is None:
        presence = f"declares {', '.join(clip.members)}, not json and each of {', '.join(header.modalities)}"
        _add(report, "presence", presence, clip.key)
    problem = label_problem(header.heads, clip.labels)
    if problem:
        _add(report, "labels", problem, clip.key)
    return problem


def _payloads(
    folder: ShardFolder, clip: Clip, split: str, blamed: set[tuple[str | None, str | None]], report: ShardReport
) -> None:
    for result in check_clip(folder, clip, split):
        if isinstance(result, Shown):
            report.shown.append(result)
        elif (result.key, result.member) not in blamed:
            report.findings.append(result)
