"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    write_whole(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return compact JSON in UTF-8: one line with its line break."""
    return (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
