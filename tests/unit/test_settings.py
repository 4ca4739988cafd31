"""Tests of typed YAML: inheritance, variables, overrides, and helpful errors."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from karmma_dist.errors import UserError
from karmma_dist.io.named_file import find_file
from karmma_dist.settings import Settings, dump, flat, load_settings, mark, marked, unmarked
from kits.patience import HANGS_S


class Inner(Settings):
    rate: float = 1.0
    """A rate."""
    names: list[str] = []
    """Names."""


class Outer(Settings):
    title: str
    """A title."""
    inner: Inner = Inner()
    """A section."""
    table: dict[str, Inner] = {}
    """Sections by name."""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_extends_merges_sections_key_by_key_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "title: base\ninner: {rate: 2, names: [a, b]}")
    path = write(tmp_path, "sub/top.yaml", "extends: ../base.yaml\ninner: {names: [c]}")
    assert load_settings(path, Outer) == Outer(title="base", inner=Inner(rate=2, names=["c"]))


def test_an_override_wins_over_the_file_and_reaches_into_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "title: a")
    loaded = load_settings(path, Outer, ["inner.rate=3", "table.x.names=[p, q]", "title=b"])
    assert loaded == Outer(title="b", inner=Inner(rate=3), table={"x": Inner(names=["p", "q"])})


def test_dumped_settings_load_to_equal_settings(tmp_path: Path) -> None:
    settings = Outer(title="x: 'y'", inner=Inner(rate=0.1), table={"z": Inner(names=["ü"])})
    assert load_settings(write(tmp_path, "d.yaml", dump(settings)), Outer) == settings


def test_variables_are_expanded_and_an_unset_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.yaml", "title: ${KD_ROOT:-home}/x")
    monkeypatch.delenv("KD_ROOT", raising=False)
    assert load_settings(path, Outer).title == "home/x"
    monkeypatch.setenv("KD_ROOT", "/data")
    assert load_settings(path, Outer).title == "/data/x"
    with pytest.raises(UserError, match="KD_MISSING is not set"):
        load_settings(write(tmp_path, "b.yaml", "title: ${KD_MISSING}"), Outer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\ninner: {rat: 1}", r"bad\.yaml: unknown key 'inner\.rat' \(did you mean 'rate'\?\)"),
        ("title: a\ntable: {x: {nmes: []}}", r"unknown key 'table\.x\.nmes' \(did you mean 'names'\?\)"),
        ("inner: {}", r"key 'title' is missing"),
        ("title: a\ninner: {rate: fast}", r"'inner\.rate': .*number.* \(given: 'fast'\)"),
        ("title: [", r"not valid YAML"),
        ("- a", r"expected keys and values"),
        ("extends: nowhere.yaml", r"extends .*nowhere\.yaml, which does not exist"),
        ("extends: bad.yaml", r"extends itself"),
    ],
)
def test_a_wrong_file_is_one_line_naming_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_settings(write(tmp_path, "bad.yaml", text), Outer)
    assert "\n" not in str(caught.value)


def test_invalid_overrides_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "title: a")
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        load_settings(path, Outer, ["title"])
    with pytest.raises(UserError, match="holds a value, not a section"):
        load_settings(path, Outer, ["title.x=1"])


def test_a_file_is_found_by_name_or_the_nearest_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "recipes/kitchen/teacher.yaml", "title: a")
    for name in ("kitchen/teacher", "kitchen/teacher.yaml", "recipes/kitchen/teacher.yaml"):
        assert find_file(name, "recipes").samefile("recipes/kitchen/teacher.yaml")
    with pytest.raises(UserError, match="did you mean 'kitchen/teacher'"):
        find_file("kitchen/teachr", "recipes")


def test_a_name_cannot_leave_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work" / "recipes").mkdir(parents=True)
    write(tmp_path, "secret.yaml", "title: a")
    monkeypatch.chdir(tmp_path / "work")
    for name in ("../../secret", "recipes/../setup.cfg", "setup.cfg"):  # setup.cfg lies beside the folder
        with pytest.raises(UserError, match="no such file"):
            find_file(name, "recipes")


MARK, OTHER_MARK = mark("marked"), mark("other")


class MarkedPart(Settings):
    """A section."""

    kept: int = 1
    """Kept."""
    left_out: Annotated[int, Field(gt=0), MARK] = 2
    """Marked."""


class MarkedWhole(Settings):
    """Sections in sections."""

    sections: dict[str, MarkedPart] = {}
    """Sections by name."""
    section: Annotated[MarkedPart, OTHER_MARK] = MarkedPart()
    """Marked otherwise."""
    sizes: dict[str, int] = {}
    """Plain values."""
    nothing: Annotated[str | None, MARK] = None
    """Marked."""


def test_a_field_bears_each_of_its_marks() -> None:
    class Part(Settings):
        """A section."""

        both: Annotated[int, MARK, OTHER_MARK] = 1
        """Marked twice."""

    assert marked(Part, MARK) == marked(Part, OTHER_MARK) == ["both"]


def test_marked_fields_are_left_out_at_any_depth() -> None:
    outer = MarkedWhole(sections={"a": MarkedPart(), "b": MarkedPart(kept=5)}, sizes={"width": 3})
    assert unmarked(outer, MARK) == {
        "sections": {"a": {"kept": 1}, "b": {"kept": 5}}, "section": {"kept": 1}, "sizes": {"width": 3},
    }  # fmt: skip
    assert flat(unmarked(outer, OTHER_MARK)) == {
        "sections.a.kept": 1, "sections.a.left_out": 2, "sections.b.kept": 5, "sections.b.left_out": 2,
        "sizes.width": 3, "nothing": None,
    }  # fmt: skip
    assert flat(unmarked(MarkedWhole(), MARK)) == {"sections": {}, "section.kept": 1, "sizes": {}}


def test_a_mark_is_shown_in_the_schema() -> None:
    field = MarkedWhole.model_json_schema()["$defs"]["MarkedPart"]["properties"]["left_out"]
    assert (field["marked"], field["exclusiveMinimum"], field["description"]) == (True, 0, "Marked.")
    with pytest.raises(ValueError, match="greater than 0"):
        MarkedPart(left_out=0)


def test_an_override_is_what_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "title: a")
    for text in ("a #b", "12:00:00", "010", "a: b", "- a", "1e-4", "yes", "#b"):
        assert load_settings(path, Outer, [f"title={text}"]).title == text
    assert load_settings(path, Outer, ["inner.rate=1e-4"]).inner.rate == 1e-4
    assert load_settings(path, Outer, ["inner=rate: 3"]).inner.rate == 3
    assert load_settings(path, Outer, ["inner=", "inner.rate=3"]).inner.rate == 3
    assert load_settings(path, Outer, ["inner=rate: 3", "inner.names=[a]"]).inner == Inner(rate=3, names=["a"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("title=", r"'title': .*\(given: None\)"), ("title=[1,", "not valid YAML"), ("title=&a [*a]", "begins with &"),
        ("..=1", "expected KEY=VALUE"), ("a..b=1", "expected KEY=VALUE"), ("=1", "expected KEY=VALUE"),
        (".title=1", "expected KEY=VALUE"), ("title.=1", "expected KEY=VALUE"), ("a." * 5000 + "b=1", "expected KEY"),
        ("inner.rate=3 #x", "expected a number"), ("inner.names=[a] #x", "'#x' follows the value"),
        ("inner.rate=010", "write 10, or 8"), ("k" * 100_000, "expected KEY=VALUE"), ("title=[" + "x" * 99_999, "YAML"),
        ("k" * 100_000 + "=1", "unknown key 'kkk"), ("title={a: " + "x" * 50_000 + "}", "valid string"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_wrong_override_is_a_short_line(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "a.yaml", "title: a")
    with pytest.raises(UserError, match=message) as caught:
        load_settings(path, Outer, [override])
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "named",
    [
        "[base.yaml]", "{a: b}", "3", "''", "null", "", "~", ".", "a.yaml", "pipe", "/dev/zero", "loop", '"a\\0b"',
        "x" * 300, "nowhere.yaml", "~nobody-has-this-name/x",
    ],
)  # fmt: skip
def test_what_is_extended_is_one_file(tmp_path: Path, named: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    write(tmp_path, "base.yaml", "title: base")
    with pytest.raises(UserError) as caught:
        load_settings(write(tmp_path, "a.yaml", f"extends: {named}\ntitle: a"), Outer)
    assert len(str(caught.value).splitlines()) == 1


def test_a_long_row_of_extended_files_is_refused(tmp_path: Path) -> None:
    for number in range(2000):
        write(tmp_path, f"{number}.yaml", f"extends: {number + 1}.yaml")
    with pytest.raises(UserError, match="32 files extend each other"):
        load_settings(tmp_path / "0.yaml", Outer)


def test_a_variable_is_a_number_where_one_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.yaml", "title: ${KD_X}\ninner: {rate: '${KD_X}'}")
    monkeypatch.setenv("KD_X", "1e-3")
    assert load_settings(path, Outer) == Outer(title="1e-3", inner=Inner(rate=1e-3))
    for value, message in (("010", "write 10"), ("inf", "finite"), ("x" * 9_000, "expected a number")):
        monkeypatch.setenv("KD_X", value)
        with pytest.raises(UserError, match=message):
            load_settings(path, Outer)


def test_a_text_full_of_unfinished_variables_is_read_soon(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", f"title: a\ninner: {{names: ['{'${a:-' * 19_000}']}}")
    began = time.process_time()
    with pytest.raises(UserError, match="a text of 95,000 characters"):
        load_settings(path, Outer)
    assert time.process_time() - began < HANGS_S


def test_a_folder_or_pipe_is_no_file_and_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.mkfifo("pipe")
    for name in ("pipe", ".", "/dev/zero"):
        with pytest.raises(UserError, match="name a file"):
            find_file(name, "recipes")
    assert find_file(str(write(tmp_path, "a.yaml", "title: a")), "recipes") == find_file("~/a.yaml", "recipes")
    for name in ("x" * 5_000, "a\0b", ""):
        with pytest.raises(UserError):
            find_file(name, "recipes")
