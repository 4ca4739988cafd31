"""Reads Epic-Kitchens-100, and other datasets in its layout: actions with a verb and a noun.

Frame numbers are those of the annotations; `epic_recordings.py` says at which rate they count.
Columns: https://github.com/epic-kitchens/epic-kitchens-100-annotations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from karmma_dist.errors import UserError
from karmma_dist.modalities.recording import ClipRecord
from karmma_dist.packing.readers.epic_recordings import (
    SPAN_COLUMNS,
    AnnotatedClip,
    EpicPaths,
    clip_span,
    epic_reader,
    plan_clips,
)
from karmma_dist.packing.readers.tables import (
    SplitTables,
    UniqueKeys,
    class_id,
    integer,
    read_classes,
    rows,
    split_tables,
)

if TYPE_CHECKING:
    from karmma_dist.packing.records import Plan
    from karmma_dist.packing.spec import PackingSpec


_COLUMNS = ("narration_id", *SPAN_COLUMNS, "start_frame", "stop_frame")


class EpicKitchensPaths(EpicPaths):
    """Sub-paths of Epic-Kitchens, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "annotations/EPIC_100_train.csv",
        "validation": "annotations/EPIC_100_validation.csv",
        "test": "annotations/EPIC_100_test_timestamps.csv",
    }
    """CSV per split (or the same name with .gz); a split whose CSV is absent is skipped with a note."""
    heads: dict[str, str] = {
        "verb": "annotations/EPIC_100_verb_classes.csv",
        "noun": "annotations/EPIC_100_noun_classes.csv",
    }
    """Class file per head (columns id and key); the splits' column is HEAD_class."""


def read_epic_kitchens(spec: PackingSpec) -> Plan:
    """Read the annotations of every split and check which media files exist.

    Raises:
        UserError: the raw folder or the annotations are missing, or a row is bad; the message names file and row.
    """
    paths = spec.epic_kitchens
    assert paths is not None
    tables = split_tables(spec.raw, paths.splits, "epic_kitchens")
    classes = {head: read_classes(tables.raw, name, head, "epic_kitchens") for head, name in paths.heads.items()}
    return plan_clips(spec, tables, classes, _annotated(tables, paths, classes))


def _annotated(tables: SplitTables, paths: EpicPaths, classes: dict[str, list[str]]) -> list[AnnotatedClip]:
    """Read every row of every split."""
    annotated = []
    keys = UniqueKeys("narration_id")
    for split, table in tables.files.items():
        labelled = {} if split in paths.unlabelled_splits else classes
        for place, row in rows(table, (*_COLUMNS, *(f"{head}_class" for head in labelled))):
            clip = _clip(place, row, split, classes, labelled)
            keys.add(clip.key, place)
            annotated.append(AnnotatedClip(row["participant_id"], row["video_id"], clip))
    return annotated


def _clip(
    place: str, row: dict[str, str], split: str, classes: dict[str, list[str]], labelled: dict[str, list[str]]
) -> ClipRecord:
    start_s, stop_s = clip_span(place, row, "narration_id")
    start_frame, stop_frame = (integer(place, column, row[column]) for column in ("start_frame", "stop_frame"))
    if stop_frame < start_frame:
        raise UserError(f"{place}: stop_frame {stop_frame} is before start_frame {start_frame}")
    labels: dict[str, int | None] = dict.fromkeys(classes)
    for head, names in labelled.items():
        labels[head] = class_id(place, f"{head}_class", row[f"{head}_class"], len(names))
    return ClipRecord(
        row["narration_id"],
        split,
        start_s,
        stop_s,
        labels,
        row.get("narration") or "",
        start_frame=max(start_frame, 1),
        stop_frame=stop_frame,
    )


EPIC_KITCHENS = epic_reader(EpicKitchensPaths, read_epic_kitchens)
