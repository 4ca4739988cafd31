"""A folder of packed shards, opened for reading: its clips, and the checked bytes of their members."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from karmma_dist.errors import UserError
from karmma_dist.io.files import read_file
from karmma_dist.shards.format import (
    MANIFEST,
    Clip,
    ClipMetadata,
    DamageError,
    index_path,
    label_problem,
    member_name,
    metadata_problems,
    parse_metadata,
)
from karmma_dist.shards.index import ShardIndex
from karmma_dist.shards.manifest import Manifest, ShardEntry, usable_manifest

_OF_THIS_MACHINE = {
    errno.EMFILE: "raise the limit of open files (ulimit -n), or lower data.num_workers",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.ENOMEM: "this machine is out of memory: lower data.num_workers, or request more",
}
"""Errors of opening a shard that say nothing about the shard, with what to do."""


class Shards(Protocol):
    """Clips that can be read: a folder of packed shards, or several that are used together (`mixture.py`)."""

    @property
    def where(self) -> str:
        """Name of the clips' place in messages."""

    @property
    def folders(self) -> list[ShardFolder]:
        """Folders that hold the clips."""

    @property
    def modalities(self) -> list[str]:
        """Modalities that clips declare, present or null."""

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per head, in the order of their ids."""

    def clips(self, split: str) -> list[Clip]:
        """Return all clips of a split; see `ShardFolder.clips`."""

    def classes_of(self, clip: Clip) -> dict[str, list[str]]:
        """Return the class names per head of the dataset that a clip is of."""

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return one member's bytes; see `ShardFolder.read`."""

    def metadata(self, clip: Clip) -> ClipMetadata:
        """Return the clip's KEY.json; see `ShardFolder.metadata`."""


class ShardFolder:
    """A folder of packed shards, opened for reading. Cheap to pickle: it holds no open file.

    A subclass for shards that are stored elsewhere overrides `open_tar` and `read_index`.

    Attributes:
        root: The folder.
        where: Name of the folder in messages.
        manifest: The parsed manifest.

    Raises:
        UserError: the folder is missing, empty, half packed, or of another schema.
    """

    def __init__(self, root: str | Path) -> None:
        self.root, self.where = Path(root), str(root)
        path = self.root / MANIFEST
        if not self.root.is_dir():
            raise UserError(f"{self.root}: no such shards folder (pack one with: karmma-dist shard)")
        if not path.is_file():
            raise UserError(f"{self.root}: no {MANIFEST}, so no packed shards (pack some with: karmma-dist shard)")
        content = read_file(path)
        self.manifest: Manifest = usable_manifest(content, str(path))
        self.sha256 = hashlib.sha256(content).hexdigest()
        """Hash of the manifest, which names those of all shards: equal only for the same clips in the same order."""

    @property
    def folders(self) -> list[ShardFolder]:
        """This folder."""
        return [self]

    @property
    def modalities(self) -> list[str]:
        """Modalities that every clip declares, present or null."""
        return list(self.manifest.header.modalities)

    @property
    def classes(self) -> dict[str, list[str]]:
        """Class names per head, in the order of their ids."""
        return {head: list(names) for head, names in self.manifest.header.heads.items()}

    def classes_of(self, clip: Clip) -> dict[str, list[str]]:  # noqa: ARG002
        """Return the class names per head, which all clips share."""
        return self.classes

    def label_names(self, clip: Clip) -> dict[str, str | None]:
        """Return the class name of a clip per head; None in an unlabelled split."""
        classes = self.classes
        return {head: None if label is None else classes[head][label] for head, label in clip.labels.items()}

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest.splits)

    def clips(self, split: str) -> list[Clip]:
        """Return all clips of a split, in shard order.

        Raises:
            UserError: the split does not exist, the manifest contradicts itself, or an index is missing, damaged or of
                another tar.
        """
        entry = self.manifest.splits.get(split)
        if entry is None:
            raise UserError(f"{self.where}: no split '{split}'; there are {', '.join(self.splits) or 'none'}")
        num_clips = sum(shard.num_clips for shard in entry.shards)
        if num_clips != entry.num_clips:
            raise UserError(
                f"{self.where}/{MANIFEST}: splits.{split}.clips is {entry.num_clips}, its shards have {num_clips}: "
                f"write it again with karmma-dist verify --repair {self.where}"
            )
        return [clip for shard in entry.shards for clip in self._shard_clips(shard)]

    def _shard_clips(self, shard: ShardEntry) -> tuple[Clip, ...]:
        path = f"{self.where}/{index_path(Path(shard.name))}"
        advice = f"write it again with karmma-dist verify --repair {self.where}"
        self._check_tar(shard)
        try:
            content = self.read_index(shard)
        except OSError as error:
            raise UserError(f"{path}: index cannot be read ({error}): {advice}") from None
        if hashlib.sha256(content).hexdigest() != shard.index_sha256:
            raise UserError(
                f"{path}: not the index that the manifest names, but one of another packing, older or cut: {advice}"
            )
        try:
            index = ShardIndex.parse(content, shard.name)
        except ValueError as error:
            raise UserError(f"{path}: not an index: {error}: {advice}") from None
        if problem := self._index_problem(index, shard):
            raise UserError(f"{path}: {problem}: {advice}")
        return index.clips

    def _index_problem(self, index: ShardIndex, shard: ShardEntry) -> str:
        """Return how an index with the right hash contradicts the manifest, or an empty string."""
        if len(index.clips) != shard.num_clips:
            return f"holds {len(index.clips)} clips, the manifest says {shard.num_clips}"
        for name in ("modalities", "heads"):
            if index.header is not None and getattr(index.header, name) != getattr(self.manifest.header, name):
                return f"its copy of '{name}' is not what the manifest says"
        return ""

    def read_index(self, shard: ShardEntry) -> bytes:
        """Return the content of a shard's index.

        Args:
            shard: The shard's entry in the manifest.

        Raises:
            OSError: the index cannot be read.
        """
        return read_file(index_path(self.root / shard.name))

    def open_tar(self, name: str) -> int:
        """Return a descriptor of a shard, open for reading; the caller closes it.

        Raises:
            OSError: the shard cannot be opened.
        """
        return os.open(self.root / name, os.O_RDONLY)

    def _check_tar(self, shard: ShardEntry) -> None:
        """Refuse a tar that the manifest cannot mean. A tar that is too short is damage, found clip by clip."""
        tar = self.root / shard.name
        if not tar.is_file():
            raise UserError(f"{tar}: no such shard, but the manifest names it: copy it here or pack again")
        size = tar.stat().st_size
        if size > shard.num_bytes:
            raise UserError(
                f"{tar}: {size} bytes, {shard.num_bytes} by the manifest and the index, so these are of another tar: "
                "copy the folder again or pack again"
            )

    def read(self, clip: Clip, modality: str) -> bytes:
        """Return one member's bytes, checked against its crc32; `modality` may be "json".

        Raises:
            DamageError: the tar is missing or cut, or the bytes are not the ones that were written.
            UserError: this machine opens no more files, which is no damage.
            KeyError: the clip has no such member.
        """
        member = clip.members[modality]
        if member is None:
            raise KeyError(f"clip {clip.key} has no {modality}")
        name = member_name(clip.key, modality)
        try:
            descriptor = self.open_tar(clip.shard)
        except OSError as error:
            if error.errno in _OF_THIS_MACHINE:
                advice = _OF_THIS_MACHINE[error.errno]
                raise UserError(f"{self.where}/{clip.shard} cannot be opened: {error.strerror}: {advice}") from None
            raise DamageError(clip.shard, clip.key, name, f"shard cannot be opened: {error.strerror}") from None
        try:
            data = os.pread(descriptor, member.size, member.offset)
        except OSError as error:
            raise DamageError(clip.shard, clip.key, name, f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if len(data) != member.size:
            raise DamageError(clip.shard, clip.key, name, f"cut: {len(data)} of {member.size} bytes")
        if zlib.crc32(data) != member.crc32:
            raise DamageError(clip.shard, clip.key, name, "crc32 differs")
        return data

    def metadata(self, clip: Clip) -> ClipMetadata:
        """Return the clip's KEY.json, compared with the index and the manifest.

        Raises:
            DamageError: the metadata cannot be read as written, or the three contradict each other: a modality that
                only one of them lacks is damaged, not absent.
        """
        name = member_name(clip.key, "json")
        try:
            metadata = parse_metadata(self.read(clip, "json"))
        except ValueError as error:
            raise DamageError(clip.shard, clip.key, name, f"not a clip's metadata: {error}") from None
        problem = next(metadata_problems(metadata, clip), "")
        problem = problem or label_problem(self.manifest.header.heads, metadata.labels)
        if not problem and not set(self.manifest.header.modalities) <= set(metadata.members):
            problem = f"declares {', '.join(metadata.members) or 'nothing'}, the manifest {', '.join(self.modalities)}"
        if problem:
            raise DamageError(clip.shard, clip.key, name, problem)
        return metadata


class HasClasses(Protocol):
    """The description of a model: its card, or the header of an exported one."""

    @property
    def heads(self) -> Mapping[str, int]:
        """Number of classes by head."""

    @property
    def classes(self) -> Mapping[str, list[str]]:
        """Class names by head, in the order of their ids; may be empty."""


def check_classes(model: HasClasses, shards: Shards) -> None:
    """Check that every class number means the same class in the shards as in the model.

    Raises:
        UserError: a head is missing in the shards, or its classes differ.
    """
    for head, num in model.heads.items():
        stored, known = shards.classes.get(head), model.classes.get(head)
        if stored is None:
            problem = f"the shards have no head '{head}' as the model has (they have {', '.join(shards.classes)})"
        elif len(stored) != num:
            problem = f"the shards have {len(stored)} classes of '{head}', the model has {num}"
        elif known is not None and known != stored:
            number = next(number for number, (a, b) in enumerate(zip(known, stored, strict=True)) if a != b)
            problem = f"class {number} of '{head}' is '{stored[number]}' in the shards, '{known[number]}' in the model"
        else:
            continue
        raise UserError(f"{shards.where}: {problem}: name shards of the model's own dataset")
