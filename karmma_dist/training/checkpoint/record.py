"""position.json, the record of a checkpoint: it names every file with its checksum and ends with one of itself.

    {"format":3,"steps":120,"epoch":4,"step":20,...,"files":{...},"sha256":"2f9c..."}

The last field is the hash of all bytes before its comma. A record is read only if the file is byte for byte what was
written, so neither a flipped bit nor a cut file can pass for another position.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.io.files import MOST_BYTES, json_text, read_file
from karmma_dist.io.json_fields import JsonObject, parse_strictly, shown
from karmma_dist.streaming.order import Position

FORMAT = 3
"""Version of a checkpoint's layout."""
POSITION = "position.json"
"""File that marks a folder as a checkpoint."""

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"\}\n')
_SEAL_BYTES = 78
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_FOLDER_NAME = re.compile(r"step-\d+")
_LENGTH_OF_NAME = 200


@dataclass(frozen=True)
class FileSum:
    """Size and checksum of a file."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True)
class CheckpointRecord:
    """The content of position.json."""

    position: Position
    """Position in the order of clips: epoch, and optimizer steps within it."""
    steps: int
    """Optimizer steps since the beginning of the run, which name the folder."""
    world_size: int
    """Number of ranks that saved."""
    zero_stage: int
    """ZeRO stage that saved."""
    data: dict[str, Any]
    """Settings without which the position means nothing: see `checkpoint.data_state`."""
    engine: dict[str, Any]
    """State of the engine that is equal on every rank."""
    state: dict[str, Any]
    """Further values that the trainer saved."""
    versions: dict[str, str]
    """Versions of the software that saved."""
    files: dict[str, FileSum]
    """Checksum of every other file of the folder, by name."""

    @property
    def folder_name(self) -> str:
        """Name of the checkpoint's folder."""
        return step_folder(self.steps)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        fields = {
            "format": FORMAT, "steps": self.steps, "epoch": self.position.epoch, "step": self.position.step,
            "world_size": self.world_size, "zero_stage": self.zero_stage, "data": self.data, "engine": self.engine,
            "state": self.state, "versions": self.versions,
            "files": {name: {"bytes": entry.num_bytes, "crc32": entry.crc32} for name, entry in self.files.items()},
        }  # fmt: skip
        sealed = json_text(fields, separators=(",", ":"))[:-1].encode()
        return sealed + f',"sha256":"{hashlib.sha256(sealed).hexdigest()}"}}\n'.encode()

    @classmethod
    def parse(cls, content: bytes) -> CheckpointRecord:
        """Parse the content of the file.

        Raises:
            ValueError: the content is not what was written, or another version wrote it.
        """
        seal = _SEAL.fullmatch(content, max(0, len(content) - _SEAL_BYTES))
        if seal is None:
            raise ValueError(_why_not_sealed(content))
        if hashlib.sha256(content[: seal.start()]).hexdigest().encode() != seal[1]:
            raise ValueError("its checksum differs from its content")
        fields = JsonObject(parse_strictly(content))
        if fields.value("format") != FORMAT:
            raise ValueError(_of_another_format(fields))
        record = cls(
            Position(fields.whole("epoch"), fields.whole("step")), fields.whole("steps"), fields.whole("world_size"),
            fields.whole("zero_stage"), fields.nested("data").unchecked(), fields.nested("engine").unchecked(),
            fields.nested("state").unchecked(), fields.nested("versions").unchecked(), _files(fields.nested("files")),
        )  # fmt: skip
        num_expected = 2 * record.world_size + 1
        is_complete = len(record.files) == num_expected and "recipe.yaml" in record.files
        if not is_complete or any(name not in record.files for r in range(record.world_size) for name in rank_files(r)):
            raise ValueError(f"files are {shown(sorted(record.files))}, not recipe.yaml and two of each rank")
        return record


def read_record(folder: Path) -> CheckpointRecord:
    """Read the record of a checkpoint.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, another version wrote it, or the folder bears the name of another step.
    """
    record = CheckpointRecord.parse(read_file(folder / POSITION, MOST_BYTES))
    if _FOLDER_NAME.fullmatch(folder.name) and folder.name != record.folder_name:
        raise ValueError(f"is of {record.folder_name}, not of {folder.name}")
    return record


def step_folder(steps: int) -> str:
    """Return the name of the checkpoint after `steps` optimizer steps."""
    return f"step-{steps:08d}"


def rank_files(rank: int) -> tuple[str, str]:
    """Return the names of a rank's two files: its part of the state, and the note about it."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def _files(fields: JsonObject) -> dict[str, FileSum]:
    files = {}
    for name in fields:
        if len(name) > _LENGTH_OF_NAME or not _FILE_NAME.fullmatch(name):
            raise ValueError(f"files names {shown(name)}, which is not in the folder")
        entry = fields.nested(name)
        files[name] = FileSum(entry.whole("bytes"), entry.whole("crc32"))
    return files


def _why_not_sealed(content: bytes) -> str:
    try:
        return _of_another_format(JsonObject(parse_strictly(content)))
    except ValueError:
        return f"does not end with its checksum ({len(content)} bytes)"


def _of_another_format(fields: JsonObject) -> str:
    values = fields.unchecked()
    versions = values.get("versions")
    wrote = versions.get("karmma_dist") if isinstance(versions, dict) else None
    if values.get("format") == FORMAT:
        return "does not end with its checksum"
    by = f" and was written by karmma-dist {shown(wrote)}" if wrote is not None else ""
    return f"is of format {shown(values.get('format'))}{by}; this version reads format {FORMAT}"
