"""Messages are read as protobuf's own library reads them, or refused where they are not exactly of the schema."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.io.protobuf import Field, Kind, parse_message
from kits.fuzzing import cases
from kits.hand_objects import MESSAGES, SCHEMA, frame_message

KINDS = {"float": Kind.FLOAT, "int32": Kind.INT32, "string": Kind.STRING}
FLOATS = st.floats(width=32, allow_nan=False)
INTS = st.integers(-(2**31), 2**31 - 1)


def schema(name: str) -> dict[int, Field]:
    """Return the published schema of a message in our form."""
    fields = {}
    for number, declaration in enumerate(SCHEMA[name], start=1):
        *repeated, kind, field_name = declaration.split()
        fields[number] = Field(field_name, KINDS.get(kind, Kind.MESSAGE), bool(repeated))
    return fields


def theirs(message: Any, name: str) -> dict[str, Any]:
    """Return what protobuf's own library reads, in our form."""
    values: dict[str, Any] = {}
    for field in schema(name).values():
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = [entry.SerializeToString() for entry in value]
        elif field.kind is Kind.MESSAGE:
            values[field.name] = value.SerializeToString() if message.HasField(field.name) else None
        else:
            values[field.name] = value
    return values


@settings(max_examples=50)
@given(video=st.text(max_size=20), number=INTS, boxes=st.lists(st.tuples(*[FLOATS] * 5), max_size=4))
def test_messages_are_read_as_by_protobufs_own_library(video: str, number: int, boxes: list[tuple[float, ...]]) -> None:
    frame = MESSAGES["Detections"](video_id=video, frame_number=number)
    for place, (left, top, right, bottom, score) in enumerate(boxes):
        detection = (frame.hands if place % 2 else frame.objects).add(score=score)
        detection.bbox.left, detection.bbox.top, detection.bbox.right, detection.bbox.bottom = left, top, right, bottom
    fields = parse_message(frame.SerializeToString(), schema("Detections"))
    assert fields == theirs(frame, "Detections")
    for message, data in zip(frame.hands, fields["hands"], strict=True):
        hand = parse_message(data, schema("HandDetection"))
        assert hand == theirs(message, "HandDetection")
        if hand["bbox"]:
            assert parse_message(hand["bbox"], schema("BBox")) == theirs(message.bbox, "BBox")


def test_what_is_missing_is_zero_or_empty() -> None:
    empty = {"video_id": "", "frame_number": 0, "hands": [], "objects": []}
    assert parse_message(b"", schema("Detections")) == empty
    assert parse_message(b"", schema("ObjectDetection")) == {"bbox": None, "score": 0.0}


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\x28\x01", "byte 0: unknown field 5"),
        (b"\x00", "byte 0: unknown field 0"),
        (b"\x0d\x00\x00\x00\x00", "byte 0: video_id is of wire type 5, not string"),
        (b"\x12\x01\x61", "byte 0: frame_number is of wire type 2, not int32"),
        (b"\x0b\x0c", "byte 0: video_id is of wire type 3"),
        (b"\x0a\x05ab", "byte 1: video_id is cut"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7fab", "byte 1: video_id is cut"),
        (b"\x0a", "byte 1: a number is cut"),
        (b"\x10\xff", "byte 1: a number is cut"),
        (b"\x10" + b"\xff" * 10 + b"\x01", "byte 1: a number has more than 64 bits"),
        (b"\x10" + b"\xff" * 9 + b"\x02", "byte 1: a number has more than 64 bits"),
        (b"\x10\x80\x80\x80\x80\x08", "byte 1: frame_number 2147483648 does not fit 32 bits"),
        (b"\x0a\x01\xff", "byte 1: video_id is not UTF-8"),
        (b"\x10\x01\x10\x02", "byte 2: frame_number occurs twice"),
    ],
)
def test_what_is_not_of_the_schema_is_refused_by_its_place(data: bytes, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_message(data, schema("Detections"))


def whole(data: bytes, name: str) -> dict[str, Any]:
    """Return a message with all messages inside of it."""
    values = parse_message(data, schema(name))
    for declaration in SCHEMA[name]:
        *repeated, kind, field_name = declaration.split()
        if kind in SCHEMA and (content := values[field_name]) is not None:
            values[field_name] = [whole(each, kind) for each in content] if repeated else whole(content, kind)
    return values


def their_whole(message: Any, name: str) -> dict[str, Any]:
    """Return what protobuf's own library reads, in the same form."""
    values = theirs(message, name)
    for declaration in SCHEMA[name]:
        *repeated, kind, field_name = declaration.split()
        if kind in SCHEMA and values[field_name] is not None:
            value = getattr(message, field_name)
            values[field_name] = [their_whole(each, kind) for each in value] if repeated else their_whole(value, kind)
    return values


def test_a_damaged_message_is_refused_or_read_as_by_protobufs_own_library() -> None:
    original = frame_message("P01_101", 300, [(0.1, 0.2, 0.3, 0.4, 1, 0.9), (0.5, 0.5, 0.75, 1.0, 2, 0.01)])
    assert whole(original, "Detections") == their_whole(MESSAGES["Detections"].FromString(original), "Detections")
    num_read = 0
    for seed in cases(2000):
        random = np.random.default_rng(seed)
        data = bytearray(original[: random.integers(1, len(original) + 1)] if seed % 4 == 0 else original)
        data[random.integers(len(data))] = random.integers(256)
        try:
            values = whole(bytes(data), "Detections")
        except ValueError:
            continue
        num_read += 1
        # repr, since nan differs from itself
        assert repr(values) == repr(their_whole(MESSAGES["Detections"].FromString(bytes(data)), "Detections"))
    assert num_read > 100
