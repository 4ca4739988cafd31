"""Tests of files of annotated boxes: entries are indexed in chunks, placed, clamped, and refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities.detections import store as boxes_module
from karmma_dist.modalities.detections.store import detections_json, index_boxes, read_boxes
from karmma_dist.modalities.recording import MediaError


def _label(x0: float, y0: float, x1: float, y1: float, category: str = "cup") -> dict:
    standard = "hand" if category == "hand" else "0000"
    return {"box2d": {"x1": x0, "y1": y0, "x2": x1, "y2": y1}, "category": category, "standard_category": standard}


def _object(x0: float, y0: float, x1: float, y1: float, hand: bool, score: float) -> dict:
    corners = {"x1": x0, "y1": y0, "x2": x1, "y2": y1}
    return corners | {"category": "hand" if hand else "object", "score": score}


numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
plain = st.none() | numbers | st.text('a{}[]",:\\é', max_size=5)
values = st.recursive(plain, lambda v: st.lists(v, max_size=4), max_leaves=8)
entries = st.dictionaries(st.text("0123456789", min_size=1, max_size=6), st.lists(values, max_size=3), max_size=8)


@given(entries, st.sampled_from([None, 1]), st.integers(1, 64))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_indexed_entry_equals_that_of_the_parsed_file(
    tmp_path: Path, content: dict, indent: int | None, chunk: int
) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes_module, "_CHUNK_BYTES", chunk)
        entries = index_boxes(path)
        listed = tmp_path / "list.json"
        listed.write_text(json.dumps([{"id": key, "frames": value} for key, value in content.items()], indent=indent))
        list_entries = index_boxes(listed)
    assert {key: read_boxes(*entry) for key, entry in entries.items()} == content
    assert {key: read_boxes(*entry)["frames"] for key, entry in list_entries.items()} == content


@pytest.mark.parametrize(
    "text",
    ["", "3", '"boxes"', "[1]", "{1: []}", '{"1": [1, 2], "2": [', '{"1": [1]', '{"1": [1]} x', '{"1": [1]]',
     '{"1": [] {"2": []}', '[{"id": 1, "frames": []}', '[{"id": 1, "frames": []}}', '[{"id": 1, "frames": []}] []'],
)  # fmt: skip
def test_an_incomplete_file_of_boxes_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"boxes\.json: not a complete JSON object"):
        index_boxes(path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"a.json": '{"7": [], "7": []}'}, r"a\.json: clip '7' has boxes twice"),
        ({"a.json": '[{"id": 7, "frames": []}, {"id": "7", "frames": []}]'}, r"a\.json: .*'7' has boxes twice"),
        ({"a.json": '{"7": []}', "b.json": '[{"id": "7", "frames": []}]'}, r"b\.json: .*'7'.*the other is in a\.json"),
        ({"a.json": '[{"id": "7", "frames": []}, {"frames": []}]'}, r"a\.json, entry 2: expected an object with 'id'"),
        ({"a.json": '{"7": []}', "b.json": '{"8": ['}, r"b\.json: not a complete JSON object"),
        ({"a.json.gz": ""}, r"no \.json file of boxes"),
    ],
)
def test_bad_or_duplicate_files_of_boxes_are_refused_by_name(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        index_boxes(tmp_path)


corner = st.floats(-500, 1500)


score = st.floats(0, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner, st.booleans(), score), max_size=30), st.integers(1, 14))
def test_the_best_boxes_are_kept_hands_first_and_clamped(boxes: list, max_boxes: int) -> None:
    entry = {"id": "1", "frames": [{"frame_objects": []}, {"frame_objects": [_object(*box) for box in boxes]}]}
    data, number = detections_json(entry, 427, 240, 3, max_boxes)
    frames = json.loads(data)["frames"]
    assert [len(frame) for frame in frames] == [0, number, 0]
    assert number <= max_boxes
    ranks = [(box[4], -box[5]) for box in frames[1]]
    assert ranks == sorted(ranks)
    all_boxes = json.loads(detections_json(entry, 427, 240, 3, 30)[0])["frames"][1]
    assert frames[1] == all_boxes[:max_boxes]
    for x0, y0, x1, y1, category, _ in all_boxes:
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert category in (1, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner, st.booleans()), max_size=30), st.integers(1, 14))
def test_both_formats_give_the_same_detections(boxes: list, max_boxes: int) -> None:
    labels = [_label(*box[:4], "hand" if box[4] else "cup") for box in boxes]
    objects = [_object(*box, 1.0) for box in boxes]
    data, number = detections_json([{"name": "1/0002.jpg", "labels": labels}], 427, 240, 3, max_boxes)
    compact = {"id": "1", "frames": [{"frame_objects": []}, {"frame_objects": objects}]}
    assert (data, number) == detections_json(compact, 427, 240, 3, max_boxes)


@pytest.mark.parametrize(
    ("category", "stored"),
    [("hand", 1), ("hand 2", 1), ("object hand", 1), ("hand_0", 1), ("object", 2), ("handbag", 2), ("shorthand", 2)],
)
def test_a_hand_is_a_whole_word(category: str, stored: int) -> None:
    entry = {"frames": [{"frame_objects": [_object(0, 0, 9, 9, False, 1.0) | {"category": category}]}]}
    assert json.loads(detections_json(entry, 20, 20, 1, 14)[0])["frames"][0][0][4] == stored


def test_frames_are_placed_by_numbers_from_0_or_1() -> None:
    for first in (0, 1):
        frames = [{"name": f"1/{first + n:04d}.jpg", "labels": [_label(0, 0, 9, 9)] * n} for n in (1, 2, 7)]
        named_first = [{"name": f"1/{first:04d}.jpg", "labels": []}]
        data, number = detections_json([*frames, *named_first], 20, 20, 4, 14)
        assert [len(frame) for frame in json.loads(data)["frames"]] == [0, 1, 2, 0]
        assert number == 3


@pytest.mark.parametrize(
    "frames",
    [
        [{"name": "1/0001.jpg"}],
        [{"labels": [{"box": 3}]}],
        ["x"],
        [{"labels": 3}],
        {"frames": {"a": 1}},
        {"frames": [{"frame_objects": [{"category": "hand"}]}]},
        {"frames": [{"frame_objects": [{"category": "cup", "x1": float("nan"), "x2": 1, "y1": 0, "y2": 1}]}]},
        3,
    ],
)
def test_boxes_of_another_format_fail_the_clip(frames: Any) -> None:
    with pytest.raises(MediaError, match="another format"):
        detections_json(frames, 427, 240, 3, 14)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ('[{"labels": [{"box2d": null}]}]', r"frames\[0\]\.labels\[0\]\.box2d is None"),
        ('[{"labels": []}, {"labels": [{"box2d": {"x1": null}}]}]', r"frames\[1\]\.labels\[0\]\.box2d\.x1 is None"),
        ('[{"labels": [{"box2d": {"x1": ' + "9" * 300 + "}}]}]", r"frames\[0\]\.labels\[0\]\.box2d\.x1 is 9+"),
        ('[{"labels": [{"box2d": {"x1": ' + "9" * 400 + "}}]}]", "a number of 400 digits"),
        ('[{"labels": [{"box2d": {"x1": 1e999}}]}]', "1e999 is too large"),
        ('[{"labels": [{"box2d": {"x1": NaN}}]}]', "NaN is not a JSON number"),
        ('[{"labels": [], "labels": []}]', "'labels' occurs twice"),
        (r'[{"labels": [], "name": "\ud800"}]', "surrogate"),
        ('[{"labels": [], "name": "' + "9" * 5000 + '.jpg"}]', "another format"),
    ],
)
def test_a_faulty_entry_fails_its_clip_by_frame_and_field(tmp_path: Path, value: str, named: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text('{"7": [], "8": ' + value + "}")
    entries = index_boxes(path)
    assert detections_json(read_boxes(*entries["7"]), 20, 20, 1, 14)[1] == 0
    with pytest.raises(MediaError, match=named) as caught:
        detections_json(read_boxes(*entries["8"]), 20, 20, 1, 14)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("opening", ['{"7": [], "8": ', '[{"id": "7", "frames": []}, {"id": "8", "frames": '])
@pytest.mark.parametrize(
    ("value", "named"), [("[" * 100_000, "nested too deeply"), ("[" + "9" * 5000 + "]}", "limit .*4300")]
)
def test_an_entry_that_python_cannot_hold_is_refused_by_number(
    tmp_path: Path, opening: str, value: str, named: str
) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(opening + value)
    with pytest.raises(UserError, match=rf"boxes\.json, entry 2: .*{named}"):
        index_boxes(path)


def test_a_file_that_is_damaged_near_its_start_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "boxes.json"
    path.write_text('{"7": [}' + " " * 10_000 + "}")
    monkeypatch.setattr(boxes_module, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(boxes_module, "_MOST_ENTRY_BYTES", 256)
    with pytest.raises(UserError, match=r"boxes\.json, entry 1: not a clip's boxes in 256 bytes"):
        index_boxes(path)


@pytest.mark.parametrize("kind", ["fifo", "dangling", "folder", "loop"])
def test_a_file_of_boxes_that_is_no_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.json").write_text('{"7": []}')
    path = tmp_path / "b.json"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "dangling":
            path.symlink_to("/nowhere")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
    with pytest.raises(UserError, match=r"b\.json: (cannot be read|is not a file)"):
        index_boxes(tmp_path)
