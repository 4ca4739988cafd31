"""The on-disk contract between packing and streaming: manifest, per-shard index, clip metadata.

    FOLDER/
      manifest.json              schema, modalities, class names, splits, shards with sizes and sha256, settings
      train-000000.tar           per clip: KEY.json plus any of KEY.video.mp4, KEY.flow.mp4, KEY.audio.flac, ...
      train-000000.index.json    key, labels, and offset, size, crc32 of every member

`KEY.json` and the index declare every modality of the dataset for every clip: a description, or null where the
dataset has none. **Declared but not readable is damage; null is absence.** The tars are plain POSIX tars that any
WebDataset reader takes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES, Description, Pictures

SCHEMA = 1
"""Version of the layout; readers refuse any other."""

MANIFEST = "manifest.json"

TAR_NAME = re.compile(r"([A-Za-z0-9_-]+)-\d{6}\.tar")
"""Of a shard; its group is the split."""

_KEY = re.compile(r"[A-Za-z0-9_-]+")

_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamageError(Exception):
    """A member that the index declares cannot be read as declared: cut, overwritten or undecodable."""

    def __init__(self, shard: str, key: str, member: str, what: str) -> None:
        super().__init__(f"{shard}: clip {key}: {member}: {what}")
        self.shard, self.key, self.member, self.what = shard, key, member, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.key, self.member, self.what)


@dataclass(frozen=True, slots=True)
class Member:
    """Where one file of a clip lies in its tar."""

    offset: int
    """First byte of the payload."""
    size: int
    """Bytes."""
    crc32: int
    """zlib.crc32 of the payload."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip as the index declares it."""

    key: str
    shard: str
    """File name of its tar."""
    labels: dict[str, int | None]
    """Class per head; None where the split is unlabelled."""
    members: dict[str, Member | None]
    """Per modality of the dataset, and under "json" for the metadata; None: the dataset has none for this clip."""

    def has(self, modality: str) -> bool:
        """Whether the dataset has this modality for this clip."""
        return self.members.get(modality) is not None


@dataclass(frozen=True, slots=True)
class StoredMember:
    """A member as KEY.json declares it."""

    size: int
    """Bytes."""
    crc32: int
    """zlib.crc32 of its bytes."""
    description: Description
    """The rest of its entry."""


@dataclass(frozen=True, slots=True)
class ClipMetadata:
    """A clip's KEY.json."""

    key: str
    split: str
    recording: str
    participant: str
    start_s: float
    """Seconds from the start of the recording."""
    stop_s: float | None
    """None: nothing in the clip tells where it ends."""
    narration: str
    labels: dict[str, int | None]
    """Class per head; None where the split is unlabelled."""
    members: dict[str, StoredMember | None]
    """Per modality of the dataset; None: the dataset has none for this clip."""

    def description(self, modality: str) -> Description:
        """Return the description of a modality that the clip has.

        Raises:
            KeyError: it has none.
        """
        member = self.members[modality]
        if member is None:
            raise KeyError(f"clip {self.key} has no {modality}")
        return member.description

    @property
    def pictures(self) -> Pictures | None:
        """The pictures that the clip's frames are counted by: those of the first modality that is seen."""
        shown = (self.description(name).pictures for name in MODALITIES if self.members.get(name) is not None)
        return next((pictures for pictures in shown if pictures is not None), None)

    @property
    def length_s(self) -> float:
        """Seconds that a view's moments are fractions of: the first modality's that tells, else 0.

        One length for all modalities: they may be stored at different rates, and one may end before another.
        """
        lengths = (self.description(name).length_s for name in MODALITIES if self.members.get(name) is not None)
        return next((length_s for length_s in lengths if length_s is not None), 0.0)


def parse_metadata(text: bytes) -> ClipMetadata:
    """Read a clip's KEY.json.

    Raises:
        ValueError: it is none, or a field is missing or of another type.
    """
    fields = _object(json.loads(text), "not an object")
    for name in ("start_s", "stop_s"):
        time_s = fields.get(name)
        is_missing = time_s is None and name == "start_s"
        if is_missing or isinstance(time_s, bool) or not isinstance(time_s, int | float | None):
            raise ValueError(f"{name} is {time_s!r}")
    for name in ("key", "split", "recording", "participant", "narration"):
        if not isinstance(fields.get(name), str):
            raise ValueError(f"{name} is {fields.get(name)!r}")
    members = {
        name: None if entry is None else _stored_member(name, _object(entry, f"modalities.{name}: not an object"))
        for name, entry in _object(fields.get("modalities"), "modalities: not an object").items()
    }
    labels = _object(fields.get("labels"), "labels: not an object")
    return ClipMetadata(
        fields["key"], fields["split"], fields["recording"], fields["participant"], fields["start_s"], fields["stop_s"],
        fields["narration"],
        {head: optional_int(label, f"labels.{head}") for head, label in labels.items()}, members,
    )  # fmt: skip


def _stored_member(name: str, entry: dict[str, Any]) -> StoredMember:
    if name not in MODALITIES:
        raise ValueError(f"modality {name!r}")
    for field in ("bytes", "crc32"):
        if type(entry.get(field)) is not int:
            raise ValueError(f"modalities.{name}.{field} is {entry.get(field)!r}")
    try:
        description = MODALITIES[name].description.parse(entry)
    except ValueError as error:
        raise ValueError(f"modalities.{name}.{error}") from None
    return StoredMember(entry["bytes"], entry["crc32"], description)


def metadata_problems(metadata: ClipMetadata, clip: Clip) -> Iterator[str]:
    """Yield where a clip's KEY.json and its entry in the index do not agree."""
    if metadata.key != clip.key:
        yield f"key is {metadata.key!r}, elsewhere {clip.key!r}"
    if metadata.labels != clip.labels:
        yield f"labels is {metadata.labels!r}, elsewhere {clip.labels!r}"
    for name in sorted({*metadata.members, *clip.members} - {"json"}):
        declared, member = metadata.members.get(name), clip.members.get(name)
        here = "absent" if declared is None else f"with {declared.size} bytes and crc32 {declared.crc32}"
        there = "absent" if member is None else f"with {member.size} bytes and crc32 {member.crc32}"
        if here != there:
            yield f"{name} is declared {here}, in the index {there}"


def optional_int(value: Any, name: str) -> int | None:
    """Return a value that is an int or None.

    Raises:
        ValueError: it is neither.
    """
    if value is not None and type(value) is not int:
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


def _object(value: Any, message: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(message)
    return value


def check_key(key: str) -> str:
    """Return `key` if it can name a clip in a tar: letters, digits, `_` and `-` only (a dot would split it).

    Raises:
        UserError: any other character.
    """
    if not _KEY.fullmatch(key):
        raise UserError(f"clip key '{key}': only letters, digits, '_' and '-' are allowed")
    return key


def member_name(key: str, modality: str) -> str:
    """File name inside the tar: `member_name("P01_01_0", "video") == "P01_01_0.video.mp4"`."""
    return f"{key}.json" if modality == "json" else f"{key}.{MODALITIES[modality].member}"


def shard_name(split: str, number: int) -> str:
    """`shard_name("train", 3) == "train-000003.tar"`."""
    return f"{split}-{number:06d}.tar"


def index_path(tar: Path) -> Path:
    """The index beside a tar."""
    return tar.with_suffix(".index.json")


def parse_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Read the text of a manifest; `where` is what messages call it.

    Raises:
        UserError: it is no manifest, or of another schema.
    """
    try:
        return check_manifest(text, where)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{where}: not a manifest of packed shards: {error}: write it again with karmma-dist verify --repair"
        ) from None


def check_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Read the text of a manifest and check its shape, so that what follows can rely on it.

    Names and hashes of shards become paths, so nothing but the expected form passes.

    Raises:
        ValueError: it is no manifest.
        UserError: it is of a newer schema.
    """
    try:
        manifest = json.loads(text)
        schema = manifest["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise UserError(f"{where}: of schema {schema}, newer than {SCHEMA}: update karmma-dist")
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}")
        _check_shape(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from None
    return dict(manifest)


def _check_shape(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, AttributeError or ValueError where a part is missing or of another kind."""
    for modality in manifest["modalities"]:
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r}")
    for head, names in manifest["heads"].items():
        if not isinstance(names, list):
            raise ValueError(f"classes of {head!r}")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if not TAR_NAME.fullmatch(shard["name"]):
                raise ValueError(f"shard {shard['name']!r}: not the name of a shard")
            for name in ("sha256", "index_sha256"):
                if not _SHA256.fullmatch(shard[name]):
                    raise ValueError(f"shard {shard['name']!r}: {name} {shard[name]!r}")
            for name in ("clips", "bytes"):
                if type(shard[name]) is not int:
                    raise ValueError(f"shard {shard['name']!r}: {name} {shard[name]!r}")


FACTS = ("dataset", "modalities", "heads", "settings", "plan", "made_with")


def facts_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the tars cannot tell: dataset, modalities, class names, settings, plan, versions.

    Raises:
        KeyError: it is no manifest of this format.
    """
    return {name: manifest[name] for name in FACTS}


def whole_manifest(facts: dict[str, Any], splits: dict[str, Any], label_counts: dict[str, Any]) -> dict[str, Any]:
    """The manifest: facts, the shards of each split, and clips per class."""
    first = {name: facts[name] for name in ("dataset", "modalities", "heads")}
    identity = {name: facts[name] for name in ("settings", "plan")}
    return {
        "schema": SCHEMA, **first, "splits": splits, **identity, "label_counts": label_counts,
        "made_with": facts["made_with"],
    }  # fmt: skip


def count_labels(classes: dict[str, list[str]], labels: Iterable[dict[str, int | None]]) -> dict[str, list[int]]:
    """Clips per class of every head, from each clip's labels."""
    counts = {head: [0] * len(names) for head, names in classes.items()}
    for clip_labels in labels:
        for head, label in clip_labels.items():
            if label is not None:
                counts[head][label] += 1
    return counts


def label_problem(classes: dict[str, list[str]], labels: dict[str, int | None]) -> str:
    """What is wrong with a clip's labels, or an empty string."""
    if set(labels) != set(classes):
        return f"heads are {', '.join(sorted(labels)) or 'none'}, the manifest's {', '.join(sorted(classes)) or 'none'}"
    for head, label in labels.items():
        if label is not None and not 0 <= label < len(classes[head]):
            return f"{head} {label} is none of its {len(classes[head])} classes"
    return ""


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a folder's manifest and check its shape, so that what follows can rely on it.

    Raises:
        UserError: it is of a newer schema.
        OSError: it cannot be read.
        ValueError: it is no manifest.
    """
    path = root / MANIFEST
    manifest = check_manifest(path.read_bytes(), str(path))
    try:
        _check_facts(facts_of(manifest))
        for split, entry in manifest["splits"].items():
            expect(entry["clips"], int)
            expect(manifest["label_counts"][split], dict)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a manifest of packed shards: {error!r}") from None
    return manifest


def _check_facts(facts: dict[str, Any]) -> None:
    for modality in facts["modalities"]:
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r}")
    for names in facts["heads"].values():
        for name in names:
            expect(name, str)
    for split, planned in facts["plan"]["clips"].items():
        expect(split, str)
        expect(planned, int)
    expect(facts["settings"], dict)


def expect(value: Any, kind: type) -> None:
    """Raise ValueError where a value is of another type; a bool is no int."""
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not of type {kind.__name__}")
