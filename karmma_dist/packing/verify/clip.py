"""Checks one clip to its last byte: checksums, metadata against index, and media against their descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from karmma_dist.errors import one_line
from karmma_dist.modalities import MODALITIES, DecodeError, StoredError
from karmma_dist.packing.verify.problems import Finding
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError, metadata_problems, parse_metadata

TOLERANCE_S = 0.05
"""Seconds, beyond one frame, by which the lengths of a clip's members may differ."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The end of a clip's stored frames, on the clock of its recording."""

    shard: str
    key: str
    modality: str
    recording: str
    end_s: float
    stop_s: float
    """End of the clip."""
    frame_s: float
    """Length of a stored frame."""


def check_clip(folder: ShardFolder, clip: Clip, split: str) -> Iterator[Finding | Shown]:
    """Yield the problems of a clip, and the ends of its stored frames."""
    contents: dict[str, bytes] = {}
    for name, member in clip.members.items():
        if member is None:
            continue
        try:
            contents[name] = folder.read(clip, name)
        except DamageError as error:
            kind = "crc32" if error.what.startswith("crc32") else "unreadable"
            yield Finding(clip.shard, clip.key, name, kind, error.what)
    if "json" not in contents:
        return
    try:
        metadata = parse_metadata(contents.pop("json"))
    except ValueError as error:
        yield Finding(clip.shard, clip.key, "json", "metadata", f"not a clip's metadata: {error}")
        return
    if metadata.split != split:
        problem = f"split is {metadata.split!r}, in the manifest {split!r}"
        yield Finding(clip.shard, clip.key, "json", "metadata", problem)
    for problem in metadata_problems(metadata, clip):
        yield Finding(clip.shard, clip.key, "json", "metadata", problem)
    for name, data in contents.items():
        if metadata.members.get(name) is None:
            continue
        try:
            MODALITIES[name].decoder.check(data, metadata.description(name))
            yield from _length(clip, name, metadata)
        except StoredError as error:
            yield Finding(clip.shard, clip.key, name, error.kind, str(error))
        except DecodeError as error:
            yield Finding(clip.shard, clip.key, name, "decode", one_line(f"does not decode: {error}"))


def _length(clip: Clip, name: str, metadata: ClipMetadata) -> Iterator[Finding | Shown]:
    """Compare a member's length with the clip's: some modalities fill the clip, frames may end with the recording."""
    modality, description = MODALITIES[name], metadata.description(name)
    length_s, pictures = description.length_s, description.pictures
    if metadata.stop_s is None or length_s is None:
        return
    span_s = metadata.stop_s - metadata.start_s
    frame_s = 0.0 if pictures is None else 1 / pictures.fps
    is_long, is_short = length_s > span_s + frame_s + TOLERANCE_S, length_s < span_s - frame_s - TOLERANCE_S
    if is_long or (is_short and modality.fills_clip):
        yield Finding(clip.shard, clip.key, name, "length", f"lasts {length_s:.3f} s, the clip {span_s:.3f} s")
    others = {other: metadata.description(other) for other, member in metadata.members.items() if member is not None}
    problem = description.problem_beside(others)
    if problem:
        yield Finding(clip.shard, clip.key, name, "length", problem)
    if pictures is not None:
        end_s = metadata.start_s + length_s
        yield Shown(clip.shard, clip.key, name, metadata.recording, end_s, metadata.stop_s, frame_s)


def early_ends(shown: list[Shown]) -> Iterator[Finding]:
    """Yield clips whose frames end before the clip although another clip shows that their recording continues."""
    reach: dict[tuple[str, str], float] = {}
    for each in shown:
        stream = (each.recording, each.modality)
        reach[stream] = max(reach.get(stream, 0.0), each.end_s)
    for each in shown:
        slack = each.frame_s + TOLERANCE_S
        if each.end_s < each.stop_s - slack and each.end_s < reach[each.recording, each.modality] - slack:
            problem = f"ends {each.stop_s - each.end_s:.3f} s before the clip, but its recording continues"
            yield Finding(each.shard, each.key, each.modality, "length", problem)
