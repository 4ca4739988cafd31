"""Packing specifications: what they accept, refuse and record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.io.json_fields import shown
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing import pack as pack_module
from karmma_dist.packing.readers import readers
from karmma_dist.packing.readers.csv_table import PlainPaths
from karmma_dist.packing.readers.reader import Reader
from karmma_dist.packing.records import Plan
from karmma_dist.packing.spec import NOT_IN_BYTES, PackingSpec, load_spec
from karmma_dist.settings import flat
from karmma_dist.shards.format import TAR_NAME, shard_name, split_problem
from kits.settings import fields_of, holder, with_another

SPECS = sorted(path.stem for path in (Path(__file__).parents[3] / "shards").glob("*.yaml"))


def _spec(tmp_path: Path, text: str = "", reader: str = "epic_kitchens") -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(f"reader: {reader}\ndataset: test\nraw: r\nout: o\n{text}")
    return str(path)


@pytest.mark.parametrize("name", SPECS)
def test_every_shipped_specification_loads(name: str) -> None:
    spec = load_spec(name)
    assert spec.modalities[:2] == ["video", "flow"]


@pytest.mark.parametrize("name", SPECS)
def test_recorded_settings_hold_no_folder_of_this_machine(name: str, tmp_path: Path) -> None:
    recorded = load_spec(name, raw=tmp_path / "raw", out=tmp_path / "out").recorded()
    assert str(tmp_path) not in json.dumps(recorded)
    assert recorded == load_spec(name).recorded()


def test_raw_given_on_the_command_line_needs_no_environment_variable(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("reader: epic_kitchens\ndataset: d\nraw: ${SURELY_NOT_SET_ANYWHERE}\nout: o\n")
    with pytest.raises(UserError, match="SURELY_NOT_SET_ANYWHERE"):
        load_spec(str(path))
    assert load_spec(str(path), raw=tmp_path).raw == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("vidio: {}\n", "video"),
        ("video: {short: 3}\n", "video.short"),
        ("video: {region: [0.5, 0, 0.5, 1]}\n", "region"),
        ("video: {region: [0, 0, 1.5, 1]}\n", "region"),
        ("flow: {source: magic}\n", "flow.source"),
        ("clips_per_shard: 0\n", "clips_per_shard"),
        ("detections: {max_boxes: 3}\n", "detections"),
        ("something_something: {}\n", "something_something"),
        ("video: {source: none}\nflow: {source: none}\naudio: {source: none}\n", "nothing would be stored"),
    ],
)
def test_wrong_settings_and_those_without_effect_are_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")) as caught:
        load_spec(_spec(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["audio: {source: none}\n", "participants: [P01]\n"])
def test_something_something_refuses_what_it_has_not(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="no effect"):
        load_spec(_spec(tmp_path, text, "something_something"))


def test_a_modality_switched_off_is_not_declared(tmp_path: Path) -> None:
    assert load_spec(_spec(tmp_path, "flow: {source: none}\n")).modalities == ["video", "audio"]


def _plain_defaults() -> Iterator[PackingSpec]:
    for reader in readers():
        yield PackingSpec(reader=reader, dataset="test", raw="r", out="o")


def _without(tree: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the tree without one entry."""
    first, _, rest = path.partition(".")
    if rest and first in tree:
        return {**tree, first: _without(tree[first], rest)}
    return {name: value for name, value in tree.items() if name != first}


@pytest.mark.parametrize("spec", _plain_defaults(), ids=lambda spec: spec.reader)
def test_a_setting_without_a_record_counts_as_its_default(spec: PackingSpec) -> None:
    fields = fields_of(spec, NOT_IN_BYTES)
    assert {name for name, is_free in fields.items() if is_free} == {"raw", "out"}
    assert len(fields) > 25
    for name, is_free in fields.items():
        if name in readers():
            continue  # section of another reader, which this one refuses
        recorded, changed = _without(spec.recorded(), name), with_another(spec, name)
        section, own_name = holder(spec, name)
        if type(section).model_fields[own_name].is_required() and not is_free:
            assert list(spec.differences(recorded)) == [name]
        else:
            assert spec.differences(recorded) == {}
        differing = list(changed.differences(recorded))
        assert bool(differing) is not is_free
        assert all(f"{other}.".startswith(f"{name}.") for other in differing)


@pytest.mark.parametrize("spec", _plain_defaults(), ids=lambda spec: spec.reader)
def test_a_section_without_a_record_counts_as_its_defaults(spec: PackingSpec) -> None:
    recorded = spec.recorded()
    sections = [name for name, value in recorded.items() if isinstance(value, dict)]
    assert {"video", spec.reader} < set(sections)
    for section in sections:
        assert spec.differences(_without(recorded, section)) == {}
    changed = with_another(spec, "video.crf")
    assert changed.differences(_without(recorded, "video")) == {"video.crf": (23, 24)}


def test_a_setting_that_is_recorded_and_not_known_here_differs() -> None:
    spec = next(_plain_defaults())
    recorded = spec.recorded()
    recorded["video"]["sharpness"] = 3
    assert spec.differences(recorded) == {"video.sharpness": (3, None)}
    assert spec.differences(json.loads(json.dumps(spec.recorded()))) == {}
    assert "video.sharpness" not in flat(spec.recorded())


BAD_SPLITS = [
    "../evil", "", ".", "..", "/tmp/evil", "a/b", "a\\b", "a\0b", "a\nb", "a b", "a.b", "x" * 101, "manifest",
    "Failures", "train-000000", "-train", "tra\u00efn", "\x1b[31m", "*",
]  # fmt: skip
"""Names that no split may have: files begin with them."""


@pytest.mark.parametrize(
    ("reader", "field"),
    [
        ("plain", "splits"), ("epic_kitchens", "splits"), ("epic_sounds", "splits"), ("something_something", "splits"),
        ("epic_kitchens", "hold_out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", BAD_SPLITS)
def test_a_name_that_cannot_begin_a_file_is_no_split(tmp_path: Path, reader: str, field: str, split: str) -> None:
    named: dict[str, Any] = {split: 0.1} if field == "hold_out" else {"train": "train.csv", split: "other.csv"}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"reader": reader, "dataset": "d", "raw": "r", "out": "o", reader: {field: named}}))
    with pytest.raises(UserError) as caught:
        load_spec(str(path))
    said = str(caught.value)
    assert said.startswith(f"{path}: {reader}.{field}: ")
    assert shown(split) in said
    assert "is no name of a split" in said
    assert said.isprintable()


def test_splits_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    sections = {"plain": {"splits": {"train": "a.csv", "Train": "b.csv"}}}
    sections |= {"epic_kitchens": {"splits": {"train": "a.csv"}, "hold_out": {"TRAIN": 0.1}}}
    for reader, section in sections.items():
        with pytest.raises(UserError, match=f"{reader}.*'train' and 'T[rR].*differ only in case"):
            load_spec(_spec(tmp_path, f"{reader}: {json.dumps(section)}\n", reader))


def test_a_reader_of_another_package_cannot_leave_the_folder_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = ClipRecord("k", "../evil", 0.0, 1.0, {})
    recording = Recording("r", "p", (clip,), video_file=tmp_path / "none.mp4")
    for plan in (Plan((recording,), {}, ("train",)), Plan((), {}, ("../evil",))):
        reader = Reader(PlainPaths, lambda _, plan=plan: plan, ("video", "flow", "audio"))
        monkeypatch.setattr(pack_module, "find_reader", lambda _, reader=reader: reader)
        spec = PackingSpec(reader="plain", dataset="d", raw=str(tmp_path), out=str(tmp_path / "out"))
        with pytest.raises(UserError, match=r"reader plain: '\.\./evil' is no name of a split"):
            pack_module.pack(spec)
    assert list(tmp_path.iterdir()) == []


@given(st.text(min_size=1, max_size=120))
def test_a_shard_of_a_split_that_is_taken_lies_in_its_folder(split: str) -> None:
    if split_problem([split]):
        return
    name = shard_name(split, 0)
    match = TAR_NAME.fullmatch(name)
    assert match is not None
    assert match[1] == split
    assert Path("folder", name).parent == Path("folder")
