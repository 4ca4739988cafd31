"""A tar against its index, reading headers only: every member where the index says, and nothing else in the file.

Format: POSIX.1-2001 pax interchange, blocks of 512 bytes (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html).
A name of more than 100 bytes has an extended header before its own.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from karmma_dist.packing.findings import Finding
from karmma_dist.shards import Clip, Member, member_name

_BLOCK = tarfile.BLOCKSIZE
_LONGEST_NAME = 100
_TAIL_BYTES = 2 * _BLOCK


def check_headers(tar: Path, clips: list[Clip]) -> Iterator[Finding]:
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
            yield Finding(shard, key, modality, "index", f"byte {member.offset} lies in the member before")
            continue
        if gap and len(name) <= _LONGEST_NAME:
            yield _undeclared(descriptor, shard, end)
        if problem := _header_problem(os.pread(descriptor, _BLOCK, member.offset - _BLOCK), name, member):
            yield Finding(shard, key, modality, "header", f"{problem}, byte {member.offset - _BLOCK}")
        if member.offset + member.size > size:
            there = max(size - member.offset, 0)
            yield Finding(shard, key, modality, "presence", f"declared, but cut: {there} of {member.size} bytes")
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
        return f"no tar header ({error})"
    if info.name != name[:_LONGEST_NAME] or not info.isreg():
        return f"header is that of {info.name!r}, not of {name}"
    if info.size != member.size:
        return f"header says {info.size} bytes, the index {member.size}"
    return ""


def _undeclared(descriptor: int, shard: str, offset: int) -> Finding:
    """Something between two members, or after the last, that the index does not know."""
    try:
        info = tarfile.TarInfo.frombuf(os.pread(descriptor, _BLOCK, offset), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return Finding(shard, None, None, "undeclared", f"bytes at {offset} belong to no member of the index")
    key, _, suffix = info.name.partition(".")
    return Finding(shard, key, suffix, "undeclared", f"in the tar at byte {offset}, but not in the index")


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
