"""Tests of typed YAML: inheritance, variables, overrides, and helpful errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from karmma_dist.errors import UserError
from karmma_dist.settings import Settings, dump, find_file, flat, load_settings, mark, marked, unmarked


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
