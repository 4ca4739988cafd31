"""Boxes of hands and objects: from JSON files of several GB, read one clip at a time, or from a pickle per recording.

Two formats of JSON are recognised by their first character; boxes are in pixels of the clip's original size.

* Something-Else's annotations (https://github.com/joaanna/something_else): an object {clip: [frames]}, frames with
  `name` CLIP/NNNN.jpg and `labels` with `box2d` x1, y1, x2, y2.
* STLT's compact lists (https://github.com/gorjanradevski/revisiting-spatial-temporal-layouts), annotated or detected:
  a list of {"id": clip, "frames": [frames]}, frames in order with `frame_objects` of x1, y1, x2, y2, category, score.

`hand_objects.py` describes the pickles.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from karmma_dist.errors import UserError
from karmma_dist.io.json_fields import JsonObject, parse_strictly
from karmma_dist.modalities.detections import HAND, OBJECT, DetectionsSpec
from karmma_dist.modalities.detections.hand_objects import PICTURE_SIZE, HandObjects
from karmma_dist.modalities.numbered_frames import numbers_held
from karmma_dist.modalities.recording import ClipRecord, MediaError, Recording, media_error
from karmma_dist.modalities.storage import Sections, Source, Storage, Stored
from karmma_dist.modalities.video import VIDEO

if TYPE_CHECKING:
    from karmma_dist.modalities.pictures import CutPictures
    from karmma_dist.modalities.video_file import VideoFile

Span = tuple[int, int]
"""First byte and length of a clip's entry."""

_CHUNK_BYTES = 1 << 24
_MOST_ENTRY_BYTES = 1 << 28
"""Bytes of one clip's entry: a file that is damaged near its start is not read to its end."""
_OPENING = re.compile(r"\s*([{\[])")
_KEY = re.compile(r'\s*([{,])\s*"([^"\\]*)"\s*:\s*')
_ELEMENT = re.compile(r"\s*([\[,])\s*(?=\{)")
_END = re.compile(r"\s*([{\[]?)\s*([}\]])\s*")
_NUMBER = re.compile(r"(\d+)\.\w+$")
"""Number of a frame in the name of its picture."""
_HAND = re.compile(r"(?<![a-z])hands?(?![a-z])", re.IGNORECASE)


def index_boxes(path: Path) -> dict[str, tuple[Path, Span]]:
    """Find every clip's entry in a file, or in all .json files of a folder, without keeping the entry in memory.

    Returns:
        File, first byte and length of each clip's entry, by clip.

    Raises:
        UserError: a file has neither format or is cut, a clip has two entries, or the folder has no .json file.
    """
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        files = [path]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    else:
        files = sorted(path / name for name in names if name.endswith(".json") and not name.startswith("."))
        if not files:
            raise UserError(f"{path}: no .json file of boxes in it (unpack compressed files)")
    entries: dict[str, tuple[Path, Span]] = {}
    for file in files:
        for clip, span in _entries(file):
            if clip in entries:
                other = "" if entries[clip][0] == file else f"; the other is in {entries[clip][0].name}"
                raise UserError(f"{file}: clip '{clip}' has boxes twice{other}: keep one")
            entries[clip] = (file, span)
    return entries


def read_boxes(path: Path, span: Span) -> Any:
    """Read one clip's entry: a list of annotated frames, or in the compact format the object that holds the list.

    Raises:
        MediaError: the file cannot be read, or the entry is no longer at its place.
    """
    try:
        with open(path, "rb") as file:
            file.seek(span[0])
            return parse_strictly(file.read(span[1]).decode())
    except (OSError, ValueError) as error:
        raise media_error(error, "detections", "open", f"{path.name}: {error}") from None


def detections_json(entry: Any, width: int, height: int, num_frames: int, max_boxes: int) -> tuple[bytes, int]:
    """Turn a clip's entry into its detections member, and count its boxes.

    The member has one list per video frame, empty if nothing is annotated, sorted with hands first and then by score;
    boxes are x0, y0, x1, y1 in [0, 1], category, score.

    Raises:
        MediaError: the entry has neither format.
    """
    boxes: list[list[list[float]]] = [[] for _ in range(num_frames)]
    try:
        frames = _frames(entry)
        numbers = [_NUMBER.search(frame.text("name") if "name" in frame else "") for frame in frames]
        first = min([1, *(int(number[1]) for number in numbers if number)])
        for place, (frame, number) in enumerate(zip(frames, numbers, strict=True)):
            position = int(number[1]) - first if number else place
            kept = [box for label in _labels(frame) if (box := _box(label, width, height)) is not None]
            if position < num_frames:
                boxes[position] = _best(kept, max_boxes)
    except ValueError as error:
        raise MediaError("detections", "parse", f"boxes of another format: {error}") from None
    return _member(boxes, width, height)


def _best(boxes: list[list[float]], max_boxes: int) -> list[list[float]]:
    """Return the boxes of a frame that are stored, hands first and then by score."""
    return sorted(boxes, key=lambda box: (box[4], -box[5]))[:max_boxes]


def _member(boxes: list[list[list[float]]], width: int, height: int) -> tuple[bytes, int]:
    """Return the detections member of the boxes of every frame, and count them."""
    content = {"width": width, "height": height, "frames": boxes}
    return json.dumps(content, separators=(",", ":")).encode(), sum(map(len, boxes))


def _entries(path: Path) -> Iterator[tuple[str, Span]]:
    """Yield clip and span of every entry of a file, in file order."""
    decoder = json.JSONDecoder()
    text, base, place, number, opening = "", 0, 0, 0, ""
    # latin-1 has one character per byte, so that offsets in the text are offsets in the file.
    with _opened(path) as file:
        while True:
            try:
                opening = opening or _opening(text)
                match = (_KEY if opening == "{" else _ELEMENT).match(text, place)
                if match is None or match[1] != (opening if number == 0 else ","):
                    raise ValueError("expected the next clip")
                value, stop = _decoded(decoder, text, match.end(), f"{path}, entry {number + 1}")
                if stop == len(text):
                    raise ValueError("the entry may go on")
            except UserError:
                raise
            except ValueError as error:
                text, base, place = text[place:], base + place, 0
                if len(text) > _MOST_ENTRY_BYTES:
                    raise UserError(
                        f"{path}, entry {number + 1}: not a clip's boxes in {_MOST_ENTRY_BYTES:,} bytes: {error}"
                    ) from None
                more = _read_more(file, path)
                end = _END.fullmatch(text)
                if not more and end and end[1] == (opening if number == 0 else "") and opening + end[2] in ("{}", "[]"):
                    return
                if not more:
                    raise UserError(
                        f"{path}: not a complete JSON object of clips or list of clips with 'id', byte {base}: {error}"
                    ) from None
                text += more
                continue
            number += 1
            clip = match[2] if opening == "{" else _id(path, number, value)
            yield clip, (base + match.end(), stop - match.end())
            place = stop


def _opened(path: Path) -> TextIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would never open
            raise UserError(f"{path}: is not a file")
        return open(path, encoding="latin-1", newline="")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _read_more(file: TextIO, path: Path) -> str:
    try:
        return file.read(_CHUNK_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _decoded(decoder: json.JSONDecoder, text: str, place: int, entry: str) -> tuple[Any, int]:
    """Parse an entry and return it with its end.

    Raises:
        ValueError: the entry is not JSON, or not complete yet.
        UserError: it can never become what is expected, however it goes on.
    """
    try:
        return decoder.raw_decode(text, place)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{entry}: {error}") from None
    except RecursionError:
        raise UserError(f"{entry}: nested too deeply") from None


def _opening(text: str) -> str:
    match = _OPENING.match(text)
    if match is None:
        raise ValueError("expected { or [")
    return match[1]


def _id(path: Path, number: int, entry: dict[str, Any]) -> str:
    if not isinstance(entry.get("id"), str | int) or "frames" not in entry:
        raise UserError(f"{path}, entry {number}: expected an object with 'id' and 'frames'")
    return str(entry["id"])


def _frames(entry: Any) -> list[JsonObject]:
    """Return the frames of a clip's entry, in either format."""
    return JsonObject(entry if isinstance(entry, dict) else {"frames": entry}).objects("frames")


def _labels(frame: JsonObject) -> list[tuple[JsonObject, int, float]]:
    """Return a frame's corners, category and score, in either format."""
    labels = frame.objects("labels" if "labels" in frame else "frame_objects")
    if "labels" in frame:
        hands = [_is_hand(label) for label in labels]
        corners = [label.nested("box2d") for label in labels]
    else:
        hands = [_HAND.search(label.text("category")) is not None for label in labels]
        corners = labels
    return [
        (corner, HAND if hand else OBJECT, _number(label, "score") if "score" in label else 1.0)
        for corner, hand, label in zip(corners, hands, labels, strict=True)
    ]


def _is_hand(label: JsonObject) -> bool:
    return any(name in label and label.value(name) == "hand" for name in ("standard_category", "category"))


def _number(fields: JsonObject, name: str) -> float:
    """Return a finite number, which may be written as a string."""
    value = fields.value(name)
    try:
        number = float(value) if isinstance(value, str) else float(fields.number(name))
    except (ValueError, OverflowError):
        raise fields.problem(name) from None
    if not math.isfinite(number):
        raise fields.problem(name)
    return number


def _box(label: tuple[JsonObject, int, float], width: int, height: int) -> list[float] | None:
    """Return a box normalised and clamped to the picture, or None if no part of it is inside."""
    corners, category, score = label
    x0, x1, y0, y1 = (
        _number(corners, name) / size for name, size in (("x1", width), ("x2", width), ("y1", height), ("y2", height))
    )
    x0, x1, y0, y1 = (round(min(max(value, 0.0), 1.0), 5) for value in (x0, x1, y0, y1))
    return None if x1 <= x0 or y1 <= y0 else [x0, y0, x1, y1, category, round(score, 5)]


class BoxesSource(Source):
    """A file of annotated boxes with an entry per clip."""

    def __init__(self, path: Path, max_boxes: int) -> None:
        self._path, self._max_boxes = path, max_boxes

    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored | None:
        """Read the clip's entry and scale it to fractions of the pictures' size."""
        span = clip.entries.get("detections")
        if span is None:
            return None
        if pictures.source_size is None:
            raise MediaError("detections", "parse", "no picture to take the boxes' scale from")
        num_frames = pictures.num_source_frames
        data, num_boxes = detections_json(
            read_boxes(self._path, span), *pictures.source_size, num_frames, self._max_boxes
        )
        return data, {"num_frames": num_frames, "num_boxes": num_boxes}


class HandObjectSource(Source):
    """A recording's pickle of detections, with numbered frames.

    Args:
        frames: The detections.
        nominal_fps: Frame rate of the numbers.
        max_fps: Highest rate of stored pictures, which is that of stored boxes.
        max_boxes: Boxes kept per frame.
    """

    def __init__(self, frames: HandObjects, nominal_fps: int, max_fps: float, max_boxes: int) -> None:
        self._frames, self._max_boxes = frames, max_boxes
        self._nominal_fps = Fraction(nominal_fps)
        self._fps = min(self._nominal_fps, Fraction(max_fps).limit_denominator(1001))

    @property
    def reach_s(self) -> float:
        """End of the last frame in seconds from the start of the recording."""
        return float(self._frames.last / self._nominal_fps)

    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored:
        """Store the boxes of the frames that show the clip, at the rate of stored pictures."""
        end_s = self.reach_s if stop_s is None else stop_s
        numbers = numbers_held(clip, self._frames, end_s, self._nominal_fps, self._fps)
        boxes = [_best(self._frames.boxes(number), self._max_boxes) for number in numbers]
        data, num_boxes = _member(boxes, *(pictures.source_size or PICTURE_SIZE))
        return data, {"num_frames": len(boxes), "num_boxes": num_boxes}


class DetectionsStorage(Storage):
    """The storage of boxes."""

    needs_pictures = True
    entry_field = "boxes"

    settings = DetectionsSpec

    def reads_pictures(self, settings: DetectionsSpec) -> bool:
        """Return True for boxes in pixels; those of hand-object detections are fractions of the picture."""
        return settings.source != "hand_objects"

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> Source | None:
        """Return the recording's file of boxes, read clip by clip, or its detections, read here."""
        file, section = recording.media.get("detections"), sections["detections"]
        if file is None:
            return None
        if section.source == "hand_objects":
            frames = HandObjects(recording.usable(file.path, "detections"), recording.name)
            return HandObjectSource(frames, recording.nominal_fps, sections[VIDEO.name].max_fps, section.max_boxes)
        return BoxesSource(file.path, section.max_boxes)


STORAGE = DetectionsStorage()
