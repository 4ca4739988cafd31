"""Parts that the readers of raw datasets share: existing splits, CSV rows with their place, classes, unique keys.

Every error names the file and row.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.packing.records import inside, raw_file
from karmma_dist.shards.format import check_key


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
    if not root.is_dir():
        raise UserError(f"{root}: no such raw folder (give it with --raw DIR or raw: in the specification)")
    tables = {split: raw_file(root, name, f"{section}.splits.{split}") for split, name in splits.items()}
    files = {split: table for split, table in tables.items() if table is not None}
    if not files:
        raise UserError(f"{root}: no annotations: none of {', '.join(splits.values())} exists")
    notes = tuple(f"split '{split}' skipped: no {splits[split]}" for split in splits if split not in files)
    return SplitTables(root, files, notes)


def check_name(place: str, column: str, text: str) -> None:
    """Check that a key, recording or participant has letters, digits, '_' and '-' only.

    Raises:
        UserError: the text has another character.
    """
    try:
        check_key(text)
    except UserError:
        raise UserError(f"{place}: {column} '{text}': only letters, digits, '_' and '-' are allowed") from None


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


def rows(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (`FILE, row N`, row) of a CSV, plain or gzipped, that has at least these columns.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a row with too few fields.
    """
    opener = gzip.open if table.suffix == ".gz" else open
    try:
        with opener(table, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{table}: column '{missing[0]}' is missing")
            for row in reader:
                place = f"{table}, row {reader.line_num}"
                if any(row[column] is None for column in columns):
                    raise UserError(f"{place}: has fewer fields than the header")
                yield place, row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: cannot be read as CSV: {error}") from None


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
    for place, row in rows(table, ("id", "key")):
        number = integer(place, "id", row["id"])
        if number in names:
            raise UserError(f"{place}: id {number} occurs twice")
        names[number] = row["key"]
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{table}: ids are not 0 to {len(names) - 1} without a gap")
    return [names[number] for number in range(len(names))]


def integer(place: str, column: str, text: str) -> int:
    """Parse a whole number.

    Raises:
        UserError: the text is not a whole number.
    """
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{place}: {column} '{text}' is not a whole number") from None
