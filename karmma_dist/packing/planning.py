"""From a specification to the plan of one run, and what tells one run's shards from another's."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.packing.epic_kitchens import read_epic_kitchens
from karmma_dist.packing.flow import check_method
from karmma_dist.packing.plain import read_plain
from karmma_dist.packing.records import ClipRecord, Plan, Recording
from karmma_dist.packing.something_something import read_something_something
from karmma_dist.packing.spec import PackingSpec


def make_plan(spec: PackingSpec, limit: int | None = None) -> Plan:
    """What the raw folder's annotations ask for, of recordings that have media, at most `limit` clips per split.

    Raises:
        UserError: no raw folder, no annotations, a bad row, no media at all, or a library that the settings need.
    """
    readers = {
        "epic_kitchens": read_epic_kitchens, "something_something": read_something_something, "plain": read_plain,
    }  # fmt: skip
    check_method(spec.flow)
    return _limited(_with_media(readers[spec.reader](spec), spec), limit)


def plan_identity(plan: Plan, limit: int | None) -> dict[str, Any]:
    """What was planned: the limit, the clips per split, and a digest of all annotations."""
    clips = [[r.name, r.participant, asdict(clip)] for r in plan.recordings for clip in r.clips]
    text = json.dumps([plan.classes, sorted(clips, key=lambda entry: entry[2]["key"])], sort_keys=True)
    return {
        "limit": limit,
        "clips": {split: len(plan.keys(split)) for split in plan.splits},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def difference_between(manifest: dict[str, Any], identity: dict[str, Any]) -> str:
    """What differs, in words: the first setting, or the clips."""
    for name, value in identity["settings"].items():
        former = manifest["settings"].get(name)
        if former != value:
            return f"{name} ({_shortest(former, value)})"
    if manifest["plan"] != identity["plan"]:
        former, now = manifest["plan"], identity["plan"]
        if former["limit"] != now["limit"]:
            return f"limit ({former['limit']}, now {now['limit']})"
        num_former, num_now = (sum(plan["clips"].values()) for plan in (former, now))
        return f"annotations or set of media files ({num_former} clips, now {num_now})"
    return ""


def _with_media(plan: Plan, spec: PackingSpec) -> Plan:
    """Leave out recordings of which no media file is there, and say how many."""
    there = [r for r in plan.recordings if _has_media(r)]
    if not there:
        raise UserError(f"{spec.raw}: no media file of any of the {len(plan.recordings)} annotated recordings is there")
    absent = [r for r in plan.recordings if not _has_media(r)]
    if not absent:
        return plan
    num_clips = sum(len(recording.clips) for recording in absent)
    note = f"{len(absent)} recordings ({num_clips} clips) left out: no media file; the first is {absent[0].name}"
    return replace(plan, recordings=tuple(there), notes=(*plan.notes, note))


def _has_media(recording: Recording) -> bool:
    return any((recording.movie, recording.rgb_frames, recording.flow_frames, recording.sound_hdf5))


def _limited(plan: Plan, limit: int | None) -> Plan:
    """Keep the first `limit` clips of each split."""
    if limit is None:
        return plan
    if limit < 1:
        raise UserError(f"limit {limit}: at least 1 clip per split")
    taken: Counter[str] = Counter()

    def within(clip: ClipRecord) -> bool:
        taken[clip.split] += 1
        return taken[clip.split] <= limit

    recordings = [replace(r, clips=tuple(c for c in r.clips if within(c))) for r in plan.recordings]
    return replace(plan, recordings=tuple(r for r in recordings if r.clips))


def _shortest(former: Any, now: Any) -> str:
    if isinstance(former, dict) and isinstance(now, dict):
        key = next(key for key in {**former, **now} if former.get(key) != now.get(key))
        return f"{key}: {former.get(key)}, now {now.get(key)}"
    return f"{former}, now {now}"
