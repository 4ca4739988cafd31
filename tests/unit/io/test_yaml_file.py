"""The one reader of YAML: little is guessed, nothing is lost, and whatever people write is read or refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.yaml_file import (
    MOST_BYTES,
    MOST_DEPTH,
    Plain,
    parse_number,
    parse_value,
    parse_yaml,
    plain_values,
    read_yaml,
    to_yaml,
)
from kits.fuzzing import cases
from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted(path for folder in ("recipes", "shards") for path in (ROOT / folder).rglob("*.yaml"))


def value_of(text: str) -> Any:
    return plain_values(parse_yaml(text, "a.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_our_own_files_mean_what_every_reader_of_yaml_says(path: Path) -> None:
    assert plain_values(read_yaml(path)) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "text",
    [
        "12:00:00", "2-00:00:00", "0123", "010", "2024-01-01", "2024-13-45", "2024-01-01T10:00:00Z", "yes", "No", "NO",
        "on", "off", "y", "1_000", "0x10", "0o10", "0b1", ".inf", "-.Inf", ".nan", ".NaN", "inf", "nan", "1e999", "=",
        "1,000", "1:30", "tRUE", "nULL", "9" * 5000, "~/x", "<<", "--x", "1.2.3", "0.1.2", "+",
    ],
)  # fmt: skip
def test_what_looks_like_something_else_is_text(text: str) -> None:
    assert value_of(f"key: {text}") == {"key": text}
    assert value_of(f"- {text}\n- [{text}]" if "," not in text else f"- {text}")[0] == text
    assert parse_value(text, "--set") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("-3", -3), ("+3", 3), ("1e-4", 1e-4), ("1E5", 1e5), ("1.5e+3", 1500.0), (".5", 0.5), ("1.", 1.0),
        ("-0.25", -0.25), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ],
)  # fmt: skip
def test_a_word_or_decimal_number_keeps_what_is_written(text: str, value: Any) -> None:
    (parsed,) = parse_yaml(f"- {text}", "a.yaml")
    assert parsed == Plain(text, value)
    assert type(parsed.value) is type(value)
    assert value_of(f"- '{text}'\n- !!str {text}") == [text, text]
    assert parse_value(text, "--set") == parsed


REFUSED = {
    "twice": ("a: 1\nb: {c: 1}\na: 2", "line 3: the key 'a' is already in line 1"),
    "twice inside": ("a:\n  - b: 1\n    c: 2\n    b: 3", "line 4: the key 'b' is already in line 2"),
    "twice in one line": ("{a: 1, a: 1}", "line 1: the key 'a' is already in line 1"),
    "twice in quotes": ("a: 1\n'a': 1", "line 2: the key 'a'"),
    "twice by alias": ("&k a: 1\n*k : 2", "line 2: the key 'a'"),
    "two merges": ("<<: {a: 1}\n<<: {b: 1}", "line 2: the key << "),
    "merge of a number": ("<<: 3", "<< takes a section"),
    "merge of texts": ("<<: [a]", "<< takes a section"),
    "number as key": ("1: a", "the key '1' is no text"),
    "null as key": ("null: a", "the key 'null' is no text"),
    "bool as key": ("a: {true: a}", "the key 'true' is no text"),
    "no key": ("?\n: a", "a key is missing"),
    "list as key": ("[a]: b", "cannot be a key"),
    "section as key": ("? {a: b}\n: c", "cannot be a key"),
    "anchor in itself": ("a: &a [*a]", "contains itself"),
    "anchor in its section": ("&a {b: {c: *a}}", "contains itself"),
    "unknown alias": ("a: *b", "no anchor"),
    "anchor twice": ("a: &x 1\nb: &x 2", "defined twice"),
    "two documents": ("a: 1\n---\nb: 1", "line 2: another document"),
    "tab": ("a:\n\tb: 1", "line 2: found character"),
    "NUL": ("a: b\0", "U\\+0000"),
    "escape": ("a: \x1b", "U\\+001B"),
    "surrogate": ("a: \udc80", "U\\+DC80"),
    "no such character": ('a: "\\U00110000"', "not valid YAML"),
    "huge directive": (f"%YAML {'9' * 5000}.1\n--- a", "not valid YAML"),
    "unclosed": ("a: [", "not valid YAML in line 1"),
    "unclosed quote": ("a: 1\nb: 'x", "not valid YAML in line 2"),
    "deep": ("\n".join(" " * i + "a:" for i in range(300)), f"more than {MOST_DEPTH}"),
    "deep in brackets": ("[" * 3000, f"more than {MOST_DEPTH}"),
    "deep in braces": ("{a: " * 3000, f"more than {MOST_DEPTH}"),
    "deep in dashes": ("- " * 3000, f"more than {MOST_DEPTH}"),
    "deep by aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "more than 32"),
    "many values": ("- a\n" * 30_000, "more than [0-9,]+ values"),
    "laughs": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "values, aliases included",
    ),
    "laughs of merges": (
        "a0: &a0 {k0: x, j0: x}\n"
        + "".join(f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}, r: *a{i - 1}}}\n" for i in range(1, 30)),
        "values, aliases included",
    ),
    "long line": ("a: " + "x" * 10_000_000, "a line of more than 100,000 characters"),
    **{
        f"tag {tag}": (f"a: {tag}", "the tag .* is not supported")
        for tag in (
            "!!int x", "!!int 3", "!!float x", "!!timestamp 2024-99-99", "!!binary '='", "!!set {a}", "!!omap [a: 1]",
            "!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!mine x", "!!null x", "!!bool x",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_lost_or_never_ends_is_refused_in_one_line(name: str) -> None:
    text, message = REFUSED[name]
    began = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(text, "a.yaml")
    assert str(caught.value).startswith("a.yaml: ")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250
    assert time.process_time() - began < HANGS_S


def test_merge_keys_and_aliases_give_every_place_its_own_copy() -> None:
    tree = value_of("x: &x {a: 1, b: {c: 2}}\ny: {<<: *x, a: 3}\nz: {a: 4, <<: [*x, {a: 5, d: 6}]}\nw: *x")
    assert tree["y"] == {"a": 3, "b": {"c": 2}}
    assert tree["z"] == {"a": 4, "b": {"c": 2}, "d": 6}
    tree["w"]["b"]["c"] = 7
    assert tree["x"]["b"]["c"] == tree["y"]["b"]["c"] == 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_is_yaml_with_every_character(text: str) -> None:
    assert value_of(json.dumps({"a": text})) == {"a": text}


@pytest.mark.parametrize("text", ["", "# nothing", "\ufeff", "---", "null"])
def test_an_empty_file_is_null(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_bytes(text.encode())
    assert plain_values(read_yaml(tmp_path / "a.yaml")) is None


def test_a_file_is_utf8_with_any_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("\ufeffa: 1\r\nb: [\u2014, ü]\r\n".encode())
    assert plain_values(read_yaml(path)) == {"a": 1, "b": ["\u2014", "ü"]}
    for content in ("a: ü".encode("latin-1"), "a: 1".encode("utf-16"), "a: 1".encode("utf-16-le"), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"UTF-8|U\+0000"):
            read_yaml(path)


def test_no_file_that_never_ends_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MOST_BYTES + 1))
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "large.yaml"):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read_yaml(path)


def test_the_locale_does_not_change_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("a: \u2014 ü".encode())
    code = "import sys; from karmma_dist.io.yaml_file import *; print(ascii(read_yaml(Path(sys.argv[1]))['a']))"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.yaml")], env=environment, capture_output=True, text=True,
        timeout=HANGS_S,
    )  # fmt: skip
    assert done.stdout.strip() == r"'\u2014 \xfc'", done.stderr


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["", "null", "010", "1e-4", "1e5", "+1.e3", "12:00:00", "yes", "~", "<<", "=", "- a", "#", "a #b"]),
)
trees = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(trees, st.booleans())
def test_what_is_written_is_read_back_with_its_types(tree: Any, in_ascii: bool) -> None:
    text = to_yaml(tree, in_ascii=in_ascii)
    read = value_of(text)
    assert read == tree
    assert repr(read) == repr(tree).replace("-0.0", repr(-0.0))
    assert text.isascii() or not in_ascii


@given(st.floats() | st.integers().map(float))
def test_every_finite_number_is_read_as_python_writes_it(number: float) -> None:
    parsed = parse_number(repr(number))
    assert parsed == number if abs(number) < float("inf") else parsed is None


PIECES = [
    "a", "b: ", ": ", "- ", "[", "]", "{", "}", ",", "&x ", "*x", "<<: ", "!!str ", "!t ", "'", '"', "\\x", "| ", "> ",
    "\n", "\n  ", "\t", "#", " #", "? ", "%YAML 1.1\n", "---\n", "...\n", "0", "1e9", "~", "\ufeff", "\0", "ü", "\r",
    "\\U0011", "\u2028", "@", "`", "é: ",
]  # fmt: skip


def test_any_soup_of_yaml_is_a_tree_or_refused() -> None:
    draw = random.Random(5)
    for _ in cases(3000):
        soup = "".join(draw.choice(PIECES) for _ in range(draw.randint(1, 25)))
        for parse in (parse_yaml, parse_value):
            try:
                tree = parse(soup, "x")
            except UserError as error:
                long = len(str(error)) >= 400
            else:
                long = False
                assert plain_values(parse_yaml(to_yaml(plain_values(tree)), "x")) == plain_values(tree)
            assert not long


@given(st.text(max_size=200))
def test_any_text_is_a_tree_or_refused(text: str) -> None:
    for parse in (parse_yaml, parse_value):
        with contextlib.suppress(UserError):
            parse(text, "x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a #b", "a #b"), ("#b", "#b"), ("3 #b", "3 #b"), ("[a, 1]", ["a", 1]), ("{a: 1}", {"a": 1}), ("'1'", "1"),
        ('"a\\nb"', "a\nb"), (" a ", "a"), ("", None), ("- a", ["a"]), ("a: b", {"a": "b"}), ("--qos=x", "--qos=x"),
        ("it's", "it's"), ("[]", []), ("/a b/c", "/a b/c"), ("a:b", "a:b"), ("http://x/y#z", "http://x/y#z"),
    ],
)  # fmt: skip
def test_an_override_is_what_is_written(text: str, value: Any) -> None:
    parsed = parse_value(text, "--set k")
    assert plain_values(parsed) == value
    assert not isinstance(parsed, Plain) or parsed.text == text


@pytest.mark.parametrize(
    "text", ["[1,", "[1] #c", "[1] x", "'a' b", "&a [*a]", "*a", "!x 3", "| a", "{a: 1", "a: b: c", "]"]
)
def test_an_override_that_means_more_than_it_says_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--set k: ") as caught:
        parse_value(text, "--set k")
    assert "\n" not in str(caught.value)
