"""The manifest of a shards folder: the dataset's header, and name, sizes and hashes of every shard.

    manifest = Manifest.parse(content)
    manifest.splits["train"].shards[0].sha256
    manifest.to_bytes()  # byte for byte what was parsed

Reading, verifying, repairing and packing all use this parser. Fields that it does not know, of a later minor version,
are kept in `extra` and written again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import json_bytes, read_file
from karmma_dist.io.json_fields import JsonObject, shown
from karmma_dist.modalities import MODALITIES
from karmma_dist.shards.format import MANIFEST, SCHEMA, TAR_NAME, split_problem

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RecordedPlan:
    """The plan by which the dataset was packed."""

    limit: int | None
    """Maximum number of clips per split; None: all."""
    clips: dict[str, int]
    """Planned clips per split."""
    sha256: str
    """Digest of all annotations."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a later version."""

    @classmethod
    def from_fields(cls, plan: JsonObject) -> RecordedPlan:
        """Read the plan of a manifest or of its copy in an index.

        Raises:
            ValueError: a field is missing or of another type.
        """
        clips = plan.nested("clips")
        _check_splits(clips, plan.path_of("clips"))
        return cls(
            plan.whole_or_null("limit"), {split: clips.whole(split) for split in clips}, plan.text("sha256", _SHA256),
            plan.others("limit", "clips", "sha256"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {"limit": self.limit, "clips": self.clips, "sha256": self.sha256, **self.extra}


@dataclass(frozen=True, slots=True)
class DatasetHeader:
    """The part of a manifest that the tars do not hold. Every index carries a copy of it."""

    dataset: str
    """Name of the dataset."""
    modalities: tuple[str, ...]
    """Modalities that every clip declares, present or null."""
    heads: dict[str, list[str]]
    """Class names per head, by id."""
    settings: dict[str, Any]
    """Packing specification, as `PackingSpec.recorded` gives it and `PackingSpec.differences` compares it."""
    plan: RecordedPlan
    made_with: dict[str, str]
    """Versions of the libraries that the bytes depend on."""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    """Fields of a later version, in the copy of an index; those of a manifest are in `Manifest.extra`."""

    @classmethod
    def from_fields(cls, values: JsonObject, *, with_extra: bool) -> DatasetHeader:
        """Read the header from a manifest or from the copy in an index.

        Args:
            values: The manifest, or the copy.
            with_extra: Keep unknown fields in `extra`.

        Raises:
            ValueError: a field is missing, of another type, or an unknown modality.
        """
        modalities, heads = values.texts("modalities"), values.nested("heads")
        for place, modality in enumerate(modalities):
            if modality not in MODALITIES:
                raise ValueError(
                    f"modalities[{place}] is {shown(modality)}, not a known modality ({', '.join(MODALITIES)}): is the "
                    "package installed here that adds it?"
                )
        made_with = values.nested("made_with")
        return cls(
            values.text("dataset"), tuple(modalities), {head: heads.texts(head) for head in heads},
            values.nested("settings").unchecked(), RecordedPlan.from_fields(values.nested("plan")),
            {name: made_with.text(name) for name in made_with},
            values.others(*HEADER_FIELDS) if with_extra else {},
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the copy that an index carries, as JSON values."""
        return {
            "dataset": self.dataset, "modalities": list(self.modalities), "heads": self.heads,
            "settings": self.settings, "plan": self.plan.to_dict(), "made_with": self.made_with, **self.extra,
        }  # fmt: skip

    def first_difference(self, other: DatasetHeader) -> str:
        """Return the name of the first field that differs from another header's, or an empty string."""
        return next((name for name in HEADER_FIELDS if getattr(self, name) != getattr(other, name)), "")


HEADER_FIELDS = tuple(each.name for each in fields(DatasetHeader) if each.name != "extra")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A manifest's entry of one shard."""

    name: str
    """File name of the tar."""
    num_clips: int
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """Hash of the tar."""
    index_sha256: str
    """Hash of the index."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a later version."""

    @classmethod
    def from_fields(cls, entry: JsonObject) -> ShardEntry:
        """Read an entry. Name and hashes become paths, so only the expected form passes.

        Raises:
            ValueError: a field is missing or of another form.
        """
        return cls(
            entry.text("name", TAR_NAME), entry.whole("clips"), entry.whole("bytes"), entry.text("sha256", _SHA256),
            entry.text("index_sha256", _SHA256), entry.others("name", "clips", "bytes", "sha256", "index_sha256"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return {
            "name": self.name, "clips": self.num_clips, "bytes": self.num_bytes, "sha256": self.sha256,
            "index_sha256": self.index_sha256, **self.extra,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitEntry:
    """A manifest's entry of one split."""

    num_clips: int
    shards: tuple[ShardEntry, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a later version."""

    @classmethod
    def from_fields(cls, entry: JsonObject) -> SplitEntry:
        """Read an entry.

        Raises:
            ValueError: a field is missing or of another form.
        """
        shards = tuple(ShardEntry.from_fields(shard) for shard in entry.objects("shards"))
        return cls(entry.whole("clips"), shards, entry.others("clips", "shards"))

    @classmethod
    def of_shards(cls, shards: list[ShardEntry]) -> SplitEntry:
        """Return the entry of a split that has these shards."""
        return cls(sum(shard.num_clips for shard in shards), tuple(shards))

    @property
    def num_bytes(self) -> int:
        """Size of all tars together."""
        return sum(shard.num_bytes for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return {"clips": self.num_clips, "shards": [shard.to_dict() for shard in self.shards], **self.extra}


LabelCounts = dict[str, list[int]]
"""Clips per class of every head."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A folder's manifest.json."""

    header: DatasetHeader
    splits: dict[str, SplitEntry]
    label_counts: dict[str, LabelCounts]
    """Clips per class, per split and head."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of a later version."""

    @classmethod
    def parse(cls, content: bytes, path: str = MANIFEST) -> Manifest:
        """Parse the content of a manifest.

        Args:
            content: The file's bytes.
            path: Name of the file in messages.

        Raises:
            UserError: the manifest is of a newer schema.
            ValueError: the content is not a manifest; the message names the field.
        """
        values = JsonObject.parse(content)
        schema = values.value("schema")
        if type(schema) is int and schema > SCHEMA:
            raise UserError(f"{path}: of schema {schema}, newer than {SCHEMA}: update karmma-dist")
        if type(schema) is not int or schema != SCHEMA:
            raise values.problem("schema")
        header = DatasetHeader.from_fields(values, with_extra=False)
        splits = values.nested("splits")
        _check_splits(splits, "splits")
        counts = values.nested("label_counts")
        manifest = cls(
            header,
            {split: SplitEntry.from_fields(splits.nested(split)) for split in splits},
            {split: _label_counts(counts.nested(split), header) for split in counts},
            values.others("schema", *HEADER_FIELDS, "splits", "label_counts"),
        )
        for path_of_other, other in (("plan.clips", header.plan.clips), ("label_counts", manifest.label_counts)):
            if set(other) != set(manifest.splits):
                raise ValueError(f"{path_of_other} has the splits {_names(other)}, splits has {_names(splits)}")
        return manifest

    @property
    def shards(self) -> Iterator[ShardEntry]:
        """Shards of all splits, in order."""
        return (shard for split in self.splits.values() for shard in split.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values."""
        header = self.header
        return {
            "schema": SCHEMA, "dataset": header.dataset, "modalities": list(header.modalities), "heads": header.heads,
            "splits": {name: split.to_dict() for name, split in self.splits.items()},
            "settings": header.settings, "plan": header.plan.to_dict(), "label_counts": self.label_counts,
            "made_with": header.made_with, **self.extra,
        }  # fmt: skip

    def to_bytes(self) -> bytes:
        """Return the content of manifest.json."""
        return json_bytes(self.to_dict())


def read_manifest(root: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        UserError: the manifest is of a newer schema.
        OSError: the file cannot be read.
        ValueError: the file is not a manifest.
    """
    path = root / MANIFEST
    return Manifest.parse(read_file(path), str(path))


def usable_manifest(content: bytes, path: str) -> Manifest:
    """Parse the content of a manifest for a reader of the shards; `path` names the file in messages.

    Raises:
        UserError: the content is not a manifest, or of another schema.
    """
    try:
        return Manifest.parse(content, path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"{path}: not a manifest of packed shards: {error}: write it again with karmma-dist verify --repair"
        ) from None


def _label_counts(counts: JsonObject, header: DatasetHeader) -> LabelCounts:
    label_counts = {head: counts.wholes(head) for head in counts}
    for head, names in header.heads.items():
        num_counts = len(counts.wholes(head))
        if num_counts != len(names):
            raise ValueError(f"{counts.path_of(head)} has {num_counts} counts, heads.{head} {len(names)} classes")
    return label_counts


def _check_splits(splits: JsonObject, path: str) -> None:
    if problem := split_problem(splits):
        raise ValueError(f"{path}: {problem}")


def _names(splits: Any) -> str:
    return ", ".join(splits) or "none"
