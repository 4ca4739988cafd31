"""Packing specifications: what they accept, refuse and record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.packing.readers import readers
from karmma_dist.packing.spec import NOT_IN_BYTES, PackingSpec, load_spec
from karmma_dist.settings import flat
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
        if name in ("epic_kitchens", "something_something", "plain"):
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
