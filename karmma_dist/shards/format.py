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

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from karmma_dist.errors import UserError
from karmma_dist.io.json_fields import JsonObject, shown
from karmma_dist.modalities import MODALITIES, Description, Pictures

SCHEMA = 1
"""Version of the layout; readers refuse any other."""

MANIFEST = "manifest.json"

TAR_NAME = re.compile(r"([A-Za-z0-9_-]+)-\d{6}\.tar")
"""File name of a shard; its group is the split."""

_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_NO_SPLIT = re.compile(r"manifest|failures|.*-\d{6}", re.IGNORECASE)
"""Names of other files of a folder, and names that already look numbered."""

CLIP_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""Names that a clip can have in a tar: a dot would split them."""


class DamageError(Exception):
    """A member that the index declares cannot be read as declared: cut, overwritten or undecodable."""

    def __init__(self, shard: str, key: str, member: str, what: str) -> None:
        super().__init__(f"{shard}: clip {key}: {member}: {what}")
        self.shard, self.key, self.member, self.what = shard, key, member, what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shard, self.key, self.member, self.what)


class Member(NamedTuple):
    """The place of one file of a clip in its tar. A tuple, since a folder has hundreds of thousands of them."""

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
    """Member per modality of the dataset, and the metadata under "json"; None: the dataset has none for this clip."""
    row: int
    """0-based place of the clip in its tar."""

    def has(self, modality: str) -> bool:
        """Return True if the dataset has this modality for this clip."""
        return self.members.get(modality) is not None


@dataclass(frozen=True, slots=True)
class StoredMember:
    """A member as KEY.json declares it."""

    size: int
    """Bytes."""
    crc32: int
    """zlib.crc32 of its bytes."""
    description: Description
    """The other fields of the entry."""


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
    """Seconds from the start of the recording; None if the length of the clip is unknown."""
    narration: str
    labels: dict[str, int | None]
    """Class per head; None where the split is unlabelled."""
    members: dict[str, StoredMember | None]
    """Member per modality of the dataset; None: the dataset has none for this clip."""

    def description(self, modality: str) -> Description:
        """Return the description of a modality that the clip has.

        Raises:
            KeyError: the clip does not have the modality.
        """
        member = self.members[modality]
        if member is None:
            raise KeyError(f"clip {self.key} has no {modality}")
        return member.description

    @property
    def pictures(self) -> Pictures | None:
        """Pictures by which the clip's frames are counted, those of its first visual modality; None without any."""
        shown = (self.description(name).pictures for name in MODALITIES if self.members.get(name) is not None)
        return next((pictures for pictures in shown if pictures is not None), None)

    @property
    def length_s(self) -> float:
        """Length of the clip, in seconds: that of the first modality with a known length, else 0.

        The times of a view are fractions of it. All modalities share one length: they may be stored at different rates,
        and one may end before another.
        """
        lengths = (self.description(name).length_s for name in MODALITIES if self.members.get(name) is not None)
        return next((length_s for length_s in lengths if length_s is not None), 0.0)


def parse_metadata(content: bytes) -> ClipMetadata:
    """Parse a clip's KEY.json.

    Raises:
        ValueError: the content is not a clip's metadata; the message names the field.
    """
    fields = JsonObject.parse(content)
    labels, declared = parse_declarations(fields)
    entries = fields.nested("modalities")
    members = {
        name: None if size_and_crc32 is None else StoredMember(*size_and_crc32, _description(name, entries))
        for name, size_and_crc32 in declared.items()
    }
    stop_s = None if fields.is_null("stop_s") else fields.number("stop_s")
    return ClipMetadata(
        fields.text("key"), fields.text("split"), fields.text("recording"), fields.text("participant"),
        fields.number("start_s"), stop_s, fields.text("narration"), labels, members,
    )  # fmt: skip


Declared = dict[str, tuple[int, int] | None]
"""Size and crc32 per modality; None: the dataset has none for this clip."""


def parse_declarations(fields: JsonObject) -> tuple[dict[str, int | None], Declared]:
    """Read from a clip's KEY.json what an index repeats: the labels, and size and crc32 of every member.

    Raises:
        ValueError: a field is missing, of another type, or an unknown modality.
    """
    labels, entries = fields.nested("labels"), fields.nested("modalities")
    declared: Declared = {}
    for name in entries:
        if name not in MODALITIES:
            raise ValueError(f"{entries.path_of(name)} is not a known modality")
        entry = None if entries.is_null(name) else entries.nested(name)
        declared[name] = None if entry is None else (entry.whole("bytes"), entry.whole("crc32"))
    return {head: labels.whole_or_null(head) for head in labels}, declared


def _description(name: str, entries: JsonObject) -> Description:
    try:
        return MODALITIES[name].description.parse(entries.nested(name).unchecked())
    except ValueError as error:
        raise ValueError(f"{entries.path_of(name)}.{error}") from None


def metadata_problems(metadata: ClipMetadata, clip: Clip) -> Iterator[str]:
    """Yield every difference between a clip's KEY.json and its entry in the index."""
    if metadata.key != clip.key:
        yield f"key is {metadata.key!r}, in the index {clip.key!r}"
    if metadata.labels != clip.labels:
        yield f"labels are {metadata.labels!r}, in the index {clip.labels!r}"
    for name in sorted({*metadata.members, *clip.members} - {"json"}):
        declared, member = metadata.members.get(name), clip.members.get(name)
        in_metadata = "absent" if declared is None else f"with {declared.size} bytes and crc32 {declared.crc32}"
        in_index = "absent" if member is None else f"with {member.size} bytes and crc32 {member.crc32}"
        if in_metadata != in_index:
            yield f"{name} is declared {in_metadata}, in the index {in_index}"


def check_key(key: str) -> str:
    """Return `key` if it can name a clip in a tar: letters, digits, `_` and `-` only (a dot would split it).

    Raises:
        UserError: the key has another character.
    """
    if not CLIP_KEY.fullmatch(key):
        raise UserError(f"clip key '{key}': only letters, digits, '_' and '-' are allowed")
    return key


def split_problem(splits: Iterable[str]) -> str:
    """Return the problem with names of splits, which begin the names of files, or an empty string."""
    folded: dict[str, str] = {}
    for split in splits:
        if not _SPLIT.fullmatch(split):
            return (
                f"{shown(split)} is no name of a split: take at most 100 letters, digits, '_' and '-', not '-' first"
            )
        if _NO_SPLIT.fullmatch(split):
            return f"{shown(split)} is no name of a split: other files are called so"
        former = folded.setdefault(split.casefold(), split)
        if former != split:
            return f"the splits {shown(former)} and {shown(split)} differ only in case: their files could be the same"
    return ""


def member_name(key: str, modality: str) -> str:
    """Return the file name of a clip's member inside the tar: the key, a dot, and the modality's suffix or `json`."""
    return f"{key}.json" if modality == "json" else f"{key}.{MODALITIES[modality].member}"


def shard_name(split: str, number: int) -> str:
    """Return the file name of a tar: `shard_name("train", 3) == "train-000003.tar"`."""
    return f"{split}-{number:06d}.tar"


def index_path(tar: Path) -> Path:
    """Return the path of the index of a tar."""
    return tar.with_suffix(".index.json")


def count_labels(classes: dict[str, list[str]], labels: Iterable[dict[str, int | None]]) -> dict[str, list[int]]:
    """Count the clips per class of every head, from each clip's labels."""
    counts = {head: [0] * len(names) for head, names in classes.items()}
    for clip_labels in labels:
        for head, label in clip_labels.items():
            if label is not None:
                counts[head][label] += 1
    return counts


def label_problem(classes: dict[str, list[str]], labels: dict[str, int | None]) -> str:
    """Return the problem with a clip's labels, or an empty string."""
    if set(labels) != set(classes):
        heads, expected = (", ".join(sorted(names)) or "none" for names in (labels, classes))
        return f"the labels are of the heads {heads}, expected are {expected}"
    for head, label in labels.items():
        if label is not None and not 0 <= label < len(classes[head]):
            return f"{head} is {label}, outside its {len(classes[head])} classes"
    return ""
