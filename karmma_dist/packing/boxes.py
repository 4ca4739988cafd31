"""Something-Else's annotated boxes: one JSON object {clip: [frames]} of several GB, read one clip at a time.

Format: https://github.com/joaanna/something_else (frames with `name` CLIP/NNNN.jpg and `labels` with `box2d` x1, y1,
x2, y2 in pixels of the clip's own size).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.packing.records import MediaError

HAND, OBJECT = 1, 2
"""Categories as they are stored; 0 is padding."""

_CHUNK_BYTES = 1 << 24
_KEY = re.compile(r'\s*[{,]?\s*"([^"\\]*)"\s*:\s*')
_END = re.compile(r"\s*\{?\s*\}\s*")


def index_boxes(path: Path) -> dict[str, tuple[int, int]]:
    """Find every clip's entry without keeping it: clip -> (first byte, length).

    Raises:
        UserError: the file is not one JSON object, or is cut.
    """
    spans: dict[str, tuple[int, int]] = {}
    decoder = json.JSONDecoder()
    text, base, place = "", 0, 0
    # latin-1 keeps one character per byte, so that places in the text are places in the file.
    with open(path, encoding="latin-1", newline="") as file:
        while True:
            match = _KEY.match(text, place)
            try:
                if match is None:
                    raise ValueError("expected the next clip")
                _, stop = decoder.raw_decode(text, match.end())
                if stop == len(text):
                    raise ValueError("the entry may go on")
            except ValueError as error:
                if _END.fullmatch(text, place) and not (more := file.read(1)):
                    return spans
                text, base, place = text[place:], base + place, 0
                more = file.read(_CHUNK_BYTES)
                if not more:
                    raise UserError(f"{path}: not a whole JSON object, byte {base}: {error}") from None
                text += more
                continue
            spans[match[1]] = (base + match.end(), stop - match.end())
            place = stop


def read_boxes(path: Path, span: tuple[int, int]) -> list[dict[str, Any]]:
    """One clip's annotated frames."""
    with open(path, "rb") as file:
        file.seek(span[0])
        frames: list[dict[str, Any]] = json.loads(file.read(span[1]))
    return frames


def detections_json(
    frames: list[dict[str, Any]], width: int, height: int, num_frames: int, max_boxes: int
) -> tuple[bytes, int]:
    """Turn annotated frames into a clip's detections member, and count its boxes.

    One list per video frame, empty where nothing is annotated; boxes are x0, y0, x1, y1 in [0, 1], category, score.

    Raises:
        MediaError: the annotation is not in Something-Else's format.
    """
    boxes: list[list[list[float]]] = [[] for _ in range(num_frames)]
    try:
        for place, frame in enumerate(frames):
            number = re.search(r"(\d+)\.\w+$", frame.get("name", ""))
            at = int(number[1]) - 1 if number else place
            if not 0 <= at < num_frames:
                continue
            found = [_box(label, width, height) for label in frame["labels"]]
            boxes[at] = sorted((box for box in found if box is not None), key=lambda box: box[4])[:max_boxes]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MediaError("detections", "parse", f"boxes of another format: {error!r}") from None
    content = {"width": width, "height": height, "frames": boxes}
    return json.dumps(content, separators=(",", ":")).encode(), sum(map(len, boxes))


def _box(label: dict[str, Any], width: int, height: int) -> list[float] | None:
    """Normalised and clamped to the picture; None when nothing of it is inside."""
    corners = label["box2d"]
    x0, x1 = (min(max(float(corners[name]) / width, 0.0), 1.0) for name in ("x1", "x2"))
    y0, y1 = (min(max(float(corners[name]) / height, 0.0), 1.0) for name in ("y1", "y2"))
    if x1 <= x0 or y1 <= y0:
        return None
    hand = "hand" in (label.get("standard_category"), label.get("category"))
    score = round(float(label.get("score", 1.0)), 5)
    return [round(x0, 5), round(y0, 5), round(x1, 5), round(y1, 5), HAND if hand else OBJECT, score]
