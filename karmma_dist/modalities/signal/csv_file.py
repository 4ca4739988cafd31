"""Reads a signal of a recording from a CSV: a column of moments and one per channel, whose header may give units.

    Milliseconds,AcclX,AcclY,AcclZ            time [ms],force [N]
    5.01,9.61,0.42,-1.38                      0,0.25

A number that is not finite, or a clock that runs backwards, damages the clips that meet it; a file of another form
damages all of them. Every message names file and line.
"""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from karmma_dist.errors import nearest, one_line, quoted
from karmma_dist.io.files import read_file
from karmma_dist.modalities.file_type import unusable_type
from karmma_dist.modalities.recording import LONGEST_S, MediaError, Stretches, media_error
from karmma_dist.modalities.signal import TICKS_S, TrackSpec

_MOST_BYTES = 1 << 30
_LARGEST = 1e25
"""Largest number that a sensor can mean; variances of larger ones overflow."""
_HEADING = re.compile(r"\s*(?P<name>.*?)\s*(?:[\[(]\s*(?P<unit>[^\[\]()]*?)\s*[\])])?\s*")


@dataclass(frozen=True, slots=True)
class RecordedTrack:
    """The samples of a recording's file that can be used, and the stretches that cannot."""

    times_T: np.ndarray
    """Moments in the unit of the file, ascending; float64."""
    values_CT: np.ndarray
    """Samples in the units of their channels; float64."""
    damage: Stretches = field(default_factory=Stretches)


def read_track(path: Path, track: TrackSpec) -> RecordedTrack:
    """Read a recording's file.

    Raises:
        MediaError: the file cannot be read, has another form or other units than `track`, or no sample.
    """
    text = _read_text(path)
    header, _, body = text.partition("\n")
    columns = _columns(path, header, track)
    names = [track.time_column, *(channel.column or channel.name for channel in track.channels)]
    if not body.strip():
        raise _problem(path, "has a header and no sample")
    try:
        table = np.loadtxt(
            io.StringIO(body), np.float64, comments=None, delimiter=",", quotechar='"', usecols=columns, ndmin=2
        )
    except ValueError as error:
        raise _problem(path, _wrong_number(body, columns, names) or one_line(error, 200)) from None
    return _usable(path, track, table, names, body)


def _read_text(path: Path) -> str:
    try:
        problem = unusable_type(path)
        if not problem and path.stat().st_size > _MOST_BYTES:
            problem = f"has more than {_MOST_BYTES:,} bytes"
        if problem:
            raise _problem(path, problem)
        return read_file(path, _MOST_BYTES).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _problem(path, f"line {line}: is not UTF-8") from None
    except OSError as error:
        raise media_error(error, "signal", "open", f"{path.name}: {error.strerror or error}") from None


def _columns(path: Path, header: str, track: TrackSpec) -> list[int]:
    """Return the numbers of the columns of the moments and of the channels, and compare their units."""
    try:
        headings = next(csv.reader([header], strict=True), [])
    except csv.Error as error:
        raise _problem(path, f"line 1: {error}") from None
    wanted: list[tuple[str, str]] = [(track.time_column, track.time_unit)]
    wanted += [(channel.column or channel.name, channel.unit) for channel in track.channels]
    parsed = [_heading(text) for text in headings]
    columns = []
    for name, unit in wanted:
        places = [place for place, (found, _) in enumerate(parsed) if found == name]
        if len(places) != 1:
            if len(headings) == 1 and (mark := next((mark for mark in ";\t|" if mark in header), None)):
                raise _problem(path, f"line 1: its fields are separated by {quoted(mark)}: save it with commas")
            known = "is missing" if not places else "occurs twice"
            hint = nearest(name, [other for other, _ in parsed]) if not places else ""
            raise _problem(path, f"line 1: column '{name}' {known}{hint}")
        given = parsed[places[0]][1]
        if given is not None and given != unit:
            raise _problem(path, f"line 1: column '{name}' is in {given}, declared is {unit}")
        columns.append(places[0])
    return columns


def _heading(text: str) -> tuple[str, str | None]:
    """Return name and unit of a heading such as `force [N]`."""
    match = _HEADING.fullmatch(text)
    return (text.strip(), None) if match is None else (match["name"], match["unit"])


def _wrong_number(body: str, columns: list[int], names: list[str]) -> str:
    """Return line and column of the first field that is not a number, or an empty string."""
    reader = csv.reader(io.StringIO(body))
    try:
        for row in reader:
            for column, name in zip(columns, names, strict=True) if row else ():
                if column >= len(row):
                    return f"line {reader.line_num + 1}: has {len(row)} fields, none for '{name}'"
                try:
                    float(row[column])
                except ValueError:
                    return f"line {reader.line_num + 1}: {name} is {quoted(row[column])}, not a number"
    except csv.Error as error:
        return f"line {reader.line_num + 1}: {error}"
    return ""


def _usable(path: Path, track: TrackSpec, table_TC: np.ndarray, names: list[str], body: str) -> RecordedTrack:
    """Leave out what is not finite, and everything after the clock runs backwards; both are damage."""
    tick_s, damage = TICKS_S[track.time_unit], Stretches()
    is_finite_T = (np.abs(table_TC) <= _LARGEST).all(axis=1)
    rows = np.flatnonzero(is_finite_T)
    if not len(rows):
        raise _problem(path, f"line {_line_of(body, 0)}: no line of it has finite numbers only")
    times_T = table_TC[rows, 0]
    back = np.flatnonzero(np.diff(times_T) < 0)
    if len(back):
        first = int(back[0])
        line, last, now = _line_of(body, int(rows[first + 1])), times_T[first], times_T[first + 1]
        damage.start(
            float(last * tick_s),
            f"{path.name}, line {line}: the clock runs backwards, from {last:.12g} to {now:.12g} {track.time_unit}",
        )
        rows, times_T = rows[: first + 1], times_T[: first + 1]
    if times_T[0] * tick_s < -LONGEST_S or times_T[-1] * tick_s > LONGEST_S:
        raise _problem(path, f"its clock goes from {times_T[0]:.12g} to {times_T[-1]:.12g} {track.time_unit}: longer "
                             "than a day; is this its unit?")  # fmt: skip
    bad = np.flatnonzero(~is_finite_T[: rows[-1] + 1] if len(back) else ~is_finite_T)
    for run in np.split(bad, np.flatnonzero(np.diff(bad) > 1) + 1) if len(bad) else []:
        after = int(np.searchsorted(rows, run[0]))
        start_s = float(times_T[after - 1] * tick_s) if after else -math.inf
        stop_s = float(times_T[after] * tick_s) if after < len(times_T) else math.inf
        column = int(np.flatnonzero(~(np.abs(table_TC[run[0]]) <= _LARGEST))[0])
        text = f"{path.name}, line {_line_of(body, int(run[0]))}: {names[column]} is {table_TC[run[0], column]}"
        damage.spans.append((start_s, stop_s, text))
    return RecordedTrack(times_T, np.ascontiguousarray(table_TC[rows, 1:].T), damage)


def _line_of(body: str, row: int) -> int:
    """Return the line, in the file, of a row of the table; lines without text are no rows."""
    for number, line in enumerate(body.split("\n")):
        if line.strip():
            if row == 0:
                return number + 2
            row -= 1
    return body.count("\n") + 2


def _problem(path: Path, problem: str) -> MediaError:
    separator = ", " if problem.startswith("line ") else ": "
    return MediaError("signal", "open", f"{path.name}{separator}{problem}")
