"""Pickles of lists of bytes are read, whatever wrote them; all others are refused in one line, and none is run."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.io import plain_pickle
from karmma_dist.io.plain_pickle import read_bytes_list
from kits.fuzzing import cases

PROTOCOLS = range(3, pickle.HIGHEST_PROTOCOL + 1)


@given(entries=st.lists(st.binary(max_size=400), max_size=30), repeated=st.integers(0, 3))
def test_every_protocol_that_has_bytes_gives_the_list_back(entries: list[bytes], repeated: int) -> None:
    entries = entries + entries[:1] * repeated  # the same object again, to which pickles refer
    for protocol in PROTOCOLS:
        assert read_bytes_list(pickle.dumps(entries, protocol)) == entries
        file = io.BytesIO()
        pickle._Pickler(file, protocol).dump(entries)  # type: ignore[attr-defined]  # the one written in Python
        assert read_bytes_list(file.getvalue()) == entries


def test_long_lists_and_entries_are_read_in_their_batches() -> None:
    entries = [b"%d" % number for number in range(3000)] + [bytes(300), bytes(1 << 17)]
    for protocol in PROTOCOLS:
        assert read_bytes_list(pickle.dumps(entries, protocol)) == entries


class Running:
    """A value whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


class Asking(pickle.Pickler):
    """A pickler that leaves every bytes object to whoever reads the pickle."""

    def persistent_id(self, obj: Any) -> Any:
        return "elsewhere" if isinstance(obj, bytes) else None


def asking(protocol: int) -> bytes:
    file = io.BytesIO()
    Asking(file, protocol).dump([b"a"])
    return file.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "made"
    for value in (Running(folder), [Running(folder)], [b"a", Running(folder)]):
        content = pickle.dumps(value, protocol)
        with pytest.raises(ValueError, match=r"byte \d+: instruction \w+ makes no list of bytes: it is not run"):
            read_bytes_list(content)
        assert not folder.exists()
    pickle.loads(pickle.dumps(Running(folder), protocol))
    assert folder.exists()  # what was refused does run elsewhere


REFUSED = {
    "empty": b"",
    "text": b"frame,x0,y0\n1,0,0\n",
    "json": b'[{"frame": 1}]',
    "dictionary": pickle.dumps({1: b"a"}),
    "text in it": pickle.dumps(["a"]),
    "number": pickle.dumps(3),
    "bytes alone": pickle.dumps(b"a"),
    "nested": pickle.dumps([[b"a"]]),
    "tuple": pickle.dumps((b"a", b"b")),
    "bytearray": pickle.dumps([bytearray(b"a")]),
    "set": pickle.dumps({b"a"}),
    "array": pickle.dumps([np.zeros(3)]),
    "ordered dictionary": pickle.dumps(collections.OrderedDict(a=b"a")),
    "buffer out of band": pickle.dumps([pickle.PickleBuffer(b"abc")], 5, buffer_callback=lambda _: None),
    "persistent, text": asking(0),
    "persistent": asking(4),
    "instance": b"(ios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "cut": pickle.dumps([b"abc"] * 3)[:-4],
    "cut inside an entry": pickle.dumps([bytes(1000)], 3)[:500],
    "no end": b"\x80\x03]q\x00",
    "rest": pickle.dumps([b"a"]) + b"rest",
    "two pickles": pickle.dumps([b"a"]) * 2,
    "unknown protocol": b"\x80\x63].",
    "unknown instruction": b"\x80\x03]\xff.",
    "list in itself": b"\x80\x03]q\x00h\x00a.",
    "append to bytes": b"\x80\x03C\x01aC\x01ba.",
    "append to nothing": b"\x80\x03a.",
    "no mark": b"\x80\x03]C\x01ae.",
    "memo that is not there": b"\x80\x03]h\x07a.",
    "nothing to store": b"\x80\x03q\x00].",
    "nothing to return": b"\x80\x03.",
}
BOMBS = {
    "memo": b"\x80\x03]r" + struct.pack("<I", 0x7FFFFFFF) + b".",
    "largest memo": b"\x80\x03]r" + struct.pack("<I", 0xFFFFFFFF) + b".",
    "bytes of 2 GB": b"\x80\x03]B" + struct.pack("<I", 0x7FFFFFFF) + b"a.",
    "bytes of 2^62": b"\x80\x04]\x8e" + struct.pack("<Q", 1 << 62) + b"a.",
    "bytes of 2^64 - 1": b"\x80\x04]\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"a.",
    "frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"].",
    "frame of 2^64 - 1": b"\x80\x04\x95" + struct.pack("<Q", (1 << 64) - 1) + b"].",
    "integer of 2^31 bytes": b"\x80\x03\x8b" + struct.pack("<I", 0x7FFFFFFF) + b"a.",
    "integer of many digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "bytearray of 2^62": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"a.",
    "deep": b"\x80\x03" + b"]" * 10_000 + b"a" * 9_999 + b".",
    "tuples of tuples": b"\x80\x03)" + b"2\x86" * 1000 + b".",
}


@pytest.mark.parametrize("content", [*REFUSED.values(), *BOMBS.values()], ids=[*REFUSED, *BOMBS])
def test_everything_else_is_refused_in_one_line_and_little_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"\S") as caught:
            read_bytes_list(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200
    assert peak < 20 * len(content) + 10_000_000


def test_too_many_instructions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = pickle.dumps([b"a"] * 20, 3)
    monkeypatch.setattr(plain_pickle, "_MOST_INSTRUCTIONS", 20)
    with pytest.raises(ValueError, match="has more than 20 instructions"):
        read_bytes_list(content)


def test_a_damaged_pickle_gives_bytes_or_one_line() -> None:
    entries = [bytes([number]) * number for number in range(40)]
    originals = [pickle.dumps(entries, protocol) for protocol in PROTOCOLS]
    problems = []
    for seed in cases(1500):
        random = np.random.default_rng(seed)
        content = bytearray(originals[seed % len(originals)])
        for place in random.integers(0, len(content), random.integers(1, 4)):
            content[place] = random.integers(256)
        try:
            assert all(type(entry) is bytes for entry in read_bytes_list(bytes(content)))
        except ValueError as error:
            problems.append(str(error))
    assert len(problems) > 100
    assert all(problem.isprintable() for problem in problems)
