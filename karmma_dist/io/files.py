"""Writing of files so that each is complete or absent, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write a file completely or not at all; an earlier file stays until the new one is complete.

    It is written under a temporary name, synced and renamed. The umask decides who may read it, whatever mode the
    writer sets: safetensors writes files that only their owner may read.

    Args:
        path: Path of the file.
        content: Bytes to write, or a function that writes the file to the given path.
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
    """Write compact JSON, completely or not at all."""
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return compact JSON in UTF-8: one line with its line break."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
