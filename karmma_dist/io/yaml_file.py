"""YAML of people: one reader that guesses little, keeps what is written, and refuses what is lost or never ends.

    parse_yaml("time: 12:00:00\\nepochs: 010\\nlr: 1e-4", "a.yaml")
    {"time": "12:00:00", "epochs": "010", "lr": Plain("1e-4", 0.0001)}

An unquoted value is null (`null`, `~`, nothing), true or false, or a decimal number; everything else is text, such as
dates, times, `yes`, `NO`, `010`, `0x10`, `1_000` and `.inf`. What is no text is a `Plain`, which also keeps what is
written: a field that holds text takes that (`field_values.py`). Keys are text, and unique in their section. Anchors,
aliases and merge keys (`<<`) work; of the tags only `!!str`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from karmma_dist.errors import UserError, one_line, quoted
from karmma_dist.io.files import read_file

MOST_BYTES = 128 * 1024
"""Bytes of a file, unless its reader allows for more or less."""
MOST_DEPTH = 32
"""Sections and lists inside each other."""
_BYTES_PER_NODE = 12
"""Bytes of a file for each value that it may have, after aliases are replaced by what they stand for."""
_MOST_LINE = 100_000
"""Characters of a line."""
_MOST_DIGITS = 300
"""Characters of a number; a longer one is text."""

_NUMBER = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_INTEGER = re.compile(r"[-+]?[0-9]+")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_TEXT_TAGS = ("!", "tag:yaml.org,2002:str")
_TAGS = {yaml.SequenceStartEvent: (None, "!", "tag:yaml.org,2002:seq"),
         yaml.MappingStartEvent: (None, "!", "tag:yaml.org,2002:map")}  # fmt: skip
_MERGE = object()
"""Key of a section whose values come from other sections."""
_MEANS_MORE = "&*!|>%@`"
"""First characters of an unquoted value that are not part of it in YAML."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An unquoted value that is no text by itself."""

    text: str
    """What is written."""
    value: Any
    """What it means where no text is wanted: None, a bool, an int, a finite float."""


def parse_number(text: str) -> int | float | None:
    """Return the decimal number that a text is, or None; a number too large to be finite is none."""
    if len(text) > _MOST_DIGITS or not _NUMBER.fullmatch(text):
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else None


def plain_values(tree: Any) -> Any:
    """Return a parsed tree in which every `Plain` is replaced by its value."""
    if isinstance(tree, Plain):
        return plain_values(tree.value)
    if isinstance(tree, dict):
        return {key: plain_values(value) for key, value in tree.items()}
    return [plain_values(value) for value in tree] if isinstance(tree, list) else tree


def read_yaml(path: Path, limit: int = MOST_BYTES) -> Any:
    """Read a file in UTF-8, whatever the locale, with `parse_yaml`.

    Args:
        path: Path of the file.
        limit: Largest number of bytes that such a file may have.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it cannot be read, or `parse_yaml` refuses it.
    """
    try:
        text = read_file(path, limit).decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start:,}: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return parse_yaml(text, str(path), limit)


def parse_yaml(text: str, where: str, limit: int = MOST_BYTES) -> Any:
    """Return the dictionaries, lists, texts and `Plain` values of one YAML document; `Plain("", None)` if it is empty.

    Args:
        text: The document.
        where: Its place, for messages.
        limit: Size in bytes that the number of values depends on.

    Raises:
        UserError: it is not YAML, too large or too deep, has a key twice or one that is no text, a tag, an anchor
            inside itself or several documents; the message names the line.
    """
    if any(len(line) > _MOST_LINE for line in text.splitlines()):
        raise UserError(f"{where}: has a line of more than {_MOST_LINE:,} characters")
    return _Document(text, where, limit // _BYTES_PER_NODE).parse()


def parse_value(text: str, where: str) -> Any:
    """Return the value of an override `KEY=VALUE`: a list or section in brackets, a text in quotes, or what is written.

    Without brackets and quotes a text field gets what is written (`a #b`, `a: b`), and other fields what it means.

    Raises:
        UserError: the value is not YAML, or begins with what means something else in YAML.
    """
    text = text.strip()
    if text[:1] in tuple(_MEANS_MORE):
        raise UserError(f"{where}: the value begins with {text[0]}: write it in quotes, '...', inside of the shell's")
    if text.startswith("#") or ("\n" not in text and " #" in text and text[0] not in "[{\"'"):
        return text
    document = _Document(text, where, MOST_BYTES // _BYTES_PER_NODE, what="the value is ")
    value = document.parse()
    if text.startswith(("[", "{", '"', "'")):
        if text[document.end :].strip():
            raise UserError(f"{where}: {quoted(text[document.end :].strip())} follows the value: write it in quotes")
        return value
    if isinstance(value, dict | list):
        return Plain(text, value)
    return value if (value.text if isinstance(value, Plain) else value) == text else text


class _Document:
    """The document that becomes a tree, event by event: nothing is built beyond the limits."""

    def __init__(self, text: str, where: str, most_nodes: int, what: str = "") -> None:
        self.end = 0
        """Place in the text behind the tree."""
        self._text, self._where, self._what, self._most_nodes = text, where, what, most_nodes
        self._events = self._read()
        self._num_nodes = 0
        self._anchors: dict[str, tuple[Any, int] | None] = {}
        """Value and number of nodes by anchor; None while it is being built."""

    def parse(self) -> Any:
        """Return the tree.

        Raises:
            UserError: see `parse_yaml`.
        """
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return Plain("", None)
        tree = self._node(next(self._events), 0)
        next(self._events)
        if not isinstance(event := next(self._events), yaml.StreamEndEvent):
            raise self._refusal(event, "another document begins: keep one")
        return tree

    def _read(self) -> Iterator[Any]:
        try:
            for event in yaml.parse(self._text, Loader=yaml.SafeLoader):
                if isinstance(event, yaml.ScalarEvent) and event.style == '"':
                    event.value = _PAIR.sub(_character, event.value)
                yield event
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
            line = "" if mark is None else f" in line {mark.line + 1}"
            raise UserError(f"{self._where}: {self._what}not valid YAML{line}: {one_line(problem, 120)}") from None
        except yaml.reader.ReaderError as error:
            line = f" in line {self._text.count(chr(10), 0, error.position) + 1}"
            code = ord(error.character) if isinstance(error.character, str) else error.character
            raise UserError(
                f"{self._where}: {self._what}not valid YAML{line}: it has the character U+{code:04X}"
            ) from None
        except ValueError as error:  # a number in a directive or an escaped character that does not exist
            raise UserError(f"{self._where}: {self._what}not valid YAML: {one_line(error, 120)}") from None

    def _refusal(self, event: Any, problem: str) -> UserError:
        return UserError(f"{self._where}: line {event.start_mark.line + 1}: {problem}")

    def _ends(self, event: Any) -> None:
        self.end = max(self.end, event.end_mark.index)

    def _count(self, event: Any, num: int, depth: int) -> None:
        self._num_nodes += num
        if self._num_nodes > self._most_nodes:
            raise self._refusal(event, f"more than {self._most_nodes:,} values, aliases included")
        if depth > MOST_DEPTH:
            raise self._refusal(event, f"more than {MOST_DEPTH} sections or lists inside each other")

    def _node(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        first = self._num_nodes
        self._count(event, 1, depth)
        if event.anchor is not None:
            if event.anchor in self._anchors:
                raise self._refusal(event, f"the anchor &{quoted(event.anchor)} is defined twice")
            self._anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif event.tag not in _TAGS[type(event)]:
            raise self._tag(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._list(depth)
        else:
            value = self._section(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._num_nodes - first
        self._ends(event)
        return value

    def _alias(self, event: Any, depth: int) -> Any:
        if event.anchor not in self._anchors:
            raise self._refusal(event, f"no anchor &{quoted(event.anchor)} comes before its alias")
        anchored = self._anchors[event.anchor]
        if anchored is None:
            raise self._refusal(event, f"the anchor &{quoted(event.anchor)} contains itself")
        value, num = anchored
        self._count(event, num, depth)
        return self._copied(event, value, depth)

    def _copied(self, event: Any, value: Any, depth: int) -> Any:
        self._count(event, 0, depth)
        if isinstance(value, dict):
            return {key: self._copied(event, entry, depth + 1) for key, entry in value.items()}
        return [self._copied(event, entry, depth + 1) for entry in value] if isinstance(value, list) else value

    def _list(self, depth: int) -> list[Any]:
        values = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            values.append(self._node(event, depth + 1))
        self._ends(event)
        return values

    def _section(self, depth: int) -> dict[str, Any]:
        own: dict[Any, Any] = {}
        lines: dict[Any, int] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._key(event, depth)
            if key in lines:
                shown = "<<" if key is _MERGE else quoted(key)
                raise self._refusal(event, f"the key {shown} is already in line {lines[key]} of this section: keep one")
            lines[key] = event.start_mark.line + 1
            if key is _MERGE:
                merged = self._merged(next(self._events), depth)
            else:
                own[key] = self._node(next(self._events), depth + 1)
        self._ends(event)
        return {**merged, **own}

    def _key(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0] and event.tag is None:
            return _MERGE
        is_value = isinstance(event, yaml.ScalarEvent | yaml.AliasEvent)
        key = self._node(event, depth + 1) if is_value else None
        if isinstance(key, Plain):
            shown = f"the key {quoted(key.text)} is no text: write it in quotes" if key.text else "a key is missing"
            raise self._refusal(event, shown)
        if not isinstance(key, str):
            raise self._refusal(event, "a list or section cannot be a key")
        return key

    def _merged(self, event: Any, depth: int) -> dict[str, Any]:
        value = self._node(event, depth + 1)
        sections = value if isinstance(value, list) else [value]
        if not all(isinstance(section, dict) for section in sections):
            raise self._refusal(event, "<< takes a section, or a list of sections")
        return {key: entry for section in reversed(sections) for key, entry in section.items()}

    def _scalar(self, event: Any) -> Any:
        if event.tag is None and event.implicit[0]:
            return _guess(event.value)
        if event.tag is not None and event.tag not in _TEXT_TAGS:
            raise self._tag(event)
        return event.value

    def _tag(self, event: Any) -> UserError:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!", 1)
        return self._refusal(event, f"the tag {quoted(tag)} is not supported: remove it")


def _character(pair: re.Match[str]) -> str:
    """Return the character that JSON writes as the escapes of two halves."""
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


def _guess(text: str) -> Any:
    if text in _WORDS:
        return Plain(text, _WORDS[text])
    number = parse_number(text)
    return text if number is None else Plain(text, number)


class _Dumper(yaml.SafeDumper):
    """A dumper that puts every text in quotes that would be read as a number, here or by other YAML readers."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{_NUMBER.pattern})$"), list("-+.0123456789")
)


def to_yaml(tree: Any, *, in_ascii: bool = False) -> str:
    """Return a tree of plain values as YAML; with `in_ascii`, other characters are escaped in quotes."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=not in_ascii)
    return text
