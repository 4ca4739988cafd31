"""Reads EPIC-SOUNDS: audible events in the recordings of Epic-Kitchens-100, each with a class of sound.

The tables have no frame numbers: those of numbered frames follow from the timestamps, at the nominal rate. Nor is there
a class file: ids and names are paired in the tables. `start_sample` and `stop_sample` are not read: they repeat the
timestamps in samples of one extraction at 24 kHz, up to a sample early, and audio is cut from files of any rate.
Columns: https://github.com/epic-kitchens/epic-sounds-annotations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from karmma_dist.errors import UserError
from karmma_dist.modalities.pictures import EARLY_S
from karmma_dist.modalities.recording import ClipRecord
from karmma_dist.packing.readers.epic_recordings import (
    SPAN_COLUMNS,
    AnnotatedClip,
    EpicPaths,
    clip_span,
    epic_reader,
    nominal_fps,
    plan_clips,
)
from karmma_dist.packing.readers.tables import UNLABELLED, UniqueKeys, integer, rows, split_tables

if TYPE_CHECKING:
    from karmma_dist.packing.records import Plan
    from karmma_dist.packing.spec import PackingSpec


_COLUMNS = ("annotation_id", *SPAN_COLUMNS)


class EpicSoundsPaths(EpicPaths):
    """Sub-paths of EPIC-SOUNDS, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "annotations/EPIC_Sounds_train.csv",
        "validation": "annotations/EPIC_Sounds_validation.csv",
        "test": "annotations/EPIC_Sounds_recognition_test_timestamps.csv",
    }
    """CSV per split (or the same name with .gz); a split whose CSV is absent is skipped with a note."""
    heads: dict[str, str] = {"sound": "class"}
    """Column of class names per head; the ids are in COLUMN_id."""


class _PairedClasses:
    """The classes of a head, collected from the rows that pair an id with a name.

    Args:
        column: Column of the names; the ids are in COLUMN_id.
    """

    def __init__(self, column: str) -> None:
        self.columns = (column, f"{column}_id")
        self._names: dict[int, str] = {}
        self._places: dict[int, str] = {}
        """File and row that first has the id."""
        self._ids: dict[str, int] = {}

    def label(self, place: str, row: dict[str, str]) -> int:
        """Return the class id of a row.

        Raises:
            UserError: the row has no class, or pairs id and name in another way than a row before.
        """
        column, id_column = self.columns
        number, name = integer(place, id_column, row[id_column]), row[column].strip()
        if number < 0:
            raise UserError(f"{place}: {id_column} {number} is no class: {UNLABELLED}")
        if not name:
            raise UserError(f"{place}: {column} is empty: {UNLABELLED}")
        first_name = self._names.setdefault(number, name)
        first_place = self._places.setdefault(number, place)
        if first_name != name:
            raise UserError(f"{place}: {id_column} {number} is '{name}', and '{first_name}' in {first_place}")
        first_id = self._ids.setdefault(name, number)
        if first_id != number:
            raise UserError(f"{place}: {column} '{name}' has id {number}, and {first_id} in {self._places[first_id]}")
        return number

    def names(self) -> list[str]:
        """Return the class names by id.

        Raises:
            UserError: the ids are not 0, 1, 2, ...
        """
        for number, known in enumerate(sorted(self._names)):
            if known != number:
                place, id_column = self._places[known], self.columns[1]
                raise UserError(f"{place}: {id_column} {known}, but no row has {number}: ids are 0, 1, 2, ...")
        return [self._names[number] for number in range(len(self._names))]


def read_epic_sounds(spec: PackingSpec) -> Plan:
    """Read the annotations of every split and check which media files exist.

    Raises:
        UserError: the raw folder or the annotations are missing, or a row is bad; the message names file and row.
    """
    paths = spec.epic_sounds
    assert paths is not None
    tables = split_tables(spec.raw, paths.splits, "epic_sounds")
    classes = {head: _PairedClasses(column) for head, column in paths.heads.items()}
    annotated = []
    keys = UniqueKeys("annotation_id")
    for split, table in tables.files.items():
        labelled = {} if split in paths.unlabelled_splits else classes
        class_columns = (name for paired in labelled.values() for name in paired.columns)
        for place, row in rows(table, (*_COLUMNS, *class_columns)):
            labels = dict.fromkeys(classes) | {head: paired.label(place, row) for head, paired in labelled.items()}
            clip = _clip(place, row, split, labels)
            keys.add(clip.key, place)
            annotated.append(AnnotatedClip(row["participant_id"], row["video_id"], clip))
    return plan_clips(spec, tables, {head: paired.names() for head, paired in classes.items()}, annotated)


def _clip(place: str, row: dict[str, str], split: str, labels: dict[str, int | None]) -> ClipRecord:
    start_s, stop_s = clip_span(place, row, "annotation_id")
    start_frame, stop_frame = frames_shown(start_s, stop_s, nominal_fps(row["video_id"]))
    return ClipRecord(
        row["annotation_id"],
        split,
        start_s,
        stop_s,
        labels,
        row.get("description") or "",
        start_frame=start_frame,
        stop_frame=stop_frame,
    )


def frames_shown(start_s: float, stop_s: float, fps: int) -> tuple[int, int]:
    """Return the number of the frame that is shown at `start_s`, and the one after that shown just before `stop_s`.

    Frames are numbered from 1; number n is shown from (n - 1) / fps to n / fps seconds. As in video files, a frame that
    begins up to `EARLY_S` after the start counts as shown then.
    """
    first, last = math.floor((start_s + EARLY_S) * fps + 1e-6) + 1, math.ceil(stop_s * fps - 1e-6)
    return first, max(first, last) + 1


EPIC_SOUNDS = epic_reader(EpicSoundsPaths, read_epic_sounds)
