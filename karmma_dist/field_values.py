"""Values of fields in typed YAML: what is written becomes what the field holds, and no number or text is absurd.

    time: 12:00:00      a text field gets the text that is written, be it a date, a number or `yes`
    epochs: 010         a number field takes decimal numbers, also in quotes: no bool, octal, hexadecimal, infinity
    epochs: 10**30      whole numbers have at most nine digits, unless the field itself sets a bound

`settings.Settings` applies this to every field of every section.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Le, Lt
from pydantic import AfterValidator, ByteSize, Field
from pydantic.fields import FieldInfo

from karmma_dist.errors import URL, quoted
from karmma_dist.io.yaml_file import Plain, parse_number, plain_values

MOST = 10**9
"""Largest whole number, and largest other number, of a field that sets no bound."""
_MOST_EXACT = 2**53
"""Largest whole number in fields of any type, whose meaning others know."""
_MOST_BYTES = 10**18
"""Largest number of bytes, e.g. of `200 GB`."""
_MOST_TEXT = 10_000
"""Characters of a text."""
_MOST_PATH_BYTES, _MOST_PART_BYTES = 2_500, 255
"""Bytes of a path, below Linux' 4,096 with names to come, and of one name in it."""

Positive = Annotated[int, Field(gt=0, le=10**6)]
"""A number of things, of which a million would be absurd."""
Seconds = Annotated[float, Field(ge=0, le=10**6)]
"""A time to wait, of at most eleven days: longer ones exceed what poll(2) takes."""

_NUMBERS: tuple[Any, ...] = (int, float, ByteSize)
_SIZE = re.compile(r"(?:0|[1-9][0-9]{0,20})(?:\.[0-9]{1,20})? ?[A-Za-z]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ZEROS = re.compile(r"([-+]?)0+([0-9]+)")
_UNDERSCORES = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)+")
_OTHER_BASES = re.compile(r"0[xX][0-9a-fA-F]{1,15}|0[oO][0-7]{1,15}|0[bB][01]{1,60}")
_NOT_FINITE = re.compile(r"[-+]?\.?(?:inf|infinity|nan)|[-+]?[0-9.]+e\+?[0-9]+", re.IGNORECASE)


def expand_home(path: str) -> str:
    """Return a path, or URL, in which `~` or `~USER` at the beginning is replaced by that home folder.

    Raises:
        ValueError: the path is empty or too long, or no file can have that name.
    """
    if URL.match(path):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"no home folder of {quoted(expanded.partition('/')[0])} is known: write ./~... for a file")
    try:
        name = expanded.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raise ValueError("no file can have this name") from None
    if not name:
        raise ValueError("an empty path: name a file or folder")
    if len(name) > _MOST_PATH_BYTES or any(len(part) > _MOST_PART_BYTES for part in name.split(b"/")):
        raise ValueError(f"too long for a path: {_MOST_PATH_BYTES:,} bytes, {_MOST_PART_BYTES} from one / to the next")
    return expanded


_IS_PATH = AfterValidator(expand_home)
PathText = Annotated[str, _IS_PATH]
"""A path, or what else names a file or folder: `~` is expanded."""


def fitted(value: Any, annotation: Any) -> Any:
    """Return a parsed value as a field of this type takes it; values of sections inside stay as they are.

    Raises:
        ValueError: the field holds a number, and the value is none, or none that everyone reads alike.
    """
    members = _members(annotation)
    if NoneType in members and (value is None or (isinstance(value, Plain) and value.value is None)):
        return None
    kinds = [member for member in members if member is not NoneType]
    kind = kinds[0] if len(kinds) == 1 else Any
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(value, Plain):
        if origin is Literal and all(isinstance(choice, str) for choice in arguments):
            kind = str
        if kind is str and value.value is not None:
            return value.text
        value = value.value
    if kind in _NUMBERS or (origin is Literal and not any(isinstance(choice, str) for choice in arguments)):
        return _as_number(value, kind)
    if isinstance(value, list | tuple) and origin in (list, tuple):
        types = [arguments[0]] * len(value) if origin is list or arguments[1:] == (...,) else [*arguments]
        return [fitted(entry, types[i] if i < len(types) else Any) for i, entry in enumerate(value)]
    if isinstance(value, dict) and origin is dict:
        return {key: fitted(entry, arguments[1]) for key, entry in value.items()}
    return value if hasattr(kind, "model_fields") else plain_values(value)


def check_sane(value: Any, field: FieldInfo) -> None:
    """Refuse what no field can mean: infinities, numbers beyond all bounds, texts of pages, NUL, halves of characters.

    Raises:
        ValueError: the value, or one inside of its lists and dictionaries, is such.
    """
    types = [field.metadata, *_parts(field.annotation)]
    most = _MOST_BYTES if ByteSize in types else _MOST_EXACT if Any in types else MOST
    has_bound = any(isinstance(mark, Le | Lt) for marks in types if isinstance(marks, list) for mark in marks)
    is_path = any(_IS_PATH in marks for marks in types if isinstance(marks, list))
    for entry in entries(value):
        if isinstance(entry, float) and not math.isfinite(entry):
            raise ValueError("must be a finite number")
        if isinstance(entry, int | float) and not has_bound and abs(entry) > most:
            raise ValueError(f"must be between -{most:,} and {most:,}")
        if isinstance(entry, str):
            _check_text(entry, is_path)


def _check_text(text: str, is_path: bool) -> None:
    if len(text) > _MOST_TEXT:
        raise ValueError(f"a text of {len(text):,} characters: at most {_MOST_TEXT:,}")
    if "\0" in text:
        raise ValueError("a text with the character NUL: remove it")
    if not is_path and _SURROGATE.search(text):
        raise ValueError("a text with half of a character (a surrogate): it is no Unicode")


def _as_number(value: Any, kind: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if not isinstance(value, str):
        return value
    text = value.strip(" ")
    number = parse_number(text)
    if number is not None:
        return number
    if kind is ByteSize and _SIZE.fullmatch(text):
        return text
    raise ValueError(f"expected a number{_hint(text)}")


def _hint(text: str) -> str:
    """Return advice for a text that some programs read as a number."""
    if len(text) > 80:
        return ""
    if match := _ZEROS.fullmatch(text):
        plain = match[1] + (match[2].lstrip("0") or "0")
        octal = f", or {match[1]}{int(match[2], 8)} if it is octal" if not set(match[2]) & set("89") else ""
        return f" without leading zeros: write {plain}{octal}"
    if _UNDERSCORES.fullmatch(text):
        return f" without underscores: write {text.replace('_', '')}"
    if _OTHER_BASES.fullmatch(text):
        return f" in decimal: write {int(text, 0)}"
    return ", and a finite one" if _NOT_FINITE.fullmatch(text) else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, without marks; a type alone is its own member."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(member for argument in get_args(annotation) for member in _members(argument))
    return (annotation,)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield every type inside a type, and lists of their marks."""
    yield annotation
    if get_origin(annotation) is Annotated:
        marks = get_args(annotation)[1:]
        yield [*marks, *(inner for mark in marks if isinstance(mark, FieldInfo) for inner in mark.metadata)]
        yield from _parts(get_args(annotation)[0])
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from _parts(argument)


def entries(value: Any) -> Iterator[Any]:
    """Yield the values inside of lists and dictionaries; keys are names, which their fields check."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from entries(entry)
    else:
        yield value
