"""Fields of parsed JSON: returned as they are, or refused with their path."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from karmma_dist.io.json_fields import JsonObject

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
        (lambda: JsonObject.parse(b'{"b": NaN}').number("b"), "b is nan"),
        (lambda: JsonObject.parse(b'{"b": 1e999}').number("b"), "b is inf"),
        (lambda: JsonObject.parse(b"[]"), "the content is [], not an object"),
    ],
)
def test_other_fields_are_refused_with_their_path(read: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read()
