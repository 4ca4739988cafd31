"""Recognition, by its first bytes, of a file that is not a container of video or audio."""

from __future__ import annotations

import stat
from pathlib import Path

_HEADER_BYTES = 512

_SIGNATURES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it"),
    (b"BZh", "is bzip2-compressed: unpack it"),
    (b"\xfd7zXZ\x00", "is xz-compressed: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is zstd-compressed: unpack it"),
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"#EXTM3U", "is a playlist, which names other files"),
    (b"ffconcat", "is a playlist, which names other files"),
    (b"[playlist]", "is a playlist, which names other files"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<mpd", b"<smil")


def unusable_type(path: Path) -> str:
    """Return in words why a file cannot be a container of video or audio, or an empty string.

    Playlists are refused because FFmpeg would open the files that they name, wherever these lie.

    Raises:
        OSError: it cannot be read.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
        if not header:
            return "is empty (0 bytes)"
        if not header.strip(b"\0") and not file.read(1 << 16).strip(b"\0"):
            return "begins with zeros only: the copy is incomplete"
    text = header.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, problem in _SIGNATURES:
        if text.startswith(signature) or header.startswith(signature):
            return problem
    if text.lower().startswith(_PAGES):
        return "is a page of HTML or XML: the download failed"
    if header[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    return _lacks_moov(path) if header[4:8] in (b"ftyp", b"mdat", b"wide", b"free", b"skip") else ""


def _lacks_moov(path: Path) -> str:
    """Return in words that an MP4 file has no `moov` box (ISO 14496-12), without which nothing of it can be read."""
    size, place = path.stat().st_size, 0
    with open(path, "rb") as file:
        while place + 8 <= size:
            file.seek(place)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if box[4:8] == b"moov":
                return ""
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length == 0:
                break
            if length < 8:
                return ""
            place += length
    return "has no moov box: the recording was not finished, or the copy is incomplete"
