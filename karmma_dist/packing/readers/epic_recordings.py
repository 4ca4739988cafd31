"""The recordings of Epic-Kitchens-100, from which several datasets cut clips of their own.

Video files are cut by the timestamps in seconds. Numbered frames are cut by frame number: 1-based, at a nominal 60
frames/s for recordings PXX_YY and 50 for PXX_1YY, independent of the video file's rate; flow of PXX_YY is at half rate.
The IMU of PXX_1YY is found by the tracks that `shards/epic_kitchens_imu.yaml` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from karmma_dist.errors import UserError
from karmma_dist.modalities.audio.store import recordings_with_sound
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.readers.reader import RECORDED_IF_CHANGED, Reader
from karmma_dist.packing.readers.tables import SplitTables, check_name
from karmma_dist.packing.records import MediaFinder, Plan, inside, shared_file
from karmma_dist.seeding import hold_out_word
from karmma_dist.settings import Positive, Settings

if TYPE_CHECKING:
    from karmma_dist.packing.spec import PackingSpec


Fraction = Annotated[float, Field(ge=0, le=1)]
_TIMESTAMP = re.compile(r"(\d{1,6}):([0-5]?\d):([0-5]?\d(?:\.\d+)?)", re.ASCII)

_BOXES = {"detections": "hand_objects"}
"""Modality that clips declare if the specification asks for it by this `source`."""

SPAN_COLUMNS = ("participant_id", "video_id", "start_timestamp", "stop_timestamp")
"""Columns that every table of clips has."""


class EpicPaths(Settings):
    """Sub-paths of a dataset of these recordings, relative to the raw folder."""

    splits: dict[str, str]
    """CSV per split (or the same name with .gz); a split whose CSV is absent is skipped with a note."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose CSV has no class columns."""
    heads: dict[str, str]
    """Heads of the dataset, each with the place of its classes."""
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
    hand_objects: Annotated[str, RECORDED_IF_CHANGED] = "EPIC-KITCHENS/{participant}/hand-objects/{recording}.pkl"
    """Published detections of hands and objects, stored with `detections.source: hand_objects`."""
    pruned_splits: list[str] = []
    """Splits without the clips whose class, of any head, never occurs in `train`: the paper's evaluation drops 24 of
    Epic-Kitchens' 9,668 validation clips in this way (nouns 205, 240, 288 and 295)."""
    hold_out: dict[str, Fraction] = {}
    """Further splits taken from `train`: name -> share of its recordings, chosen by a hash of their names so that no
    recording is in two splits. {validation: 0.1} with the official validation as `test` is Epic-Kitchens*."""

    @model_validator(mode="after")
    def _splits_fit_together(self) -> EpicPaths:
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


@dataclass(frozen=True, slots=True)
class AnnotatedClip:
    """A clip, with the recording that it is cut from."""

    participant: str
    recording: str
    clip: ClipRecord


def clip_span(place: str, row: dict[str, str], key: str) -> tuple[float, float]:
    """Check the names in a row, and return where its clip starts and stops, in seconds.

    Args:
        place: File and row, for errors.
        row: The row, with the columns `SPAN_COLUMNS` and `key`.
        key: Column of the clip's key.

    Raises:
        UserError: a name has a character that none may have, a timestamp is none, or the clip stops before it starts.
    """
    for column in (key, "participant_id", "video_id"):
        check_name(place, column, row[column])
    start_s, stop_s = (_seconds(place, column, row[column]) for column in ("start_timestamp", "stop_timestamp"))
    if stop_s <= start_s:
        raise UserError(f"{place}: stop_timestamp {row['stop_timestamp']} is not after {row['start_timestamp']}")
    return start_s, stop_s


def _seconds(place: str, column: str, text: str) -> float:
    match = _TIMESTAMP.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{place}: {column} '{text}' is not HH:MM:SS.ss")
    return round(int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]), 6)


def nominal_fps(recording: str) -> int:
    """Return the frame rate in which the annotations count: 50 for PXX_1YY, 60 for PXX_YY."""
    return 50 if re.search(r"_\d{3}$", recording) else 60


def plan_clips(
    spec: PackingSpec, tables: SplitTables, classes: dict[str, list[str]], annotated: Iterable[AnnotatedClip]
) -> Plan:
    """Return the plan of a dataset's clips: those that its settings keep, with the existing media of their recordings.

    Args:
        spec: The specification; the section of its reader is an `EpicPaths`.
        tables: The annotation files that exist.
        classes: Class names per head, by id.
        annotated: Every clip of every split.

    Raises:
        UserError: clips are pruned without training clips, a path leaves the raw folder, or the HDF5 file of audio
            cannot be read.
    """
    paths = getattr(spec, spec.reader)
    assert isinstance(paths, EpicPaths)
    kept, prune_notes = _pruned(list(annotated), paths, spec.reader)
    notes = [*tables.notes, *prune_notes]
    clips: dict[tuple[str, str], list[ClipRecord]] = {}
    for each in _held_out(kept, paths):
        if not spec.participants or each.participant in spec.participants:
            clips.setdefault((each.participant, each.recording), []).append(each.clip)
    if unknown := set(spec.participants) - {participant for participant, _ in clips}:
        notes.append(f"participants without any clip: {', '.join(sorted(unknown))}")
    with_audio = _audio_files(tables.raw, spec, paths, notes)
    with_boxes = spec.detections.source == _BOXES["detections"]
    finder = _RecordingFinder(MediaFinder(tables.raw), spec.reader, paths, with_audio, with_boxes)
    recordings = tuple(finder.recording(*ids, tuple(some)) for ids, some in clips.items())
    if with_boxes and not any("detections" in recording.media for recording in recordings):
        notes.append(f"no detections: no recording has {paths.hand_objects}")
    held_out = tuple(paths.hold_out) if "train" in tables.files else ()
    media = finder.media
    return Plan(recordings, classes, (*tables.files, *held_out), (*notes, *media.notes()), media.sought)


def _held_out(annotated: Sequence[AnnotatedClip], paths: EpicPaths) -> list[AnnotatedClip]:
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

    return [replace(each, clip=replace(each.clip, split=split_of(each.recording, each.clip))) for each in annotated]


def _pruned(
    annotated: list[AnnotatedClip], paths: EpicPaths, section: str
) -> tuple[list[AnnotatedClip], list[str]]:
    """Leave out clips of the pruned splits whose class no row of `train` has, and note how many."""
    if not paths.pruned_splits:
        return annotated, []
    if not any(each.clip.split == "train" for each in annotated):
        raise UserError(f"{section}.pruned_splits: train has no clip that tells which classes occur")
    trained: dict[str, set[int | None]] = {head: set() for head in paths.heads}
    for each in annotated:
        if each.clip.split == "train":
            for head, label in each.clip.labels.items():
                trained[head].add(label)

    def unseen(clip: ClipRecord) -> bool:
        known = all(label in trained[head] for head, label in clip.labels.items())
        return clip.split in paths.pruned_splits and not known

    notes = []
    for split in paths.pruned_splits:
        if num := sum(unseen(each.clip) for each in annotated if each.clip.split == split):
            notes.append(f"split '{split}': {num} clips left out (pruned_splits): train has no clip of their class")
    return [each for each in annotated if not unseen(each.clip)], notes


def _audio_files(raw: Path, spec: PackingSpec, paths: EpicPaths, notes: list[str]) -> dict[str, Path]:
    """Return the HDF5 file of audio per recording that it contains."""
    if spec.audio.source not in ("auto", "hdf5"):
        return {}
    path = inside(raw, paths.audio_hdf5, f"{spec.reader}.audio_hdf5")
    if shared_file(path) is not None:
        return dict.fromkeys(recordings_with_sound(path), path)
    if spec.audio.source == "hdf5":
        notes.append(f"no audio: no {paths.audio_hdf5}")
    return {}


@dataclass(frozen=True, slots=True)
class _RecordingFinder:
    """A search for the media of recordings."""

    media: MediaFinder
    section: str
    paths: EpicPaths
    with_audio: dict[str, Path]
    """HDF5 file of audio per recording that it contains."""
    with_boxes: bool
    """True if detections of hands and objects are stored."""

    def recording(self, participant: str, name: str, clips: tuple[ClipRecord, ...]) -> Recording:
        """Return a recording with the paths of its media that exist."""
        paths = self.paths

        def expanded(pattern: str) -> str:
            return pattern.replace("{participant}", participant).replace("{recording}", name)

        video_file = self.media.file(expanded(paths.movies), f"{self.section}.movies")
        frames = self.media.frames(expanded(paths.rgb_frames), f"{self.section}.rgb_frames")
        flow = self.media.frames(expanded(paths.flow_frames), f"{self.section}.flow_frames")
        boxes = None
        if self.with_boxes:
            boxes = self.media.file(expanded(paths.hand_objects), f"{self.section}.hand_objects")
        fps = nominal_fps(name)
        media = {}
        if flow is not None:
            media["flow"] = MediaFile(flow, rate=2 if fps == 60 else 1)
        if name in self.with_audio:
            media["audio"] = MediaFile(self.with_audio[name], rate=paths.audio_hdf5_rate)
        if boxes is not None:
            media["detections"] = MediaFile(boxes)
        return Recording(
            name,
            participant,
            clips,
            video_file=video_file,
            frames=frames,
            media=media,
            nominal_fps=fps,
            problems=self.media.problems([video_file, frames, flow, boxes]),
        )


def epic_reader(paths: type[EpicPaths], read: Callable[[PackingSpec], Plan]) -> Reader:
    """Return the reader of a dataset of these recordings."""
    return Reader(paths, read, ("video", "flow", "audio"), on_request=_BOXES)
