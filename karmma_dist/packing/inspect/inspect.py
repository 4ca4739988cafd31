"""The content of a shards folder: its numbers, one clip, or a contact sheet.

print(describe(ShardFolder("shards/epic_kitchens")))
contact_sheet(ShardFolder("shards/epic_kitchens"), Path("sheet.png"))
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, nearest
from karmma_dist.io.files import read_file
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities import letters
from karmma_dist.packing.inspect.sheet import draw_sheet
from karmma_dist.packing.pack import FAILURES
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError, label_problem


def describe(folder: ShardFolder) -> dict[str, Any]:
    """Return dataset, modalities, classes and, per split, clips, seconds, bytes and clips per modality subset.

    Keys: `folder`, `dataset`, `modalities`, `classes` (names per head), `splits`, `failures` (clips that were left out
    because their media cannot be read), `settings`. A split has `clips`, `shards`, `bytes`, `seconds`, `subsets`
    ("V+F+A" -> clips), `modality_clips`, `modality_bytes` and `label_counts`.

    Raises:
        UserError: an index cannot be read.
        DamageError: a clip's metadata cannot be read.
    """
    header = folder.manifest.header
    failures = folder.root / FAILURES
    return {
        "folder": str(folder.root),
        "dataset": header.dataset,
        "modalities": folder.modalities,
        "classes": folder.classes,
        "splits": {split: _describe_split(folder, split) for split in folder.splits},
        "failures": len(read_file(failures).splitlines()) if failures.is_file() else 0,
        "settings": header.settings,
    }


def describe_clip(folder: ShardFolder, key: str) -> dict[str, Any]:
    """Return one clip's KEY.json, with its shard, the offset of each member, and the names of its classes.

    Raises:
        UserError: no clip has this key.
        DamageError: the clip's metadata cannot be read.
    """
    clip = find_clip(folder, key)
    folder.metadata(clip)
    described = JsonObject.parse(folder.read(clip, "json")).unchecked()
    described["shard"] = clip.shard
    described["offsets"] = {name: member.offset for name, member in clip.members.items() if member is not None}
    described["label_names"] = folder.label_names(clip)
    return described


def contact_sheet(folder: ShardFolder, out_png: Path, keys: list[str] | None = None, clips: int = 8) -> None:
    """Draw clips as rows: frames, flow as a colour wheel, waveform and spectrogram, boxes; absent cells are hatched.

    Args:
        folder: The shards.
        out_png: File to write.
        keys: Clips to draw; None: a choice that shows every set of present modalities.
        clips: Number of clips to choose.

    Raises:
        UserError: no clip has such a key, or the file cannot be written.
    """
    if clips < 1:
        raise UserError(f"{clips} clips: a contact sheet shows at least 1")
    chosen = [find_clip(folder, key) for key in keys] if keys else _choose(folder, clips)
    if not chosen:
        raise UserError(f"{folder.root}: no clip to draw")
    rows = []
    for clip in chosen:
        try:
            metadata: ClipMetadata | None = folder.metadata(clip)
        except DamageError:
            metadata = None
        names = {} if label_problem(folder.classes, clip.labels) else folder.label_names(clip)
        rows.append((clip, metadata, names))
    try:
        draw_sheet(folder, rows, out_png)
    except OSError as error:
        if isinstance(error, UserError) or error.filename != str(out_png):  # the disk is full, or a shard is not read
            raise
        raise UserError(f"{out_png}: cannot be written: {error.strerror}") from None


def find_clip(folder: ShardFolder, key: str) -> Clip:
    """Return the clip with this key, of any split.

    Raises:
        UserError: no clip has the key; the message gives the nearest one.
    """
    clips = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    if key not in clips:
        raise UserError(f"{folder.root}: no clip '{key}'{nearest(key, list(clips))}")
    return clips[key]


def _describe_split(folder: ShardFolder, split: str) -> dict[str, Any]:
    entry = folder.manifest.splits[split]
    clips = folder.clips(split)
    seconds = 0.0
    for clip in clips:
        metadata = folder.metadata(clip)
        if metadata.stop_s is not None:
            seconds += metadata.stop_s - metadata.start_s
    sizes: Counter[str] = Counter()
    for clip in clips:
        sizes.update({m: clip.members[m].size for m in folder.modalities if clip.has(m)})  # type: ignore[union-attr]
    subsets = Counter(letters(m for m in folder.modalities if clip.has(m)) for clip in clips)
    return {
        "clips": len(clips),
        "shards": len(entry.shards),
        "bytes": entry.num_bytes,
        "seconds": round(seconds, 2),
        "subsets": dict(sorted(subsets.items(), key=lambda item: (-item[1], item[0]))),
        "modality_clips": {m: sum(clip.has(m) for clip in clips) for m in folder.modalities},
        "modality_bytes": {m: sizes[m] for m in folder.modalities},
        "label_counts": folder.manifest.label_counts[split],
    }


def _choose(folder: ShardFolder, number: int) -> list[Clip]:
    """Choose clips from every set of present modalities in turn, evenly spread over each."""
    groups: dict[tuple[bool, ...], list[Clip]] = {}
    for split in folder.splits:
        for clip in folder.clips(split):
            groups.setdefault(tuple(clip.has(m) for m in folder.modalities), []).append(clip)
    total = sum(map(len, groups.values()))
    chosen: list[Clip] = []
    for turn in range(min(number, total)):
        for group in sorted(groups, reverse=True):
            clips = groups[group]
            place = turn * max(len(clips) // number, 1)
            if len(chosen) < number and place < len(clips):
                chosen.append(clips[place])
    return chosen
