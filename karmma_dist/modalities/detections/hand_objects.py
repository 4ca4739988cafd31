"""Detections of hands and of the objects they touch, published for Epic-Kitchens-100: a pickle per recording.

The pickle is a list of bytes, each a protobuf message with a frame's number and boxes. Frames are numbered as the
recording's numbered frames, from 1 at its nominal rate. A box has left, top, right and bottom as fractions of the
picture, and a score; what else is known of a hand (side, state, offset of its object) is not stored.
Format: https://github.com/epic-kitchens/epic-kitchens-100-hand-object-bboxes, `types.proto`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from karmma_dist.io.files import read_file
from karmma_dist.io.json_fields import shown
from karmma_dist.io.plain_pickle import read_bytes_list
from karmma_dist.io.protobuf import Field, Kind, parse_message
from karmma_dist.modalities.detections import HAND, OBJECT
from karmma_dist.modalities.file_type import unusable_type
from karmma_dist.modalities.numbered_frames import FrameNumbers
from karmma_dist.modalities.recording import MediaError, media_error

PICTURE_SIZE = (456, 256)
"""Width and height in pixels of the pictures that the detector saw."""

_MOST_BYTES = 1 << 29
"""Bytes of a recording's pickle."""
_MOST_BOXES = 1000
"""Boxes of a frame."""

_BOX = {number: Field(side, Kind.FLOAT) for number, side in enumerate(("left", "top", "right", "bottom"), start=1)}
_OBJECT_FIELDS = {1: Field("bbox", Kind.MESSAGE), 2: Field("score", Kind.FLOAT)}
_HAND_FIELDS = {
    **_OBJECT_FIELDS,
    3: Field("state", Kind.INT32), 4: Field("object_offset", Kind.MESSAGE), 5: Field("side", Kind.INT32),
}  # fmt: skip
_FRAME = {
    1: Field("video_id", Kind.STRING), 2: Field("frame_number", Kind.INT32),
    3: Field("hands", Kind.MESSAGE, is_repeated=True), 4: Field("objects", Kind.MESSAGE, is_repeated=True),
}  # fmt: skip


class HandObjects(FrameNumbers):
    """The detections of one recording.

    Args:
        path: The pickle.
        recording: Name of the recording, which every frame must repeat.

    Raises:
        MediaError: the file cannot be read, is no pickled list of bytes, or has a frame of another format or
            recording, a frame twice, or none.
    """

    def __init__(self, path: Path, recording: str) -> None:
        self.path, self.modality = path, "detections"
        self._messages: dict[int, bytes] = {}
        try:
            for place, message in enumerate(read_bytes_list(_content(path))):
                self._add(place, message, recording)
            if not self._messages:
                raise ValueError("has no frame")
        except OSError as error:
            problem = f"{path.name}: cannot be read: {error.strerror or error}"
            raise media_error(error, self.modality, "open", problem) from None
        except ValueError as error:
            raise MediaError(self.modality, "open", f"{path.name}: not a pickle of detections: {error}") from None
        self.first, self.last = min(self._messages), max(self._messages)

    def _add(self, place: int, message: bytes, recording: str) -> None:
        try:
            frame = parse_message(message, _FRAME)
        except ValueError as error:
            raise ValueError(f"entry {place}: {error}") from None
        number = frame["frame_number"]
        if frame["video_id"] != recording:
            raise ValueError(f"entry {place} is of recording {shown(frame['video_id'])}")
        if number < 1:
            raise ValueError(f"entry {place} is of frame {number}: frames are numbered from 1")
        if number in self._messages:
            raise ValueError(f"entry {place} is of frame {number}, which has one before")
        if len(frame["hands"]) + len(frame["objects"]) > _MOST_BOXES:
            raise ValueError(f"entry {place} has more than {_MOST_BOXES:,} boxes")
        self._messages[number] = message

    def boxes(self, number: int) -> list[list[float]]:
        """Return the boxes of a frame, x0, y0, x1, y1 in [0, 1], category and score, without those that have no area.

        Raises:
            MediaError: the frame is missing, or a box lies outside of the picture or is of another format.
        """
        message = self._messages.get(number)
        if message is None:
            raise MediaError(self.modality, "parse", f"{self.path.name}: frame {number} is missing")
        try:
            frame = parse_message(message, _FRAME)
            hands = (_box(parse_message(hand, _HAND_FIELDS), HAND) for hand in frame["hands"])
            objects = (_box(parse_message(entry, _OBJECT_FIELDS), OBJECT) for entry in frame["objects"])
            return [box for box in itertools.chain(hands, objects) if box[0] < box[2] and box[1] < box[3]]
        except ValueError as error:
            raise MediaError(self.modality, "parse", f"{self.path.name}: frame {number}: {error}") from None


def _content(path: Path) -> bytes:
    """Return the content of a pickle.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is of another type, or too large.
    """
    if problem := unusable_type(path):
        raise ValueError(problem)
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES:,} bytes")
    return read_file(path, _MOST_BYTES)


def _box(detection: dict[str, object], category: int) -> list[float]:
    """Return a stored box, rounded as those of other formats.

    Raises:
        ValueError: the box has no corners, or a value is not in [0, 1].
    """
    corners, score = detection["bbox"], detection["score"]
    if not isinstance(corners, bytes) or not isinstance(score, float):
        raise ValueError("a box has no corners")
    values = [*parse_message(corners, _BOX).values(), score]
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"a box has values that are not in [0, 1]: {', '.join(f'{value:g}' for value in values)}")
    x0, y0, x1, y1, score = (round(value, 5) for value in values)
    if x1 < x0 or y1 < y0:
        raise ValueError(f"a box ends before it starts: {x0:g}, {y0:g} to {x1:g}, {y1:g}")
    return [x0, y0, x1, y1, category, score]
