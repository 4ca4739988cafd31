"""Packing specifications: what they accept, refuse and record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.packing.spec import load_spec

SPECS = sorted(path.stem for path in (Path(__file__).parents[2] / "shards").glob("*.yaml"))


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
def test_a_setting_that_is_wrong_or_has_no_effect_is_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")) as caught:
        load_spec(_spec(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["audio: {source: none}\n", "participants: [P01]\n"])
def test_something_something_refuses_what_it_has_not(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="no effect"):
        load_spec(_spec(tmp_path, text, "something_something"))


def test_a_modality_switched_off_is_not_declared(tmp_path: Path) -> None:
    assert load_spec(_spec(tmp_path, "flow: {source: none}\n")).modalities == ["video", "audio"]
