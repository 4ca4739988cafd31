"""Fields of parsed JSON: returned as they are, or refused with their path."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.io.files import json_bytes, json_text
from karmma_dist.io.json_fields import JsonObject, parse_list, parse_strictly, read_json

FIELDS = JsonObject.parse(
    b'{"a": {"text": "x", "whole": 3, "number": 1.5, "null": null, "texts": ["x"], "wholes": [0, 7], "objects": [{}]}}'
).nested("a")


def test_fields_of_the_right_type_are_returned() -> None:
    assert FIELDS.text("text", re.compile("[a-z]")) == "x"
    assert (FIELDS.whole("whole"), FIELDS.number("whole"), FIELDS.number("number")) == (3, 3, 1.5)
    assert (FIELDS.whole_or_null("null"), FIELDS.whole_or_null("whole")) == (None, 3)
    assert (FIELDS.texts("texts"), FIELDS.wholes("wholes")) == (["x"], [0, 7])
    assert [entry.path for entry in FIELDS.objects("objects")] == ["a.objects[0]"]
    assert FIELDS.others("text", "whole", "number", "null", "texts", "wholes") == {"objects": [{}]}


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: FIELDS.text("none"), "a.none is missing"),
        (lambda: FIELDS.text("whole"), "a.whole is 3"),
        (lambda: FIELDS.text("text", re.compile("[0-9]")), "a.text is 'x'"),
        (lambda: FIELDS.whole("number"), "a.number is 1.5"),
        (lambda: FIELDS.whole("null"), "a.null is None"),
        (lambda: FIELDS.nested("texts"), "a.texts is ['x'], not an object"),
        (lambda: FIELDS.objects("wholes"), "a.wholes[0] is 0, not an object"),
        (lambda: FIELDS.texts("wholes"), "a.wholes[0] is 0"),
        (lambda: FIELDS.wholes("texts"), "a.texts[0] is 'x'"),
        (lambda: JsonObject.parse(b'{"b": true}').number("b"), "b is True"),
        (lambda: JsonObject.parse(b'{"b": true}').whole("b"), "b is True"),
        (lambda: JsonObject.parse(b'{"b": -1}').whole("b"), "b is -1"),
        (lambda: JsonObject.parse(b'{"b": NaN}').number("b"), "NaN is not a JSON number"),
        (lambda: JsonObject.parse(b'{"b": 1e999}').number("b"), "1e999 is too large a number"),
        (lambda: JsonObject.parse(b"[]"), "the content is [], not an object"),
    ],
)
def test_other_fields_are_refused_with_their_path(read: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read()


@pytest.mark.parametrize("digits", [str(2**63), "9" * 400])
@pytest.mark.parametrize("method", ["whole", "number", "wholes"])
def test_a_number_that_no_float_or_offset_can_hold_is_refused(digits: str, method: str) -> None:
    content = f'{{"a": [{digits}]}}' if method == "wholes" else f'{{"a": {digits}}}'
    with pytest.raises(ValueError, match=r"a.* is 9"):
        getattr(JsonObject.parse(content), method)("a")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)


@given(st.lists(json_values), st.sampled_from([None, 2]))
def test_a_list_is_read_value_by_value_as_a_whole(values: list[object], indent: int | None) -> None:
    text = json.dumps(values, indent=indent)
    assert list(parse_list(text)) == parse_strictly(text) == values


@given(st.text("[]{},:\"1aeN-. \n\\u", max_size=30))
def test_a_text_is_a_list_value_by_value_if_it_is_one_as_a_whole(text: str) -> None:
    try:
        expected = parse_strictly(text)
    except ValueError:
        expected = None
    try:
        values = list(parse_list(text))
    except ValueError:
        values = None
    assert values == (expected if isinstance(expected, list) else None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": "\x01"}', "Invalid control character"),
        (b'{"a": "\xff"}', "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "invalid start byte"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1]", "not an object"),
        (b"", "Expecting value"),
    ],
    ids=["twice", "infinity", "nan", "control", "bytes", "utf16", "deep", "list", "empty"],
)
def test_a_file_that_is_no_plain_json_object_is_a_value_error(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json(path)


def test_a_file_without_an_end_or_without_a_writer_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b'{"a": 1}' + b" " * 100)
    for path, limit in ((tmp_path / "fifo", 100), (Path("/dev/zero"), 100), (tmp_path, 100), (tmp_path / "large", 100)):
        with pytest.raises(OSError, match=r"no regular file|more than 100 bytes|directory"):
            read_json(path, limit)
    assert read_json(tmp_path / "large", 108).whole("a") == 1


def outcome(read: Callable[[], Any]) -> object:
    try:
        return read()
    except ValueError:
        return "refused"


@given(json_values | st.text("[]{},:\"1aeN-. \n\\u\ud800", max_size=20), st.booleans())
def test_the_quick_parser_reads_and_refuses_what_the_strict_one_does(value: object, is_text: bool) -> None:
    content = f'{{"a": {value if is_text and isinstance(value, str) else json.dumps(value)}}}'
    strict = outcome(lambda: JsonObject(parse_strictly(content)).unchecked())
    assert outcome(lambda: JsonObject.parse(content).unchecked()) == strict


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1, "a": 2}', b'{"a": -Infinity}', b'\xef\xbb\xbf{}', '{"a": 1}'.encode("utf-16"), b'{"a": "\xff"}',
     rb'{"a": "\ud800"}', b'{"a":' * 100_000, b"[1]", b"", b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_the_quick_parser_refuses(content: bytes) -> None:
    with pytest.raises(ValueError):
        JsonObject.parse(content)


def test_numbers_that_are_not_finite_are_gaps_where_they_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": NaN, "b": [Infinity, -Infinity, 1.5]}')
    assert read_json(path, with_gaps=True).unchecked() == {"a": None, "b": [None, None, 1.5]}
    values = {"a": float("nan"), "b": (float("inf"), [{"c": -float("inf")}], 1.5, True)}
    assert json.loads(json_text(values)) == {"a": None, "b": [None, [{"c": None}], 1.5, True]}


@given(json_values)
def test_what_is_finite_is_written_as_it_always_was(value: object) -> None:
    assert json_bytes(value) == (json.dumps(value, separators=(",", ":"), ensure_ascii=False) + "\n").encode(
        errors="surrogatepass"
    )
