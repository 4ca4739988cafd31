"""What every arm does with the same clips: the same bytes, views, decoding and collating. Only the loader differs."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, ClipMetadata, Member, parse_metadata
from karmma_dist.streaming.batch import Batch, Sample, collate
from karmma_dist.streaming.loader import num_stored_frames
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import View, training_view

DROP_PROB = 0.5
"""Of the arms with modality dropout, per modality; one is always kept."""

Dropout = Literal["none", "after", "before"]
"""Modalities are dropped never, after decoding (all that a recipe that decodes in its own step can do), or before."""


@dataclass(frozen=True)
class Work:
    """One arm's task, beside its data."""

    inputs: InputRecipe
    modalities: tuple[str, ...]
    heads: tuple[str, ...]
    num_clips: int
    batch_size: int
    epochs: int = 1
    num_workers: int = 0
    dropout: Dropout = "none"
    seed: int = 0


@dataclass(frozen=True)
class StoredClip:
    """One clip as it lies in the shards, in memory."""

    key: str
    metadata: bytes
    """Its KEY.json."""
    members: dict[str, bytes]
    """Encoded bytes of the modalities it has."""


class _Payloads:
    """Stands in for a `ShardFolder` whose bytes are in memory, so that every arm runs the very same decoding."""

    def __init__(self, members: Mapping[str, bytes]) -> None:
        self.members = members

    def read(self, clip: Clip, modality: str) -> bytes:  # noqa: ARG002 - the signature of ShardFolder.read
        return self.members[modality]


def stored_clips(folder: ShardFolder, split: str, modalities: Sequence[str]) -> list[StoredClip]:
    """All clips of a split, read into memory."""
    return [
        StoredClip(clip.key, folder.read(clip, "json"), {m: folder.read(clip, m) for m in modalities if clip.has(m)})
        for clip in folder.clips(split)
    ]


def decode_clip(work: Work, key: str, metadata: bytes, members: Mapping[str, bytes]) -> Sample:
    """What a peer's map step does to one clip: view, decoding, dropout. Empty bytes are a modality it does not have."""
    present = [m for m in work.modalities if members.get(m)]
    kept = present if work.dropout == "none" else _kept(present, key)
    wanted = kept if work.dropout == "before" else present
    sample = decode_alone(work, look_at(work, key, metadata, members, wanted))
    if work.dropout == "after":
        sample.arrays = {m: sample.arrays[m] for m in kept}
    return sample


@dataclass(frozen=True)
class LookedAt:
    """A clip of which all is known but its pixels and samples."""

    stored: Clip
    described: ClipMetadata
    """Its KEY.json, parsed."""
    view: View
    wanted: list[str]
    members: Mapping[str, bytes]


def look_at(
    work: Work, key: str, metadata: bytes, members: Mapping[str, bytes], wanted: list[str] | None = None
) -> LookedAt:
    """All that comes before decoding; `wanted` is everything the clip has unless it is given."""
    described = parse_metadata(metadata)
    view = training_view(work.inputs.video, num_stored_frames(described), work.seed, 0, key)
    entries: dict[str, Member | None] = {modality: Member(0, len(data), 0) for modality, data in members.items()}
    stored = Clip(key, "", described.labels, entries, 0)
    return LookedAt(stored, described, view, list(members) if wanted is None else wanted, members)


def decode_alone(work: Work, clip: LookedAt) -> Sample:
    """Decoding, by the function our own loader calls."""
    folder = cast(ShardFolder, _Payloads(clip.members))
    return read_sample(folder, clip.stored, clip.described, clip.wanted, work.inputs, clip.view)


def decode_webdataset(work: Work, sample: Mapping[str, Any]) -> Sample:
    """`decode_clip` of a sample as WebDataset readers hand it over: one entry per member of the tar."""
    members = {m: sample[MODALITIES[m].member] for m in work.modalities if MODALITIES[m].member in sample}
    return decode_clip(work, sample["__key__"], sample["json"], members)


def collate_clips(work: Work, samples: Sequence[Sample]) -> Batch:
    """The project's own collation."""
    return collate(samples, work.modalities, work.heads)


def fingerprints(work: Work, batch: Batch) -> dict[str, int]:
    """Per clip a checksum of everything it brought, to see that all arms delivered the same."""
    taken = dict.fromkeys(work.modalities, 0)
    found = {}
    for row, key in enumerate(batch.keys):
        checksum = 0
        for column, modality in enumerate(work.modalities):
            if batch.present_BM[row, column]:
                array = batch.inputs[modality][taken[modality]].numpy()
                checksum = zlib.crc32(array.tobytes(), zlib.crc32(modality.encode(), checksum))
                taken[modality] += 1
        found[key] = checksum
    return found


def _kept(present: list[str], key: str) -> list[str]:
    """Independent drops, a function of the key; a clip that would lose everything keeps one modality."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest, "little"))
    kept = [m for m in present if random.random() >= DROP_PROB]
    return kept or [present[int(random.integers(len(present)))]]
