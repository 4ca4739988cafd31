"""The detections decoder: stored boxes -> float32 arrays of the frames that a view shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from karmma_dist.io.json_fields import JsonObject
from karmma_dist.modalities.contract import ArrayType, DecodeError, Decoder, StoredError, View
from karmma_dist.modalities.detections import NUM_VALUES, DetectionsDescription, DetectionsInput
from karmma_dist.modalities.stored_frames import floor_places

Boxes = list[list[float]]
"""The boxes of a frame."""


class DetectionsDecoder(Decoder):
    """A decoder to float32 (V, F, boxes, 6): x0 y0 x1 y1 in [0, 1], category (0: no box), score."""

    def decode(self, data: bytes, description: DetectionsDescription, settings: DetectionsInput) -> np.ndarray:
        """Read the boxes with the best scores of every frame: float32 (frames, boxes, 6)."""
        frames = read_frames(data)
        boxes = np.zeros((len(frames), settings.max_boxes, NUM_VALUES), dtype=np.float32)
        for number, frame in enumerate(frames):
            best = sorted(frame, key=lambda box: -box[5])[: settings.max_boxes]
            if best:
                boxes[number, : len(best)] = best
        return boxes

    def cut(
        self, decoded: np.ndarray, description: DetectionsDescription, settings: DetectionsInput,
        views: Sequence[View], length_s: float,
    ) -> np.ndarray:  # fmt: skip
        """Take the boxes at the views' moments, counted in fractions of the frames, since boxes have no frame rate."""
        return np.stack([_view_boxes(decoded, settings, view) for view in views])

    def array(self, settings: DetectionsInput) -> ArrayType:
        """Return the type of F frames' boxes."""
        shape = (settings.num_frames, settings.max_boxes, NUM_VALUES)
        axes = "frames, boxes, values: x0 y0 x1 y1 in [0, 1], category (0 no box, 1 hand, 2 object), score"
        return ArrayType(shape, "float32", axes)

    def check(self, data: bytes, description: DetectionsDescription) -> None:
        """Count frames and boxes, and check the boxes' coordinates."""
        frames = read_frames(data)
        boxes = [box for frame in frames for box in frame]
        if (len(frames), len(boxes)) != (description.num_frames, description.num_boxes):
            declared = f"{description.num_boxes} in {description.num_frames}"
            raise StoredError("length", f"{len(boxes)} boxes in {len(frames)} frames, declared {declared}")
        for box in boxes:
            if not all(0 <= value <= 1 for value in box[:4]):
                raise StoredError("decode", f"not a box of four coordinates in [0, 1], category, score: {box}")


def read_frames(data: bytes) -> list[Boxes]:
    """Read the boxes of every frame of a stored member.

    Raises:
        DecodeError: the member is not JSON of this form.
    """
    frames = _content(data).get("frames")
    if not isinstance(frames, list) or not frames:
        raise DecodeError("no list of frames in it")
    for number, frame in enumerate(frames):
        if not isinstance(frame, list) or not all(_is_box(box) for box in frame):
            raise DecodeError(f"frame {number}: not a list of boxes of {NUM_VALUES} numbers")
    return frames


def picture_size(data: bytes) -> tuple[int, int]:
    """Read width and height of the pictures to which a stored member's boxes belong.

    Raises:
        DecodeError: the member does not declare a valid size.
    """
    content = _content(data)
    size = (content.get("width"), content.get("height"))
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise DecodeError(f"its pictures are of {size[0]!r} x {size[1]!r} pixels")
    return int(size[0] or 0), int(size[1] or 0)


def _content(data: bytes) -> dict[str, Any]:
    try:
        return JsonObject.parse(data).unchecked()
    except ValueError as error:
        raise DecodeError(f"not a JSON object: {error}") from None


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == NUM_VALUES
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in box)
    )


def _view_boxes(frames: np.ndarray, settings: DetectionsInput, view: View) -> np.ndarray:
    """Return a view's boxes, float32 (F, boxes, 6)."""
    times_F = view.times_F
    if len(times_F) != settings.num_frames:
        times_F = (np.arange(settings.num_frames) + 0.5) / settings.num_frames
    boxes: np.ndarray = frames[floor_places(times_F * len(frames), len(frames))]
    if view.flip:
        is_box = boxes[..., 4] > 0
        boxes[is_box, 0], boxes[is_box, 2] = 1 - boxes[is_box, 2], 1 - boxes[is_box, 0]
    return boxes


DECODER = DetectionsDecoder()
