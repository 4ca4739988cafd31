"""Reads any dataset with one CSV per split: recordings with their clips.

    key,media,start,stop,action
    kitchen1_0,videos/kitchen1.mp4,0.5,2.25,open
    kitchen1_1,videos/kitchen1.mp4,2.0,,close

Clips of one media file form one recording, decoded once. `start` and `stop` are seconds; empty: from its start, to its
end. One more column per head holds a class name or id; `recording`, `participant` and `narration` are optional.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator

from karmma_dist.errors import UserError, nearest
from karmma_dist.io.json_fields import shown
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.readers.reader import Reader
from karmma_dist.packing.readers.tables import (
    UNLABELLED,
    UniqueKeys,
    check_name,
    read_classes,
    rows,
    split_tables,
)
from karmma_dist.packing.records import MediaFinder, Plan, inside
from karmma_dist.settings import Settings

if TYPE_CHECKING:
    from karmma_dist.packing.spec import PackingSpec


_COLUMNS = ("key", "media", "start", "stop")
_LONGEST_NAME = 100
_ID = re.compile(r"0|[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"[+-]?\d[\d_]*([.,]\d*)?")
"""Texts that are numbers to people, of which only those of `_ID` are ids."""
_SECONDS = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_MOST_CLASSES = 100_000
"""Largest class id without a class file: a larger one is a mistake, and would make as many classes."""


class PlainPaths(Settings):
    """Sub-paths of any other dataset, relative to the raw folder."""

    splits: dict[str, str] = {"train": "train.csv", "validation": "validation.csv", "test": "test.csv"}
    """CSV per split (or the same name with .gz) with columns key, media, start, stop and one per head; a split whose
    CSV is absent is skipped with a note."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose CSV has no columns of heads."""
    heads: Annotated[dict[str, str], Field(min_length=1)] = {"action": ""}
    """Class file per head (CSV with columns id and key); empty: the class names of the first labelled split, sorted."""

    @field_validator("heads")
    @classmethod
    def _heads_are_not_other_columns(cls, heads: dict[str, str]) -> dict[str, str]:
        for taken in ("key", "media", "start", "stop", "recording", "participant", "narration"):
            if taken in heads:
                raise ValueError(f"a head cannot be called '{taken}': that column holds something else")
        return heads


@dataclass(slots=True)
class _Media:
    """A media file and its clips, while the tables are read."""

    name: str
    participant: str
    place: str
    """File and row that first name the media file."""
    clips: list[ClipRecord] = field(default_factory=list)


def read_plain(spec: PackingSpec) -> Plan:
    """Read the table of every split and check which media files exist.

    Raises:
        UserError: the raw folder or the tables are missing, or a row is bad; the message names file and row.
    """
    paths = spec.plain
    assert paths is not None
    tables = split_tables(spec.raw, paths.splits, "plain")
    raw, notes = tables.raw, list(tables.notes)
    labelled = {split: table for split, table in tables.files.items() if split not in paths.unlabelled_splits}
    first = next(iter(labelled.values()), None)
    classes = {
        head: read_classes(raw, name, head, "plain") if name else _collected_classes(first, head)
        for head, name in paths.heads.items()
    }
    media: dict[Path, _Media] = {}
    keys = UniqueKeys("key")
    for split, table in tables.files.items():
        columns = (*_COLUMNS, *(classes if split in labelled else ()))
        for place, row in rows(table, columns):
            clip = _clip(place, row, split, classes, split in labelled)
            keys.add(clip.key, place)
            entry = _media(place, row, raw, media)
            if not spec.participants or entry.participant in spec.participants:
                entry.clips.append(clip)
    if unknown := set(spec.participants) - {entry.participant for entry in media.values()}:
        notes.append(f"participants without any clip: {', '.join(sorted(unknown))}")
    _check_names(media)
    finder = MediaFinder(raw)
    recordings = _recordings(media, finder)
    return Plan(recordings, classes, tuple(tables.files), (*notes, *finder.notes()), finder.sought)


def _recordings(media: dict[Path, _Media], finder: MediaFinder) -> tuple[Recording, ...]:
    recordings = []
    places: dict[Path, str] = {}
    for path, entry in media.items():
        if not entry.clips:
            continue
        file = finder.file(str(path.relative_to(finder.raw)), entry.place)
        if file is not None and places.setdefault(file, entry.place) != entry.place:
            raise UserError(f"{entry.place}: {path} and that of {places[file]} are both {file.name}: write them alike")
        problems = finder.problems([file])
        recordings.append(
            Recording(entry.name, entry.participant, tuple(entry.clips), video_file=file, problems=problems)
        )
    return tuple(recordings)


def _media(place: str, row: dict[str, str], raw: Path, known: dict[Path, _Media]) -> _Media:
    """Return the entry of a row's media file; all rows of one file must give it the same recording and participant."""
    if not row["media"].strip():
        raise UserError(f"{place}: media is empty: give a path inside the raw folder")
    path = inside(raw, row["media"], place)
    if path == inside(raw, ".", place):
        raise UserError(f"{place}: media '{row['media']}' is the raw folder itself, not a file in it")
    name = row.get("recording") or ""
    if name:
        check_name(place, "recording", name, _LONGEST_NAME)
    if row.get("participant"):
        check_name(place, "participant", row["participant"])
    relative = path.relative_to(inside(raw, ".", place))
    automatic = re.sub(r"[^A-Za-z0-9_-]+", "-", str(relative.with_suffix("")))[-_LONGEST_NAME:]
    entry = _Media(name or automatic, row.get("participant") or "", place)
    former = known.setdefault(path, entry)
    for column, first_text, text in (
        ("recording", former.name, entry.name),
        ("participant", former.participant, entry.participant),
    ):
        if first_text != text:
            raise UserError(f"{place}: {column} '{text}' of {row['media']} is '{first_text}' in {former.place}")
    return former


def _check_names(media: dict[Path, _Media]) -> None:
    named: dict[str, _Media] = {}
    for entry in media.values():
        former = named.setdefault(entry.name, entry)
        if former is not entry:
            raise UserError(
                f"{entry.place}: recording '{entry.name}' is another media file in {former.place}: "
                "tell them apart in the column 'recording'"
            )


def _clip(place: str, row: dict[str, str], split: str, classes: dict[str, list[str]], labelled: bool) -> ClipRecord:
    check_name(place, "key", row["key"])
    start_s, stop_s = _seconds(place, "start", row["start"]), _seconds(place, "stop", row["stop"])
    start_s = 0.0 if start_s is None else start_s
    if stop_s is not None and stop_s <= start_s:
        raise UserError(f"{place}: stop {row['stop']} is not after {row['start'] or 0}")
    labels: dict[str, int | None] = dict.fromkeys(classes)
    if labelled:
        labels = {head: _label(place, head, row[head].strip(), names) for head, names in classes.items()}
    return ClipRecord(row["key"], split, start_s, stop_s, labels, row.get("narration") or "")


def _label(place: str, head: str, text: str, names: list[str]) -> int:
    """Return a class by its name or, if no name is a number, by its id."""
    if text in names:
        return names.index(text)
    if _ID.fullmatch(text) and int(text) < len(names) and not any(_NUMBER.fullmatch(name) for name in names):
        return int(text)
    _check_class(place, head, text)
    raise UserError(f"{place}: {head} '{text}' is not among its {len(names)} classes{nearest(text, names)}")


def _check_class(place: str, head: str, text: str) -> None:
    """Refuse a class that is empty or nearly an id."""
    if not text:
        raise UserError(f"{place}: {head} is empty: {UNLABELLED}")
    if _NUMBER.fullmatch(text) and not _ID.fullmatch(text):
        hint = UNLABELLED if text.startswith("-") else "write ids as 0, 1, 2, ..."
        raise UserError(f"{place}: {head} '{text}' is no class id: {hint}")


def _collected_classes(table: Path | None, head: str) -> list[str]:
    """Return the class names of a head without class file: those of a labelled split, sorted; 0, 1, 2, ... for ids."""
    if table is None:
        return []
    places: dict[str, str] = {}
    for place, row in rows(table, (head,)):
        text = row[head].strip()
        _check_class(place, head, text)
        places.setdefault(text, place)
    ids = [name for name in places if _ID.fullmatch(name)]
    if not ids:
        return sorted(places)
    if len(ids) != len(places):
        name = next(name for name in places if name not in set(ids))
        raise UserError(
            f"{places[name]}: {head} '{name}' is a name, and '{ids[0]}' in {places[ids[0]]} an id: "
            "use one of both, or give a class file"
        )
    largest = max(places, key=int)
    if int(largest) > _MOST_CLASSES:
        raise UserError(f"{places[largest]}: {head} '{largest}' is too large for a class id: give a class file")
    return [str(number) for number in range(int(largest) + 1)]


def _seconds(place: str, column: str, text: str) -> float | None:
    if not text.strip():
        return None
    seconds = float(text) if _SECONDS.fullmatch(text.strip()) else math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{place}: {column} {shown(text)} is not a number of seconds")
    return seconds


def _check(spec: PackingSpec) -> None:
    """Refuse sources that only other datasets have.

    Raises:
        ValueError: the specification asks for such a source.
    """
    if spec.audio.source == "hdf5":
        raise ValueError("audio.source 'hdf5': reader 'plain' has no such file: choose auto, movie or none")
    if spec.flow.source == "files":
        raise ValueError("flow.source 'files': reader 'plain' has no flow files: choose auto, compute or none")


PLAIN = Reader(PlainPaths, read_plain, ("video", "flow", "audio"), check=_check)
