"""Epic-Kitchens-100 (and anything in its layout) -> recordings with their clips.

Movies are cut by the timestamps in seconds. Numbered frames are cut by frame number: 1-based, at a nominal 60 frames/s
for recordings PXX_YY and 50 for PXX_1YY, whatever the movie's own rate; flow of PXX_YY is at half that rate.
Columns: https://github.com/epic-kitchens/epic-kitchens-100-annotations.
"""

from __future__ import annotations

import re
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.packing.annotation_tables import integer, read_classes, rows
from karmma_dist.packing.records import ClipRecord, Plan, Recording, frames_of, inside, raw_file
from karmma_dist.packing.spec import EpicKitchensPaths, PackingSpec
from karmma_dist.shards import check_key

_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
)
_TIMESTAMP = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")


def read_epic_kitchens(spec: PackingSpec) -> Plan:
    """Read the annotations of every split and look which media files exist.

    Raises:
        UserError: no raw folder, no annotations, or a bad row, with file and row.
    """
    paths = spec.epic_kitchens
    assert paths is not None
    raw = Path(spec.raw)
    if not raw.is_dir():
        raise UserError(f"{raw}: no such raw folder (give it with --raw DIR or raw: in the specification)")
    tables = {split: raw_file(raw, name, f"epic_kitchens.splits.{split}") for split, name in paths.splits.items()}
    if not any(tables.values()):
        raise UserError(f"{raw}: no annotations: none of {', '.join(paths.splits.values())} is there")
    notes = [f"split '{s}' skipped: no {paths.splits[s]}" for s, table in tables.items() if table is None]
    classes = {head: read_classes(raw, name, head, "epic_kitchens") for head, name in paths.heads.items()}
    clips: dict[tuple[str, str], list[ClipRecord]] = {}
    rows_of: dict[str, str] = {}
    for split, table in tables.items():
        if table is None:
            continue
        labelled = {} if split in paths.unlabelled_splits else classes
        for where, row in rows(table, (*_COLUMNS, *(f"{head}_class" for head in labelled))):
            participant, name, clip = _clip(where, row, split, classes, labelled)
            if clip.key in rows_of:
                raise UserError(f"{where}: narration_id '{clip.key}' is already that of {rows_of[clip.key]}")
            rows_of[clip.key] = where
            if not spec.participants or participant in spec.participants:
                clips.setdefault((participant, name), []).append(clip)
    if unknown := set(spec.participants) - {participant for participant, _ in clips}:
        notes.append(f"participants without any clip: {', '.join(sorted(unknown))}")
    recordings = tuple(_recording(raw, paths, *ids, tuple(found)) for ids, found in clips.items())
    return Plan(recordings, classes, tuple(s for s, table in tables.items() if table), tuple(notes))


def nominal_fps(recording: str) -> int:
    """Frame rate that the annotations count in: 50 for PXX_1YY, 60 for PXX_YY."""
    return 50 if re.search(r"_\d{3}$", recording) else 60


def _recording(
    raw: Path, paths: EpicKitchensPaths, participant: str, name: str, clips: tuple[ClipRecord, ...]
) -> Recording:
    def place(pattern: str) -> str:
        return pattern.replace("{participant}", participant).replace("{recording}", name)

    movie = inside(raw, place(paths.movies), "epic_kitchens.movies")
    fps = nominal_fps(name)
    return Recording(
        name,
        participant,
        clips,
        movie=movie if movie.is_file() else None,
        rgb_frames=frames_of(raw, place(paths.rgb_frames), "epic_kitchens.rgb_frames"),
        flow_frames=frames_of(raw, place(paths.flow_frames), "epic_kitchens.flow_frames"),
        nominal_fps=fps,
        rgb_frames_per_flow_frame=2 if fps == 60 else 1,
    )


def _clip(
    where: str, row: dict[str, str], split: str, classes: dict[str, list[str]], labelled: dict[str, list[str]]
) -> tuple[str, str, ClipRecord]:
    """Participant, recording and clip of one row."""
    for column in ("narration_id", "participant_id", "video_id"):
        try:
            check_key(row[column])
        except UserError:
            raise UserError(
                f"{where}: {column} '{row[column]}': only letters, digits, '_' and '-' are allowed"
            ) from None
    start_s, stop_s = (_seconds(where, column, row[column]) for column in ("start_timestamp", "stop_timestamp"))
    if stop_s <= start_s:
        raise UserError(f"{where}: stop_timestamp {row['stop_timestamp']} is not after {row['start_timestamp']}")
    start_frame, stop_frame = (integer(where, column, row[column]) for column in ("start_frame", "stop_frame"))
    if stop_frame < start_frame:
        raise UserError(f"{where}: stop_frame {stop_frame} is before start_frame {start_frame}")
    labels: dict[str, int | None] = dict.fromkeys(classes)
    for head, names in labelled.items():
        label = integer(where, f"{head}_class", row[f"{head}_class"])
        if not 0 <= label < len(names):
            raise UserError(f"{where}: {head}_class {label} is not in the class file: it has 0 to {len(names) - 1}")
        labels[head] = label
    clip = ClipRecord(
        row["narration_id"],
        split,
        start_s,
        stop_s,
        labels,
        row.get("narration") or "",
        start_frame=max(start_frame, 1),
        stop_frame=stop_frame,
    )
    return row["participant_id"], row["video_id"], clip


def _seconds(where: str, column: str, text: str) -> float:
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{where}: {column} '{text}' is not HH:MM:SS.ss")
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 6)
