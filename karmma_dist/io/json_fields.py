"""Fields of parsed JSON, each checked where it is read: every error names the field by its path in the file.

    fields = JsonObject.parse(b'{"splits": {"train": {"clips": -1}}}')
    fields.nested("splits").nested("train").whole("clips")  # ValueError: splits.train.clips is -1
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator
from typing import Any


def shown(value: Any) -> str:
    """Return a value as error messages show it: its repr, shortened."""
    return reprlib.repr(value)


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
    def parse(cls, content: bytes | str) -> JsonObject:
        """Parse the content of a file.

        Raises:
            ValueError: the content is not a JSON object.
        """
        try:
            return cls(json.loads(content))
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
        """Return a whole number that is not negative."""
        value = self.value(name)
        if type(value) is not int or value < 0:
            raise self.problem(name)
        return value

    def whole_or_null(self, name: str) -> int | None:
        """Return a whole number that is not negative, or None where the field is null."""
        return None if self.is_null(name) else self.whole(name)

    def number(self, name: str) -> int | float:
        """Return a finite number."""
        value = self.value(name)
        if type(value) is int or (isinstance(value, float) and math.isfinite(value)):
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
            if type(value) is not int or value < 0:
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
