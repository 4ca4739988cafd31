"""What a reader of a raw dataset hands to the packer: recordings, each with the clips to cut from it.

Nothing here has been decoded: a plan is made from annotation files and the existence of media files alone.
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
    """Everything that is to be packed, in the order of the annotation files."""

    recordings: tuple[Recording, ...]
    classes: dict[str, list[str]]
    """Class names per head, by id."""
    splits: tuple[str, ...]
    """Splits whose annotations are there."""
    notes: tuple[str, ...] = ()
    """What the user should know: splits skipped, settings without effect."""

    def keys(self, split: str) -> list[str]:
        """Keys of a split's planned clips, sorted."""
        return sorted(clip.key for recording in self.recordings for clip in recording.clips if clip.split == split)


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that has media which cannot be read: it is left out of the shards."""

    key: str
    split: str
    modality: str
    stage: str
    """What was being done: open, decode, cut, parse."""
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
    """A clip's members as they go into the tar, with the description that KEY.json gives of each."""

    record: ClipRecord
    payloads: dict[str, bytes]
    """Bytes per present modality."""
    described: dict[str, dict[str, Any]]
    """Description per present modality, without bytes and crc32."""
    stop_s: float | None
    """Where the clip ends; found in the media when the record does not say."""


def inside(raw: Path, relative: str, where: str) -> Path:
    """Return `raw / relative`, which must not leave `raw`.

    Raises:
        UserError: it does; `where` names the file and row or key to blame.
    """
    path = Path(os.path.normpath(raw / relative))
    if not path.is_relative_to(os.path.normpath(raw)):
        raise UserError(f"{where}: path '{relative}' leaves the raw folder {raw}")
    return path


def raw_file(raw: Path, relative: str, where: str) -> Path | None:
    """The file `relative` inside `raw`, or with `.gz` appended, or None when neither is there."""
    path = inside(raw, relative, where)
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def frames_of(raw: Path, relative: str, where: str) -> Path | None:
    """The tar (`relative` + .tar) or folder of numbered frames inside `raw`, or None when neither is there."""
    folder = inside(raw, relative, where)
    tar = folder.with_name(f"{folder.name}.tar")
    if tar.is_file():
        return tar
    return folder if folder.is_dir() else None
