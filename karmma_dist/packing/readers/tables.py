"""Parts that the readers of raw datasets share: existing splits, CSV rows with their place, classes, unique keys.

Every error names the file and row. A CSV is read as it stands or refused: UTF-8, commas, one line per row, as many
fields in each row as in the header. Rows without any text are skipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError, nearest
from karmma_dist.io.files import read_file
from karmma_dist.io.json_fields import shown
from karmma_dist.packing.records import file_type, inside, raw_file
from karmma_dist.shards.format import check_key

_LONGEST_NAME = 200
"""Characters of a name: with what the tar and the files of packing add, it must fit the 255 bytes of a file name."""
_MOST_BYTES = 1 << 30
"""Bytes of an annotation file, unpacked."""
_GZIP = b"\x1f\x8b"
_OTHER_FORMATS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: get the file with git lfs pull"),
    (b"PK\x03\x04", "is a ZIP archive or a spreadsheet: save it as CSV"),
    (b"\x00\x00\xfe\xff", "is UTF-32: save it as UTF-8"),
    (b"\xff\xfe\x00\x00", "is UTF-32: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8"),
    (b"\xff\xfe", "is UTF-16: save it as UTF-8"),
)
_MARKUP = re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
"""Characters that no table needs; tab and line breaks are not among them."""
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class SplitTables:
    """The annotation files of a raw folder."""

    raw: Path
    files: dict[str, Path]
    """File of every split that has one, in the order of the specification."""
    notes: tuple[str, ...]
    """Sentences about the splits without a file."""


def split_tables(raw: str, splits: dict[str, str], section: str) -> SplitTables:
    """Find the annotations of every split: `splits` names one file each, relative to the raw folder.

    Raises:
        UserError: the raw folder does not exist, or has no annotations.
    """
    root = Path(raw)
    try:
        kind = file_type(root)
    except OSError as error:
        raise UserError(f"{error.filename or root}: {error.strerror}") from None
    if kind != "folder":
        raise UserError(f"{root}: no such raw folder (give it with --raw DIR or raw: in the specification)")
    tables = {split: raw_file(root, name, f"{section}.splits.{split}") for split, name in splits.items()}
    files = {split: table for split, table in tables.items() if table is not None}
    if not files:
        raise UserError(f"{root}: no annotations: none of {', '.join(splits.values())} exists")
    notes = tuple(f"split '{split}' skipped: no {splits[split]}" for split in splits if split not in files)
    return SplitTables(root, files, notes)


def check_name(place: str, column: str, text: str, longest: int = _LONGEST_NAME) -> None:
    """Check that a key, recording or participant has letters, digits, '_' and '-' only, and not too many of them.

    Raises:
        UserError: the text has another character, or more than `longest`.
    """
    try:
        check_key(text)
    except UserError:
        raise UserError(
            f"{place}: {column} {shown(text)}: only letters, digits, '_' and '-' are allowed"
        ) from None
    if len(text) > longest:
        raise UserError(f"{place}: {column} '{text[:20]}...' has {len(text)} characters: at most {longest}")


class UniqueKeys:
    """Clip keys of all splits, each with the place where it was first."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._places: dict[str, str] = {}

    def add(self, key: str, place: str) -> None:
        """Add a key.

        Raises:
            UserError: the key was added before.
        """
        if key in self._places:
            raise UserError(f"{place}: {self._column} '{key}' is already that of {self._places[key]}")
        self._places[key] = place


def read_text(path: Path) -> str:
    """Read an annotation file, plain or gzipped, as text.

    Raises:
        UserError: the file cannot be read, is of another format, or is not UTF-8.
    """
    try:
        content = read_file(path, _MOST_BYTES)
        if path.suffix == ".gz" or content.startswith(_GZIP):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: has more than {_MOST_BYTES:,} bytes: this is no annotation file")
    for start, problem in _OTHER_FORMATS:
        if content.startswith(start):
            raise UserError(f"{path}: {problem}")
    if _MARKUP.match(content):
        raise UserError(f"{path}: is a web page or XML, not the file: download it again")
    if (place := content.find(0)) >= 0:
        problem = "NUL bytes: is it UTF-16? save it as UTF-8" if content.count(0) > len(content) // 8 else "a NUL byte"
        raise UserError(f"{path}, row {_row_of(content, place)}: has {problem}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        row = _row_of(error.object, error.start)
        raise UserError(f"{path}, row {row}: {byte} is not UTF-8: save the file as UTF-8") from None


def _row_of(content: bytes, place: int) -> int:
    before = content[:place].replace(b"\r\n", b"\n")
    return 1 + before.count(b"\n") + before.count(b"\r")


def rows(
    table: Path, columns: tuple[str, ...], *, may_be_empty: bool = False
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`FILE, row N`, row) of a CSV, plain or gzipped, that has at least these columns.

    Args:
        table: The CSV.
        columns: Columns that it must have.
        may_be_empty: True if a header without rows is right.

    Raises:
        UserError: the file cannot be read as CSV, lacks a column or names one twice, has no row, or a row with another
            number of fields than the header, with a line break or another control character.
    """
    reader = csv.reader(io.StringIO(read_text(table), newline=""), strict=True)
    header: list[str] = []
    last_line = num_rows = 0
    try:
        for fields in reader:
            place, num_lines = f"{table}, row {last_line + 1}", reader.line_num - last_line
            last_line = reader.line_num
            if not any(field.strip() for field in fields):
                continue
            if num_lines > 1:
                raise UserError(f"{place}: a quoted field runs over {num_lines} lines: is its quote never closed?")
            if not header:
                header = _checked_header(table, fields, columns)
                continue
            yield place, _row(place, header, fields)
            num_rows += 1
    except csv.Error as error:
        text = str(error)
        if "unexpected end" in text:
            text = "a quote is opened and never closed"
        raise UserError(f"{table}, row {last_line + 1}: cannot be read as CSV: {text}") from None
    if not header:
        raise UserError(f"{table}: is empty: expected a header with {', '.join(columns)}")
    if not num_rows and not may_be_empty:
        raise UserError(f"{table}: has a header and no row (a file that does not exist is skipped)")


def _checked_header(table: Path, header: list[str], columns: tuple[str, ...]) -> list[str]:
    for column in columns:
        if column in header:
            continue
        separator = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
        if separator is not None:
            name = "tabs" if separator == "\t" else f"'{separator}'"
            raise UserError(f"{table}: its fields are separated by {name}: save it with commas")
        raise UserError(f"{table}: column '{column}' is missing{nearest(column, header)}")
    for number, name in enumerate(header):
        if name and name in header[:number]:
            raise UserError(f"{table}: column '{name}' occurs twice")
    return header


def _row(place: str, header: list[str], fields: list[str]) -> dict[str, str]:
    if len(fields) != len(header):
        more, hint = "fewer", ""
        if len(fields) > len(header):
            more, hint = "more", ": quote a text that has commas"
        raise UserError(f"{place}: has {more} fields than the header ({len(fields)}, not {len(header)}){hint}")
    for number, (name, text) in enumerate(zip(header, fields, strict=True)):
        if (match := _CONTROL.search(text)) or "\n" in text or "\r" in text:
            character = match[0] if match else "\n"
            raise UserError(f"{place}: {name or 'a column without name'} has the character U+{ord(character):04X}")
        # Software that numbers rows leaves the first column without name.
        if text and not name and number:
            raise UserError(f"{place}: has '{text}' in a column without name: name it, or quote a text that has commas")
    return dict(zip(header, fields, strict=True))


def read_classes(raw: Path, name: str, head: str, section: str) -> list[str]:
    """Read class names by id from a CSV with columns id and key; ids must be 0, 1, 2, ...

    Args:
        raw: The raw folder.
        name: The CSV, relative to the raw folder.
        head: The head that has these classes.
        section: Section of the specification that names the CSV, for errors.

    Raises:
        UserError: the file does not exist, or its ids are not 0, 1, 2, ...
    """
    table = raw_file(raw, name, f"{section}.heads.{head}")
    if table is None:
        raise UserError(f"{inside(raw, name, head)}: no such class file (head '{head}')")
    names: dict[int, str] = {}
    places: dict[str, str] = {}
    for place, row in rows(table, ("id", "key")):
        number = integer(place, "id", row["id"])
        if number in names:
            raise UserError(f"{place}: id {number} occurs twice")
        if not row["key"].strip():
            raise UserError(f"{place}: key is empty")
        if row["key"] in places:
            raise UserError(f"{place}: key '{row['key']}' is already that of {places[row['key']]}")
        names[number] = row["key"]
        places[row["key"]] = place
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{table}: ids are not 0 to {len(names) - 1} without a gap")
    return [names[number] for number in range(len(names))]


def integer(place: str, column: str, text: str) -> int:
    """Parse a whole number.

    Raises:
        UserError: the text is not a whole number.
    """
    if not _WHOLE.fullmatch(text.strip()):
        raise UserError(f"{place}: {column} {shown(text)} is not a whole number")
    return int(text)


def class_id(place: str, column: str, text: str, num_classes: int) -> int:
    """Parse the id of a class.

    Raises:
        UserError: the text is not a whole number from 0 to `num_classes` - 1.
    """
    label = integer(place, column, text)
    if label < 0:
        raise UserError(f"{place}: {column} {label} is no class: {UNLABELLED}")
    if label >= num_classes:
        raise UserError(f"{place}: {column} {label} is not in the class file: it has 0 to {num_classes - 1}")
    return label


UNLABELLED = "clips without a class go into a split of unlabelled_splits, or their rows are removed"
"""Advice where a row has no class."""
