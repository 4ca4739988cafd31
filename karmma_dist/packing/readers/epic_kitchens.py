"""Reads Epic-Kitchens-100, and other datasets in its layout: recordings with their clips.

Video files are cut by the timestamps in seconds. Numbered frames are cut by frame number: 1-based, at a nominal 60
frames/s for recordings PXX_YY and 50 for PXX_1YY, independent of the video file's rate; flow of PXX_YY is at half rate.
The IMU of PXX_1YY is found by the tracks that `shards/epic_kitchens_imu.yaml` names.
Columns: https://github.com/epic-kitchens/epic-kitchens-100-annotations.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from karmma_dist.errors import UserError
from karmma_dist.modalities.audio.store import recordings_with_sound
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.readers.reader import Reader
from karmma_dist.packing.readers.tables import (
    SplitTables,
    UniqueKeys,
    check_name,
    class_id,
    integer,
    read_classes,
    rows,
    split_tables,
)
from karmma_dist.packing.records import MediaFinder, Plan, inside, shared_file
from karmma_dist.seeding import hold_out_word
from karmma_dist.settings import Positive, Settings

if TYPE_CHECKING:
    from karmma_dist.packing.spec import PackingSpec


_Annotated = tuple[str, str, ClipRecord]
"""Participant, recording and one clip of the recording."""

_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
)
Fraction = Annotated[float, Field(ge=0, le=1)]
_TIMESTAMP = re.compile(r"(\d{1,6}):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", re.ASCII)


class EpicKitchensPaths(Settings):
    """Sub-paths of Epic-Kitchens, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "annotations/EPIC_100_train.csv",
        "validation": "annotations/EPIC_100_validation.csv",
        "test": "annotations/EPIC_100_test_timestamps.csv",
    }
    """CSV per split (or the same name with .gz); a split whose CSV is absent is skipped with a note."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose CSV has no class columns."""
    heads: dict[str, str] = {
        "verb": "annotations/EPIC_100_verb_classes.csv",
        "noun": "annotations/EPIC_100_noun_classes.csv",
    }
    """Class file per head (columns id and key); the splits' column is HEAD_class."""
    movies: str = "EPIC-KITCHENS/{participant}/videos/{recording}.MP4"
    """Untrimmed video file with audio."""
    rgb_frames: str = "EPIC-KITCHENS/{participant}/rgb_frames/{recording}"
    """Folder of frame_%010d.jpg, or the same name with .tar."""
    flow_frames: str = "EPIC-KITCHENS/{participant}/flow_frames/{recording}"
    """Folder of u/frame_%010d.jpg and v/frame_%010d.jpg, or the same name with .tar."""
    audio_hdf5: str = "EPIC-KITCHENS-100_audio.hdf5"
    """Audio in the format of auditory-slow-fast: one mono dataset per recording. Needs the extra `hdf5`."""
    audio_hdf5_rate: Positive = 24_000
    """Samples per second of the HDF5 file, which does not record them."""
    pruned_splits: list[str] = []
    """Splits without the clips whose class, of any head, never occurs in `train`: the paper's evaluation drops 24 of
    9,668 validation clips in this way (nouns 205, 240, 288 and 295)."""
    hold_out: dict[str, Fraction] = {}
    """Further splits taken from `train`: name -> share of its recordings, chosen by a hash of their names so that no
    recording is in two splits. {validation: 0.1} with the official validation as `test` is Epic-Kitchens*."""

    @model_validator(mode="after")
    def _splits_fit_together(self) -> EpicKitchensPaths:
        if (self.pruned_splits or self.hold_out) and ("train" not in self.splits or "train" in self.unlabelled_splits):
            raise ValueError("pruned_splits and hold_out need a labelled split 'train'")
        for split in self.pruned_splits:
            if split not in self.splits:
                raise ValueError(f"pruned_splits: '{split}' is not a split")
            if split == "train" or split in self.unlabelled_splits:
                raise ValueError(f"pruned_splits: '{split}' has nothing to prune")
        for split in self.hold_out:
            if split in self.splits:
                raise ValueError(f"hold_out: '{split}' is already a split")
        if sum(self.hold_out.values()) >= 1:
            raise ValueError("hold_out: nothing is left of 'train'")
        return self


def read_epic_kitchens(spec: PackingSpec) -> Plan:
    """Read the annotations of every split and check which media files exist.

    Raises:
        UserError: the raw folder or the annotations are missing, or a row is bad; the message names file and row.
    """
    paths = spec.epic_kitchens
    assert paths is not None
    tables = split_tables(spec.raw, paths.splits, "epic_kitchens")
    classes = {head: read_classes(tables.raw, name, head, "epic_kitchens") for head, name in paths.heads.items()}
    kept, prune_notes = _pruned(_annotated(tables, paths, classes), paths)
    annotated, notes = _held_out(kept, paths), [*tables.notes, *prune_notes]
    clips: dict[tuple[str, str], list[ClipRecord]] = {}
    for participant, recording, clip in annotated:
        if not spec.participants or participant in spec.participants:
            clips.setdefault((participant, recording), []).append(clip)
    if unknown := set(spec.participants) - {participant for participant, _ in clips}:
        notes.append(f"participants without any clip: {', '.join(sorted(unknown))}")
    with_audio = _audio_files(tables.raw, spec, notes)
    finder = MediaFinder(tables.raw)
    recordings = tuple(_recording(finder, paths, *ids, tuple(some), with_audio) for ids, some in clips.items())
    held_out = tuple(paths.hold_out) if "train" in tables.files else ()
    return Plan(recordings, classes, (*tables.files, *held_out), (*notes, *finder.notes()), finder.sought)


def _annotated(tables: SplitTables, paths: EpicKitchensPaths, classes: dict[str, list[str]]) -> list[_Annotated]:
    """Read every row of every split."""
    annotated = []
    keys = UniqueKeys("narration_id")
    for split, table in tables.files.items():
        labelled = {} if split in paths.unlabelled_splits else classes
        for place, row in rows(table, (*_COLUMNS, *(f"{head}_class" for head in labelled))):
            entry = _clip(place, row, split, classes, labelled)
            keys.add(entry[2].key, place)
            annotated.append(entry)
    return annotated


def _held_out(annotated: list[_Annotated], paths: EpicKitchensPaths) -> list[_Annotated]:
    """Move complete recordings of `train` to the held-out splits."""

    def split_of(recording: str, clip: ClipRecord) -> str:
        if clip.split != "train":
            return clip.split
        fraction = hold_out_word(recording, "packing") / 2**64
        for split, share in paths.hold_out.items():
            if fraction < share:
                return split
            fraction -= share
        return "train"

    return [
        (participant, recording, replace(clip, split=split_of(recording, clip)))
        for participant, recording, clip in annotated
    ]


def _pruned(annotated: list[_Annotated], paths: EpicKitchensPaths) -> tuple[list[_Annotated], list[str]]:
    """Leave out clips of the pruned splits whose class no row of `train` has, and note how many."""
    if not paths.pruned_splits:
        return annotated, []
    if not any(clip.split == "train" for _, _, clip in annotated):
        raise UserError("epic_kitchens.pruned_splits: train has no clip that tells which classes occur")
    trained: dict[str, set[int | None]] = {head: set() for head in paths.heads}
    for _, _, clip in annotated:
        if clip.split == "train":
            for head, label in clip.labels.items():
                trained[head].add(label)

    def unseen(clip: ClipRecord) -> bool:
        known = all(label in trained[head] for head, label in clip.labels.items())
        return clip.split in paths.pruned_splits and not known

    notes = []
    for split in paths.pruned_splits:
        if num := sum(unseen(clip) for _, _, clip in annotated if clip.split == split):
            notes.append(f"split '{split}': {num} clips left out (pruned_splits): train has no clip of their class")
    return [entry for entry in annotated if not unseen(entry[2])], notes


def _audio_files(raw: Path, spec: PackingSpec, notes: list[str]) -> dict[str, Path]:
    """Return the HDF5 file of audio per recording that it contains."""
    assert spec.epic_kitchens is not None
    if spec.audio.source not in ("auto", "hdf5"):
        return {}
    path = inside(raw, spec.epic_kitchens.audio_hdf5, "epic_kitchens.audio_hdf5")
    if shared_file(path) is not None:
        return dict.fromkeys(recordings_with_sound(path), path)
    if spec.audio.source == "hdf5":
        notes.append(f"no audio: no {spec.epic_kitchens.audio_hdf5}")
    return {}


def nominal_fps(recording: str) -> int:
    """Return the frame rate in which the annotations count: 50 for PXX_1YY, 60 for PXX_YY."""
    return 50 if re.search(r"_\d{3}$", recording) else 60


def _recording(
    finder: MediaFinder, paths: EpicKitchensPaths, participant: str, name: str, clips: tuple[ClipRecord, ...],
    with_audio: dict[str, Path],
) -> Recording:  # fmt: skip
    def expanded(pattern: str) -> str:
        return pattern.replace("{participant}", participant).replace("{recording}", name)

    video_file = finder.file(expanded(paths.movies), "epic_kitchens.movies")
    frames = finder.frames(expanded(paths.rgb_frames), "epic_kitchens.rgb_frames")
    flow = finder.frames(expanded(paths.flow_frames), "epic_kitchens.flow_frames")
    fps = nominal_fps(name)
    media = {}
    if flow is not None:
        media["flow"] = MediaFile(flow, rate=2 if fps == 60 else 1)
    if name in with_audio:
        media["audio"] = MediaFile(with_audio[name], rate=paths.audio_hdf5_rate)
    return Recording(
        name,
        participant,
        clips,
        video_file=video_file,
        frames=frames,
        media=media,
        nominal_fps=fps,
        problems=finder.problems([video_file, frames, flow]),
    )


def _clip(
    place: str, row: dict[str, str], split: str, classes: dict[str, list[str]], labelled: dict[str, list[str]]
) -> _Annotated:
    """Read participant, recording and clip from one row."""
    for column in ("narration_id", "participant_id", "video_id"):
        check_name(place, column, row[column])
    start_s, stop_s = (_seconds(place, column, row[column]) for column in ("start_timestamp", "stop_timestamp"))
    if stop_s <= start_s:
        raise UserError(f"{place}: stop_timestamp {row['stop_timestamp']} is not after {row['start_timestamp']}")
    start_frame, stop_frame = (integer(place, column, row[column]) for column in ("start_frame", "stop_frame"))
    if stop_frame < start_frame:
        raise UserError(f"{place}: stop_frame {stop_frame} is before start_frame {start_frame}")
    labels: dict[str, int | None] = dict.fromkeys(classes)
    for head, names in labelled.items():
        labels[head] = class_id(place, f"{head}_class", row[f"{head}_class"], len(names))
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


def _seconds(place: str, column: str, text: str) -> float:
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{place}: {column} '{text}' is not HH:MM:SS.ss")
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 6)


EPIC_KITCHENS = Reader(EpicKitchensPaths, read_epic_kitchens, ("video", "flow", "audio"))
