"""Annotation files of every faulty kind: each is read right, or refused in one line with file and row."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.packing.readers.csv_table import read_plain
from karmma_dist.packing.readers.epic_kitchens import read_epic_kitchens
from karmma_dist.packing.readers.something_something import read_something_something
from karmma_dist.packing.readers.tables import rows
from karmma_dist.packing.records import Plan
from karmma_dist.packing.spec import PackingSpec
from kits.packing import epic_spec, row, write_epic

HEADER = "key,media,start,stop,action\n"
NARRATED = "key,media,start,stop,narration,action\n"
GOOD = HEADER + "a,m.mp4,0,1,open\nb,m.mp4,1,2,close\n"


def read(root: Path, table: str | bytes, **plain: object) -> Plan:
    (root / "train.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    fields = {"reader": "plain", "dataset": "t", "raw": str(root), "out": str(root / "out"), "plain": plain}
    return read_plain(PackingSpec.model_validate(fields))


def refusal(root: Path, table: str | bytes, **plain: object) -> str:
    with pytest.raises(UserError) as caught:
        read(root, table, **plain)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    assert "train.csv" in text
    return text


def labels(plan: Plan) -> dict[str, str]:
    ids = {clip.key: clip.labels["action"] for recording in plan.recordings for clip in recording.clips}
    return {key: plan.classes["action"][number] for key, number in ids.items() if number is not None}


@pytest.mark.parametrize(
    "table",
    [
        GOOD.encode("utf-8-sig"),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("\n", "\r").encode(),
        GOOD.rstrip("\n").encode(),
        (GOOD + "\n\r\n  \n,,,,\n").encode(),
        GOOD.replace("b,m.mp4", "\n,,,,\nb,m.mp4").encode(),
        gzip.compress(GOOD.encode(), mtime=0),
        "".join(f"{n},{line}\n" if n else f",{line}\n" for n, line in enumerate(GOOD.splitlines())).encode(),
        GOOD.replace("open", '"open"').encode(),
    ],
    ids=["bom", "crlf", "cr", "no last break", "empty rows", "empty row inside", "gzip", "numbered rows", "quotes"],
)
def test_other_ways_to_write_a_table_are_read_alike(tmp_path: Path, table: bytes) -> None:
    assert labels(read(tmp_path, table)) == {"a": "open", "b": "close"}


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (NARRATED + "a,m.mp4,0,1,x,open\nb,m.mp4,1,2,open it, slowly,open\n", r"row 3: has more fields .*\(7, not 6\)"),
        (NARRATED + "a,m.mp4,0,1,x\n", r"row 2: has fewer fields .*\(5, not 6\)"),
        (HEADER + "a,m.mp4,0,1\n", "row 2: has fewer fields"),
        (NARRATED.replace("action", "action,") + "b,m.mp4,1,2,x, y,open\n", "row 2: has 'open' in a column without"),
        ("key,media,start,stop,action,action\na,m.mp4,0,1,x,y\n", "column 'action' occurs twice"),
        (GOOD.replace(",", ";"), "separated by ';'"),
        (GOOD.replace(",", "\t"), "separated by tabs"),
        (NARRATED + 'a,m.mp4,0,1,"x,open\nb,m.mp4,1,2,x",open\n', "row 2: a quoted field runs over 2 lines"),
        (NARRATED + 'a,m.mp4,0,1,"x,open\nb,m.mp4,1,2,x,open\n', "row 2: .*never closed"),
        (NARRATED + 'a,m.mp4,0,1,"x" y,open\n', "row 2: cannot be read as CSV"),
        (HEADER, "a header and no row"),
        (HEADER + ",,,,\n\n", "a header and no row"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        (GOOD.replace("open", "o\0pen"), "row 2: has a NUL byte"),
        (GOOD.replace("close", "clo\x07se"), r"row 3: action has the character U\+0007"),
        (GOOD.replace("close", "clo\u2028se"), r"row 3: action has the character U\+2028"),
        (GOOD.replace("close", "\ufeffclose"), r"row 3: action has the character U\+FEFF"),
        (GOOD.encode("utf-16"), "is UTF-16"),
        (GOOD.encode("utf-32"), "is UTF-32"),
        (b"\0\0\xfe\xff" + GOOD.encode("utf-32-be"), "is UTF-32"),
        (GOOD.encode("utf-16-le"), "row 1: has NUL bytes: is it UTF-16"),
        (GOOD.encode("utf-32-be"), "row 1: has NUL bytes: is it UTF-16"),
        (GOOD.replace("close", "schlie\u00dfen").encode("latin-1"), "row 3: byte 0xdf is not UTF-8"),
        (GOOD.replace("\n", "\r").replace("close", "\u00e9").encode("cp1252"), "row 3: byte 0xe9 is not UTF-8"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "Git LFS pointer"),
        ("\n<!DOCTYPE html>\n<html></html>\n", "web page"),
        ("<?xml version='1.0'?>", "web page or XML"),
        (b"PK\x03\x04rest", "spreadsheet"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-10], "cannot be read"),
        (gzip.compress(GOOD.encode() * 100, mtime=0)[:60] + b"\xff" * 60, "cannot be read"),
        (HEADER + "k" * 201 + ",m.mp4,0,1,x\n", r"row 2: key 'k+\.\.\.' has 201 characters"),
        (HEADER + "a,m.mp4,0,1," + "x" * 200_000 + "\n", "row 2: cannot be read as CSV: field larger"),
        (HEADER + "a,m.mp4,\u0660,1,x\n", "row 2: start '\u0660' is not a number of seconds"),
        (HEADER + "a,m.mp4,0,1_0,x\n", "row 2: stop '1_0' is not a number of seconds"),
        (HEADER + 'a,m.mp4,0,"1,5",x\n', "row 2: stop '1,5' is not a number of seconds"),
        (HEADER + "a,m.mp4,0,1e999,x\n", "row 2: stop '1e999' is not a number of seconds"),
    ],
)
def test_a_faulty_table_is_refused_by_row(tmp_path: Path, table: str | bytes, named: str) -> None:
    text = refusal(tmp_path, table)
    assert re.search(named, text), text


@pytest.mark.parametrize("text", ["-1", "3.0", "3,0", "+1", "007", "\u0663", "\uff13", "1_0"])
@pytest.mark.parametrize("with_file", [False, True])
def test_a_class_that_is_nearly_an_id_is_refused(tmp_path: Path, text: str, with_file: bool) -> None:
    (tmp_path / "classes.csv").write_text("id,key\n" + "".join(f"{n},name {n}\n" for n in range(20)))
    cell = f'"{text}"' if "," in text else text
    error = refusal(
        tmp_path, HEADER + f"a,m.mp4,0,1,1\nb,m.mp4,1,2,{cell}\n",
        **({"heads": {"action": "classes.csv"}} if with_file else {}),
    )  # fmt: skip
    assert f"row 3: action '{text}' is no class id" in error
    assert ("unlabelled_splits" in error) == (text == "-1")


def test_ids_and_names_in_one_head_are_refused(tmp_path: Path) -> None:
    error = refusal(tmp_path, HEADER + "a,m.mp4,0,1,3\nb,m.mp4,1,2,open\n")
    assert "row 3: action 'open' is a name, and '3' in" in error
    assert "row 2 an id" in error


def test_an_empty_class_is_refused_with_advice(tmp_path: Path) -> None:
    error = refusal(tmp_path, HEADER + "a,m.mp4,0,1,x\nb,m.mp4,1,2,\n")
    assert "row 3: action is empty: clips without a class" in error


def test_ids_are_no_shortcut_where_names_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("id,key\n0,1\n1,2\n2,3\n")
    heads = {"heads": {"action": "classes.csv"}}
    assert labels(read(tmp_path, HEADER + "a,m.mp4,0,1,1\n", **heads)) == {"a": "1"}
    assert "action '0' is not among" in refusal(tmp_path, HEADER + "a,m.mp4,0,1,0\n", **heads)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("id,key\n0,a\n1,a\n", "row 3: key 'a' is already that of"),
        ("id,key\n0,a\n1,\n", "row 3: key is empty"),
        ("id,key\n0,a\n\u0661,b\n", "row 3: id '\u0661' is not a whole number"),
        ("id,key\n0,a\n-1,b\n", "without a gap"),
        ("id,key\n0,a\n" + "9" * 400 + ",b\n", r"row 3: id '9+.* is not a whole number"),
    ],
)
def test_a_faulty_class_file_is_refused(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "classes.csv").write_text(content)
    (tmp_path / "train.csv").write_text(HEADER + "a,m.mp4,0,1,a\n")
    with pytest.raises(UserError, match=named):
        read(tmp_path, HEADER + "a,m.mp4,0,1,a\n", heads={"action": "classes.csv"})


def test_keys_that_differ_in_case_are_two_clips(tmp_path: Path) -> None:
    assert labels(read(tmp_path, HEADER + "a,m.mp4,0,1,x\nA,m.mp4,0,1,y\n")) == {"a": "x", "A": "y"}


cells = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"], exclude_characters="\ufeff"))


@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_a_csv_writer_writes_is_read_back(tmp_path: Path, table: list[list[str]]) -> None:
    written = [["x", *cells] for cells in table]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["a", "b", "c", "d"], *written])
    assert [list(fields.values()) for _, fields in rows(tmp_path / "t.csv", ("a",))] == written


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with contextlib.suppress(UserError):
        list(rows(tmp_path / "t.csv", ("key",)))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"verb_class": "-1"}, "verb_class -1 is no class: .*unlabelled_splits"),
        ({"verb_class": "1.0"}, "verb_class '1.0' is not a whole number"),
        ({"verb_class": ""}, "verb_class '' is not a whole number"),
        ({"noun_class": "\u0661"}, "noun_class '\u0661' is not a whole number"),
        ({"start_frame": "1_0"}, "start_frame '1_0' is not a whole number"),
        ({"stop_frame": "9" * 400}, "stop_frame '9+.* is not a whole number"),
        ({"stop_timestamp": "9" * 400 + ":00:00"}, "is not HH:MM:SS"),
        ({"stop_timestamp": "00:00:0\u0663"}, "is not HH:MM:SS"),
        ({"narration": "a\x07b"}, r"narration has the character U\+0007"),
    ],
)
def test_a_faulty_row_of_epic_kitchens_is_refused(tmp_path: Path, bad: dict, named: str) -> None:
    write_epic(tmp_path, [row("P01_01_0"), row("P01_01_1") | bad])
    with pytest.raises(UserError, match=rf"EPIC_100_train\.csv, row 3.*{named}"):
        read_epic_kitchens(epic_spec(tmp_path))


@pytest.mark.parametrize("kind", ["dangling link", "loop", "fifo", "folder"])
@pytest.mark.parametrize("name", ["annotations/EPIC_100_train.csv", "EPIC-KITCHENS-100_audio.hdf5"])
def test_what_is_no_annotation_file_is_refused_and_not_skipped(tmp_path: Path, kind: str, name: str) -> None:
    write_epic(tmp_path, [row("P01_01_0")], [row("P01_01_1")])
    path = tmp_path / name
    path.unlink(missing_ok=True)
    match kind:
        case "dangling link":
            path.symlink_to("/nowhere/train.csv")
        case "loop":
            path.symlink_to(path)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    with pytest.raises(UserError, match=path.name):
        read_epic_kitchens(epic_spec(tmp_path))


def test_a_medium_is_found_in_either_unicode_form_and_with_its_suffix_in_another_case(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for on_disk, in_table in (
        (f"{composed}.mp4", f"{decomposed}.mp4"), (f"{decomposed}.mp4", f"{composed}.mp4"),
        ("m.MP4", "m.mp4"), (f"{decomposed}.Mp4", f"{composed}.mp4"),
    ):  # fmt: skip
        path = tmp_path / on_disk
        path.touch()
        plan = read(tmp_path, HEADER + f"a,{in_table},0,1,x\n")
        assert plan.recordings[0].video_file == path
        assert not plan.recordings[0].problems
        assert any("1 media found under another spelling" in note for note in plan.notes)
        path.unlink()


def test_a_name_that_fits_two_files_or_another_stem_finds_none(tmp_path: Path) -> None:
    for name in ("m.MP4", "m.Mp4", "N.mp4"):
        (tmp_path / name).touch()
    two, other = read(tmp_path, HEADER + "a,m.mp4,0,1,x\nb,n.mp4,0,1,x\n").recordings
    assert "m.MP4 and m.Mp4 do" in two.problems[tmp_path / "m.mp4"]
    assert other.video_file is None
    exact = read(tmp_path, HEADER + "a,m.MP4,0,1,x\n").recordings[0]
    assert (exact.video_file, exact.problems) == (tmp_path / "m.MP4", {})


def test_two_spellings_of_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.MP4").touch()
    assert "row 3: " in (error := refusal(tmp_path, HEADER + "a,m.mp4,0,1,x\nb,m.MP4,0,1,x\n"))
    assert "tell them apart" in error or "write them alike" in error


LABELS = {"Holding [something]": "0", "Pushing [something]": "1"}
ENTRY = '{"id": "7", "template": "Holding [something]"}'


def read_ss(root: Path, train: str, classes: str | None = None) -> Plan:
    (root / "labels").mkdir(exist_ok=True)
    names = {name.replace("[", "").replace("]", ""): number for name, number in LABELS.items()}
    (root / "labels" / "labels.json").write_text(classes if classes is not None else json.dumps(names))
    (root / "labels" / "train.json").write_text(train)
    fields = {"reader": "something_something", "dataset": "t", "raw": str(root), "out": str(root / "out")}
    return read_something_something(PackingSpec.model_validate(fields))


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ("[" * 100_000 + "]" * 100_000, "entry 2: not JSON: nested too deeply"),
        ('{"id": ' + "9" * 400 + ', "template": "x"}', "entry 2: not JSON: a number of 400 digits"),
        ('{"id": ' + "9" * 5000 + ', "template": "x"}', "entry 2: not JSON: a number of 5000 digits"),
        ('{"id": "8", "id": "9"}', "entry 2: not JSON: 'id' occurs twice"),
        ('{"id": NaN}', "entry 2: not JSON: NaN is not a JSON number"),
        ('{"id": "8", "x": [-Infinity]}', "entry 2: not JSON: -Infinity"),
        ('{"id": "8", "x": 1e999}', "entry 2: not JSON: 1e999 is too large"),
        (r'{"id": "8", "template": "Holding [something]", "label": "\ud800"}', "entry 2: not JSON: .*surrogate"),
        (r'{"id": "8", "x": [["\udfff"]]}', "entry 2: not JSON: .*surrogate"),
        ('{"id": 8.5}', "entry 2: 'id' is 8.5"),
        ('{"id": true}', "entry 2: 'id' is True"),
        ('{"id": null}', "entry 2: 'id' is None"),
        ('{"id": "' + "8" * 400 + '"}', "entry 2: id '8+.* has 400 characters"),
        ('{"id": "8"', "entry 2: not JSON"),
        ("", "entry 2: not JSON"),
    ],
)
def test_a_faulty_json_entry_is_refused_by_its_number(tmp_path: Path, second: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"train\.json, {named}") as caught:
        read_ss(tmp_path, f"[{ENTRY}, {second}]")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "named"),
    [("", "expected a JSON list"), ("{}", "expected a JSON list"), ("[]", "has no entry"), (f"[{ENTRY}", "entry 2"),
     (f"[{ENTRY}] x", "Extra data"), (f"[{ENTRY} {ENTRY}]", "Expecting ','"), ("<html>", "web page"),
     ("version https://git-lfs.github.com/spec/v1\n", "Git LFS")],
)  # fmt: skip
def test_what_is_no_json_list_is_refused(tmp_path: Path, content: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"train\.json.*{named}"):
        read_ss(tmp_path, content)


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        ('{"a": "0", "a": "1"}', "'a' occurs twice"),
        ('{"a": "0", "b": "0"}', "'a' and 'b' have the same id 0"),
        ('{"a": "00"}', "id of 'a' is '00'"),
        ('{"a": "\u0660"}', "id of 'a'"),
        ('{"a": ' + "1" * 400 + "}", "a number of 400 digits"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"\ud800": "0"}', "surrogate"),
    ],
)
def test_faulty_classes_in_json_are_refused(tmp_path: Path, classes: str, named: str) -> None:
    with pytest.raises(UserError, match=rf"labels\.json.*{named}"):
        read_ss(tmp_path, f"[{ENTRY}]", classes)


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    assert len(read_ss(tmp_path, f"\ufeff[{ENTRY}]").recordings) == 1
