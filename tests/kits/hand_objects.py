"""Hand-object detections as published: written by protobuf's own library by their schema, and pickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from karmma_dist.modalities.detections import HAND

_TYPES = {"float": 2, "int32": 5, "string": 9}
"""Numbers of types in protobuf's descriptors; 11 is a message."""
SCHEMA = {
    "FloatVector": ("float x", "float y"),
    "BBox": ("float left", "float top", "float right", "float bottom"),
    "HandDetection": ("BBox bbox", "float score", "int32 state", "FloatVector object_offset", "int32 side"),
    "ObjectDetection": ("BBox bbox", "float score"),
    "Detections": (
        "string video_id", "int32 frame_number", "repeated HandDetection hands", "repeated ObjectDetection objects",
    ),
}  # fmt: skip
"""Fields of every message, numbered from 1 (`types.proto`); enumerations are int32 on the wire."""

Box = Sequence[float]
"""x0, y0, x1, y1, category, score."""


def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="types.proto", package="model.detections", syntax="proto3")
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for number, declaration in enumerate(fields, start=1):
            *repeated, kind, field_name = declaration.split()
            field = message.field.add(name=field_name, number=number, label=3 if repeated else 1)
            field.type = _TYPES.get(kind, 11)
            if kind not in _TYPES:
                field.type_name = f".model.detections.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"model.detections.{name}")) for name in SCHEMA
    }


MESSAGES = _message_classes()
"""Protobuf's own classes of the messages, by name."""


def frame_message(video: str, number: int, boxes: Sequence[Box] = ()) -> bytes:
    """Return the message of one frame; hands hold what a detector says of them, too."""
    frame = MESSAGES["Detections"](video_id=video, frame_number=number)
    for x0, y0, x1, y1, category, score in boxes:
        detection = frame.hands.add() if category == HAND else frame.objects.add()
        detection.score = score
        detection.bbox.MergeFrom(MESSAGES["BBox"](left=x0, top=y0, right=x1, bottom=y1))
        if category == HAND:
            detection.state, detection.side = 3, 1
            detection.object_offset.MergeFrom(MESSAGES["FloatVector"](x=-0.25, y=0.125))
    return bytes(frame.SerializeToString())


def write_hand_objects(root: Path, video: str, frames: Mapping[int, Sequence[Box]], protocol: int = 3) -> Path:
    """Write a recording's pickle where the official download script puts it."""
    path = root / "EPIC-KITCHENS" / video.split("_")[0] / "hand-objects" / f"{video}.pkl"
    path.parent.mkdir(parents=True, exist_ok=True)
    messages = [frame_message(video, number, boxes) for number, boxes in frames.items()]
    path.write_bytes(pickle.dumps(messages, protocol=protocol))
    return path


def stored(boxes: Sequence[Box]) -> list[list[float]]:
    """Return a frame's boxes as members hold them: in float32, rounded, hands first, then by score."""
    rounded = [[round(float(np.float32(value)), 5) for value in box] for box in boxes]
    return sorted(rounded, key=lambda box: (box[4], -box[5]))
