"""Fields of parsed JSON, each checked where it is read: every error names the field by its path in the file.

    fields = JsonObject.parse(b'{"splits": {"train": {"clips": -1}}}')
    fields.nested("splits").nested("train").whole("clips")  # ValueError: splits.train.clips is -1
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from karmma_dist.io.files import MOST_BYTES, read_file

_MOST = 2**63
"""Whole numbers from here on are no size, place or class, and may be too large for a float."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def shown(value: Any) -> str:
    """Return a value as error messages show it: its repr, shortened."""
    return reprlib.repr(value)


def strict_decoder() -> json.JSONDecoder:
    """Return a decoder for files that other people wrote.

    It raises ValueError for a name that occurs twice in an object, a number that is not finite or has more than 300
    digits, and a text that is no Unicode (half of a surrogate pair).
    """
    return _decoder(_refuse_constant)


def _decoder(parse_constant: Callable[[str], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_unique, parse_constant=parse_constant, parse_int=_int, parse_float=_float
    )


def parse_strictly(content: bytes | str, *, with_gaps: bool = False) -> Any:
    """Parse JSON with `strict_decoder`; bytes must be UTF-8 without a byte order mark.

    Args:
        content: The JSON.
        with_gaps: True to read NaN, Infinity and -Infinity, which are no JSON, as null: so Python's json writes
            measured values that are not finite.

    Raises:
        ValueError: the content is not JSON, or the decoder refuses it.
    """
    try:
        decoder = _decoder(_gap) if with_gaps else strict_decoder()
        value = decoder.decode(content if isinstance(content, str) else content.decode())
        _check_texts([value])
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def read_json(path: Path, limit: int = MOST_BYTES, *, with_gaps: bool = False) -> JsonObject:
    """Read a file that holds one JSON object, with `parse_strictly`.

    Args:
        path: Path of the file.
        limit: Largest number of bytes that such a file may have.
        with_gaps: True to read NaN, Infinity and -Infinity as null.

    Raises:
        OSError: the file does not exist, cannot be read, is larger, or is no regular file.
        ValueError: its content is not a JSON object, or `parse_strictly` refuses it.
    """
    return JsonObject(parse_strictly(read_file(path, limit), with_gaps=with_gaps))


def parse_list(text: str) -> Iterator[Any]:
    """Yield the values of a JSON list one by one, each parsed with `strict_decoder`.

    Raises:
        ValueError: the text is not a list, or the decoder refuses the next value, which no other follows.
    """
    decoder = strict_decoder()
    place = _after_space(text, 0)
    if text[place : place + 1] != "[":
        raise ValueError("expected a JSON list")
    place = _after_space(text, place + 1)
    closed = text[place : place + 1] == "]"
    while not closed:
        try:
            value, place = decoder.raw_decode(text, place)
            _check_texts([value])
        except RecursionError:
            raise ValueError("nested too deeply") from None
        yield value
        place = _after_space(text, place)
        if text[place : place + 1] not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        closed = text[place] == "]"
        place = place if closed else _after_space(text, place + 1)
    if _after_space(text, place + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, place + 1)


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return place if match is None else match.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{shown(twice)} occurs twice in an object")
    _check_texts([*fields, *fields.values()])
    return fields


def _check_texts(values: list[Any]) -> None:
    for value in values:
        if isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
            raise ValueError(f"{shown(value)} is not a Unicode text: it has half of a surrogate pair")
        if isinstance(value, list):
            _check_texts(value)


def _gap(_: str) -> None:
    return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _int(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large a number")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else _unique(pairs)


_QUICK = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_float)
_QUICK_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique_names, parse_constant=_refuse_constant, parse_float=_float)


class JsonObject:
    """An object of parsed JSON. Iterating over it gives the names of its fields.

    Every method that returns a field raises ValueError where the field is missing or is of another type. A bool is
    not a number.

    Attributes:
        path: Path of the object in the file, e.g. `splits.train.shards[3]`; empty for the whole file.

    Raises:
        ValueError: the value is not an object.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{path or 'the content'} is {shown(value)}, not an object")
        self.path, self._values = path, value

    @classmethod
    def parse(cls, content: bytes | str, *, may_repeat: bool = False) -> JsonObject:
        """Parse the content of a file like `parse_strictly`, in half of its time.

        Numbers of 300 to 4,300 digits pass here; `whole` and `number` refuse them.

        Args:
            content: The JSON.
            may_repeat: True to take the last of fields of the same name, which saves a tenth of the time.

        Raises:
            ValueError: the content is not a JSON object, or `parse_strictly` refuses it.
        """
        text = content if isinstance(content, str) else content.decode()
        if _ESCAPED_SURROGATE.search(text) or (not text.isascii() and _SURROGATE.search(text)):
            return cls(parse_strictly(text))
        try:
            return cls((_QUICK if may_repeat else _QUICK_UNIQUE).decode(text))
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def path_of(self, name: str) -> str:
        """Return the path of a field in the file."""
        return f"{self.path}.{name}" if self.path else name

    def value(self, name: str) -> Any:
        """Return a field of any type."""
        if name not in self._values:
            raise ValueError(f"{self.path_of(name)} is missing")
        return self._values[name]

    def is_null(self, name: str) -> bool:
        """Return True if a field is null."""
        return self.value(name) is None

    def text(self, name: str, pattern: re.Pattern[str] | None = None) -> str:
        """Return a string, which must match the pattern as a whole where one is given."""
        value = self.value(name)
        if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
            raise self.problem(name)
        return value

    def whole(self, name: str) -> int:
        """Return a whole number that is not negative, below 2^63."""
        value = self.value(name)
        if type(value) is not int or not 0 <= value < _MOST:
            raise self.problem(name)
        return value

    def whole_or_null(self, name: str) -> int | None:
        """Return a whole number that is not negative, or None where the field is null."""
        return None if self.is_null(name) else self.whole(name)

    def number(self, name: str) -> int | float:
        """Return a finite number."""
        value = self.value(name)
        if (type(value) is int and abs(value) < _MOST) or (isinstance(value, float) and math.isfinite(value)):
            return value
        raise self.problem(name)

    def nested(self, name: str) -> JsonObject:
        """Return an object."""
        return JsonObject(self.value(name), self.path_of(name))

    def items(self, name: str) -> list[Any]:
        """Return a list of any values."""
        value = self.value(name)
        if not isinstance(value, list):
            raise self.problem(name)
        return value

    def objects(self, name: str) -> list[JsonObject]:
        """Return a list of objects."""
        return [JsonObject(value, f"{self.path_of(name)}[{place}]") for place, value in enumerate(self.items(name))]

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        values = self.items(name)
        for place, value in enumerate(values):
            if not isinstance(value, str):
                raise ValueError(f"{self.path_of(name)}[{place}] is {shown(value)}")
        return list(values)

    def wholes(self, name: str) -> list[int]:
        """Return a list of whole numbers that are not negative."""
        values = self.items(name)
        for place, value in enumerate(values):
            if type(value) is not int or not 0 <= value < _MOST:
                raise ValueError(f"{self.path_of(name)}[{place}] is {shown(value)}")
        return list(values)

    def others(self, *known: str) -> dict[str, Any]:
        """Return the fields that are not among the known ones."""
        return {name: value for name, value in self._values.items() if name not in known}

    def unchecked(self) -> dict[str, Any]:
        """Return all fields as they are."""
        return dict(self._values)

    def problem(self, name: str) -> ValueError:
        """Return the error that names a field and shows its value."""
        return ValueError(f"{self.path_of(name)} is {shown(self._values.get(name))}")
