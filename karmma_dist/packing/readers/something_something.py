"""Reads Something-Something V2: recordings of one clip each, with the boxes of Something-Else if they exist.

Labels are official JSON: entries with `id` and `template` ("Pushing [something] down"); a template without its
brackets is a key of the class file. Format: https://developer.qualcomm.com/software/ai-datasets/something-something.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from karmma_dist.errors import UserError, nearest
from karmma_dist.io.json_fields import parse_list, parse_strictly, shown
from karmma_dist.modalities.detections.store import Span, index_boxes
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.readers.reader import Reader
from karmma_dist.packing.readers.tables import UniqueKeys, check_name, read_text, split_tables
from karmma_dist.packing.records import MediaFinder, Plan, inside, raw_file, shared_file
from karmma_dist.settings import Positive, Settings

if TYPE_CHECKING:
    from karmma_dist.packing.spec import PackingSpec


_ID = re.compile(r"0|[1-9][0-9]{0,8}")


class SomethingSomethingPaths(Settings):
    """Sub-paths of Something-Something V2, relative to the raw folder."""

    splits: dict[str, str] = {
        "train": "labels/train.json",
        "validation": "labels/validation.json",
        "test": "labels/test.json",
    }
    """JSON per split (or the same name with .gz); a split whose JSON is absent is skipped with a note. If the
    download has names like something-something-v2-train.json, give those here and in `heads`."""
    unlabelled_splits: list[str] = ["test"]
    """Splits whose entries have no template."""
    heads: dict[str, str] = {"action": "labels/labels.json"}
    """Class file of the head: template without brackets -> id."""
    movies: str = "20bn-something-something-v2/{recording}.webm"
    """One clip per file."""
    flow_frames: str = "flow/{recording}"
    """Folder, or the same name with .tar, of u/frame_%010d.jpg and v/..., flow_x_%05d.jpg and flow_y_..., flow_%05d.jpg
    (red u, green v) or other layouts of `numbered_frames`; the i-th file is the flow from the i-th frame."""
    boxes: str = "boxes.json"
    """Something-Else's annotated boxes or STLT's compact lists; or a folder of such .json files."""
    frames_per_second: Positive = 12
    """Frame rate of flow files."""


def read_something_something(spec: PackingSpec) -> Plan:
    """Read the labels of every split and check which media files exist.

    Raises:
        UserError: the raw folder or the labels are missing, or an entry is bad; the message names file and entry.
    """
    paths = spec.something_something
    assert paths is not None
    tables = split_tables(spec.raw, paths.splits, "something_something")
    raw, notes = tables.raw, list(tables.notes)
    classes = {head: _read_classes(raw, name, head) for head, name in paths.heads.items()}
    ids = {head: {name: number for number, name in enumerate(names)} for head, names in classes.items()}
    boxes = _find_boxes(raw, paths, notes) if spec.detections.source != "none" else {}
    recordings: dict[str, Recording] = {}
    finder = MediaFinder(raw)
    keys = UniqueKeys("id")
    for split, table in tables.files.items():
        for place, entry in _entries(table):
            clip = _clip(place, entry, split, ids, split not in paths.unlabelled_splits)
            keys.add(clip.key, place)
            recordings[clip.key] = _recording(finder, paths, clip, boxes.get(clip.key))
    if boxes and not any("detections" in recording.media for recording in recordings.values()):
        notes.append(f"no detections: none of the {len(boxes)} clips in {paths.boxes} is in a split")
    notes += finder.notes()
    return Plan(tuple(recordings.values()), classes, tuple(tables.files), tuple(notes), finder.sought)


def _find_boxes(raw: Path, paths: SomethingSomethingPaths, notes: list[str]) -> dict[str, tuple[Path, Span]]:
    path = inside(raw, paths.boxes, "something_something.boxes")
    if shared_file(path, or_folder=True) is not None:
        return index_boxes(path)
    packed = path.with_name(f"{path.name}.gz")
    if shared_file(packed) is not None:
        raise UserError(f"{packed}: boxes are read clip by clip, which gzip does not allow: unpack it (gunzip)")
    notes.append(f"no detections: no {paths.boxes}")
    return {}


def _recording(
    finder: MediaFinder, paths: SomethingSomethingPaths, clip: ClipRecord, boxes: tuple[Path, Span] | None
) -> Recording:
    video_file = finder.file(paths.movies.replace("{recording}", clip.key), "something_something.movies")
    flow = finder.frames(paths.flow_frames.replace("{recording}", clip.key), "something_something.flow_frames")
    media = {} if flow is None else {"flow": MediaFile(flow)}
    if boxes is not None:
        media["detections"], clip = MediaFile(boxes[0]), replace(clip, entries={"detections": boxes[1]})
    return Recording(
        clip.key, "", (clip,),
        video_file=video_file,
        media=media,
        nominal_fps=paths.frames_per_second,
        problems=finder.problems([video_file, flow]),
    )  # fmt: skip


def _clip(place: str, entry: Any, split: str, ids: dict[str, dict[str, int]], labelled: bool) -> ClipRecord:
    if not isinstance(entry, dict) or "id" not in entry:
        raise UserError(f"{place}: expected an object with 'id'")
    if type(entry["id"]) not in (str, int):
        raise UserError(f"{place}: 'id' is {shown(entry['id'])}, neither a text nor a whole number")
    key = str(entry["id"])
    check_name(place, "id", key)
    labels: dict[str, int | None] = dict.fromkeys(ids)
    if labelled:
        if not isinstance(entry.get("template"), str):
            raise UserError(f"{place}: 'template' is missing")
        name = entry["template"].replace("[", "").replace("]", "")
        for head, known in ids.items():
            if name not in known:
                raise UserError(f"{place}: template '{name}' is not in the class file{nearest(name, list(known))}")
            labels[head] = known[name]
    narration = entry.get("label") or entry.get("template") or ""
    if not isinstance(narration, str):
        raise UserError(f"{place}: 'label' is {shown(narration)}, not a text")
    return ClipRecord(key, split, 0.0, None, labels, narration, start_frame=0)


def _read_classes(raw: Path, name: str, head: str) -> list[str]:
    """Read class names by id; ids must be 0, 1, 2, ..."""
    path = raw_file(raw, name, f"something_something.heads.{head}")
    if path is None:
        raise UserError(f"{inside(raw, name, head)}: no such class file (head '{head}')")
    try:
        content = parse_strictly(read_text(path))
    except ValueError as error:
        raise UserError(str(error) if isinstance(error, UserError) else f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    numbers: dict[int, str] = {}
    for template, number in content.items():
        # The official file has its ids as strings.
        text = str(number) if type(number) is int else number
        if not isinstance(text, str) or not _ID.fullmatch(text):
            raise UserError(f"{path}: id of '{template}' is {shown(number)}: expected template -> id, whole numbers")
        if int(text) in numbers:
            raise UserError(f"{path}: '{numbers[int(text)]}' and '{template}' have the same id {text}")
        numbers[int(text)] = template
    if sorted(numbers) != list(range(len(numbers))) or not numbers:
        raise UserError(f"{path}: ids are not 0 to {len(numbers) - 1} without a gap")
    return [numbers[number] for number in range(len(numbers))]


def _entries(table: Path) -> Iterator[tuple[str, Any]]:
    """Yield (`FILE, entry N`, entry) of a JSON list."""
    number = 0
    try:
        for number, entry in enumerate(parse_list(read_text(table)), start=1):
            yield f"{table}, entry {number}", entry
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{table}, entry {number + 1}: not JSON: {error}") from None
    if not number:
        raise UserError(f"{table}: has no entry (a file that does not exist is skipped)")


def _check(spec: PackingSpec) -> None:
    """Refuse sources that only other datasets have.

    Raises:
        ValueError: the specification asks for such a source.
    """
    if spec.detections.source == "hand_objects":
        raise ValueError(
            "detections.source 'hand_objects': reader 'something_something' has no such files: choose auto or none"
        )


SOMETHING_SOMETHING = Reader(
    SomethingSomethingPaths,
    read_something_something,
    ("video", "flow", "detections"),
    takes_participants=False,
    check=_check,
)
