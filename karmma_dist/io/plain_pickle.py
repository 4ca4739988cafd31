"""Reads pickles that hold a list of bytes and nothing else, without running what a pickle may ask for.

A pickle is a program that can import and call anything. First its instructions are listed and not run: each must be one
of the few that make lists of bytes. Then an unpickler that can import nothing runs them. Pickles of bytes have these
instructions from protocol 3 on (https://docs.python.org/3/library/pickletools.html).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, NoReturn

from karmma_dist.errors import one_line

_ALLOWED = {
    "PROTO", "FRAME", "STOP", "EMPTY_LIST", "MARK", "APPEND", "APPENDS", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip
_MOST_INSTRUCTIONS = 1 << 22
"""Instructions of a pickle, two per entry: frames of 9 hours at 60 frames/s."""


class _BytesUnpickler(pickle.Unpickler):
    """An unpickler that refuses everything that lies outside of the pickle."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        """Refuse to import anything."""
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse to look up anything."""
        raise pickle.UnpicklingError(f"it refers to the object {pid!r} outside of it")


def read_bytes_list(content: bytes) -> list[bytes]:
    """Return the list of bytes that a pickle of protocol 3 or later holds.

    Raises:
        ValueError: the pickle is cut, holds anything else, would run code, or has too many instructions.
    """
    _check_instructions(content)
    try:
        entries = _BytesUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, ValueError) as error:
        raise ValueError(f"cannot be unpickled: {one_line(error, 100)}") from None
    if not isinstance(entries, list):
        raise ValueError(f"holds {type(entries).__name__}, not a list of bytes")
    for number, entry in enumerate(entries):
        if not isinstance(entry, bytes):
            raise ValueError(f"entry {number} is {type(entry).__name__}, not bytes")
    return entries


def _check_instructions(content: bytes) -> None:
    """Check every instruction of a pickle without running one.

    Raises:
        ValueError: an instruction is unknown, is none that makes lists of bytes, or needs more memory than its content.
    """
    place = 0
    for number, (instruction, argument, position) in enumerate(pickletools.genops(content)):
        place, size = position or 0, argument if isinstance(argument, int) else 0
        if instruction.name not in _ALLOWED:
            raise ValueError(f"byte {place}: instruction {instruction.name} makes no list of bytes: it is not run")
        # An unpickler may allot what a number announces: a frame of that size, or a table for that many values.
        limits = {"FRAME": len(content), "BINPUT": number, "LONG_BINPUT": number}
        if size > limits.get(instruction.name, size):
            raise ValueError(f"byte {place}: {instruction.name} {size:,} is larger than the pickle")
        if number == _MOST_INSTRUCTIONS:
            raise ValueError(f"has more than {_MOST_INSTRUCTIONS:,} instructions")
    if place + 1 != len(content):
        raise ValueError(f"has {len(content) - place - 1:,} bytes after its end")
