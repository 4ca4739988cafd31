"""Reads messages in protobuf's wire format by a schema, and refuses what the schema does not have.

    BOX = {1: Field("left", Kind.FLOAT), 2: Field("right", Kind.FLOAT)}
    parse_message(data, BOX)            # {"left": 0.25, "right": 0.5}

Format: https://protobuf.dev/programming-guides/encoding. As in proto3, a number or text that is missing is 0 or empty.
A message inside of another is returned as its bytes. `walk_fields` finds fields of large messages without a schema.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10
_INT32 = range(-(1 << 31), 1 << 31)


class Kind(Enum):
    """The type of a field."""

    INT32 = "int32"
    """Also an enumeration."""
    FLOAT = "float"
    STRING = "string"
    MESSAGE = "message"


_WIRE_TYPES = {Kind.INT32: _VARINT, Kind.FLOAT: _FIXED32, Kind.STRING: _LENGTH, Kind.MESSAGE: _LENGTH}
_DEFAULTS = {Kind.INT32: 0, Kind.FLOAT: 0.0, Kind.STRING: "", Kind.MESSAGE: None}


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message."""

    name: str
    kind: Kind
    is_repeated: bool = False


Schema = Mapping[int, Field]
"""Fields of a message by their numbers."""


def parse_message(data: bytes, schema: Schema) -> dict[str, Any]:
    """Return the fields of a message by name: int, float, str or bytes; None for a missing message, a list if repeated.

    Raises:
        ValueError: the message is cut, has a field that the schema lacks or gives another type, or has one twice that
            is not repeated.
    """
    values: dict[str, Any] = {f.name: [] if f.is_repeated else _DEFAULTS[f.kind] for f in schema.values()}
    seen: set[int] = set()
    place = 0
    while place < len(data):
        start = place
        tag, place = _varint(data, place)
        number, wire_type = tag >> 3, tag & 7
        field = schema.get(number)
        if field is None:
            raise ValueError(f"byte {start}: unknown field {number}")
        if wire_type != _WIRE_TYPES[field.kind]:
            raise ValueError(f"byte {start}: {field.name} is of wire type {wire_type}, not {field.kind.value}")
        value, place = _value(data, place, field)
        if field.is_repeated:
            values[field.name].append(value)
            continue
        if number in seen:
            raise ValueError(f"byte {start}: {field.name} occurs twice")
        seen.add(number)
        values[field.name] = value
    return values


def walk_fields(data: bytes, place: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field of a message, and where its value starts and stops, without a schema.

    Args:
        data: Bytes that hold the message.
        place: Start of the message.
        stop: End of the message; None: that of the bytes.

    Raises:
        ValueError: the message is cut, or has something else than fields.
    """
    stop = len(data) if stop is None else stop
    while place < stop:
        begin = place
        tag, start = _varint(data, place)
        wire_type, place = tag & 7, start
        if wire_type == _VARINT:
            _, place = _varint(data, start)
        elif wire_type == _LENGTH:
            length, start = _varint(data, start)
            place = start + length
        elif wire_type in _SIZES:
            place = start + _SIZES[wire_type]
        else:
            raise ValueError(f"byte {begin}: not a field")
        if place > stop:
            raise ValueError(f"byte {begin}: a field is cut")
        yield tag >> 3, start, place


def _value(data: bytes, place: int, field: Field) -> tuple[Any, int]:
    """Return the value of a field and the place after it."""
    if field.kind is Kind.INT32:
        number, stop = _varint(data, place)
        number -= (number >> 63) << 64
        if number not in _INT32:
            raise ValueError(f"byte {place}: {field.name} {number} does not fit 32 bits")
        return number, stop
    length, start = (4, place) if field.kind is Kind.FLOAT else _varint(data, place)
    stop = start + length
    if stop > len(data):
        raise ValueError(f"byte {place}: {field.name} is cut")
    if field.kind is Kind.FLOAT:
        return struct.unpack_from("<f", data, start)[0], stop
    content = data[start:stop]
    if field.kind is Kind.MESSAGE:
        return content, stop
    try:
        return content.decode(), stop
    except UnicodeDecodeError:
        raise ValueError(f"byte {place}: {field.name} is not UTF-8") from None


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return an unsigned number of up to 64 bits and the place after it."""
    number = 0
    for count in range(_LONGEST_VARINT):
        if place + count >= len(data):
            raise ValueError(f"byte {place}: a number is cut")
        byte = data[place + count]
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            if number >> 64:
                break
            return number, place + count + 1
    raise ValueError(f"byte {place}: a number has more than 64 bits")
