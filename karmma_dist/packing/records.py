"""The plan that a reader of a raw dataset hands to the packer: recordings, each with the clips to cut from it.

Nothing is decoded for it: a plan depends on the annotation files and on which media files exist.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities.recording import ClipRecord, Recording


@dataclass(frozen=True, slots=True)
class Plan:
    """All recordings to pack, in the order of the annotation files."""

    recordings: tuple[Recording, ...]
    classes: dict[str, list[str]]
    """Class names per head, by id."""
    splits: tuple[str, ...]
    """Splits whose annotations exist."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: splits skipped, settings without effect."""

    def keys(self, split: str) -> list[str]:
        """Return the keys of a split's planned clips, sorted."""
        return sorted(clip.key for recording in self.recordings for clip in recording.clips if clip.split == split)


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that is left out of the shards, because some of its media cannot be read."""

    key: str
    split: str
    modality: str
    stage: str
    """Step that failed: open, decode, cut or parse."""
    error: str

    @classmethod
    def from_fields(cls, fields: JsonObject) -> Failure:
        """Read a failure from parsed JSON.

        Raises:
            ValueError: a field is missing or is not a string.
        """
        return cls(*(fields.text(name) for name in ("key", "split", "modality", "stage", "error")))


@dataclass(slots=True)
class CutClip:
    """A clip's members as the tar holds them, with the description of each for KEY.json."""

    record: ClipRecord
    payloads: dict[str, bytes]
    """Bytes of every present modality."""
    described: dict[str, dict[str, Any]]
    """Description of every present modality, without bytes and crc32."""
    stop_s: float | None
    """End of the clip, in seconds; measured in the media where the annotations give none."""


def inside(raw: Path, relative: str, place: str) -> Path:
    """Return `raw / relative`, which must not leave `raw`.

    Raises:
        UserError: the path leaves it; `place` names the file and row, or the key, that gives the path.
    """
    path = Path(os.path.normpath(raw / relative))
    if not path.is_relative_to(os.path.normpath(raw)):
        raise UserError(f"{place}: path '{relative}' leaves the raw folder {raw}")
    return path


def raw_file(raw: Path, relative: str, place: str) -> Path | None:
    """Return the file `relative` inside `raw`, or the one with `.gz` appended; None if neither exists."""
    path = inside(raw, relative, place)
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def frames_of(raw: Path, relative: str, place: str) -> Path | None:
    """Return the tar (`relative` + .tar) or folder of numbered frames inside `raw`; None if neither exists."""
    folder = inside(raw, relative, place)
    tar = folder.with_name(f"{folder.name}.tar")
    if tar.is_file():
        return tar
    return folder if folder.is_dir() else None
