"""Something-Something V2 and Something-Else's boxes: read, placed, clamped, refused."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_kit import decode, number_picture, read_number, write_frames, write_movie

from karmma_dist.errors import UserError
from karmma_dist.packing import boxes as boxes_module
from karmma_dist.packing.boxes import detections_json, index_boxes, read_boxes
from karmma_dist.packing.cut import cut_recording
from karmma_dist.packing.numbered_frames import NumberedFrames
from karmma_dist.packing.pack import pack
from karmma_dist.packing.records import CutClip, Failure, MediaError
from karmma_dist.packing.something_something import read_something_something
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.shards import ShardFolder

LABELS = {"Pushing something down": "1", "Holding something": "0"}
TRAIN = [
    {"id": "7", "template": "Pushing [something] down", "label": "pushing a cup down"},
    {"id": 12, "template": "Holding [something]"},
]


def _spec(raw: Path, **fields: object) -> PackingSpec:
    base = {"reader": "something_something", "dataset": "ss", "raw": str(raw), "out": str(raw / "out")}
    return PackingSpec.model_validate(base | fields)


def _label(x0: float, y0: float, x1: float, y1: float, category: str = "cup") -> dict:
    standard = "hand" if category == "hand" else "0000"
    return {"box2d": {"x1": x0, "y1": y0, "x2": x1, "y2": y1}, "category": category, "standard_category": standard}


def _frames(clip: str, *numbers: int) -> list[dict]:
    return [
        {"name": f"{clip}/{n:04d}.jpg", "labels": [_label(8, 12, 40, 24), _label(-5, 0, 90, 60, "hand")]}
        for n in numbers
    ]


def _object(x0: float, y0: float, x1: float, y1: float, hand: bool, score: float) -> dict:
    corners = {"x1": x0, "y1": y0, "x2": x1, "y2": y1}
    return corners | {"category": "hand" if hand else "object", "score": score}


def _raw(root: Path, train: list[dict] = TRAIN, labels: dict = LABELS, boxes: dict | None = None) -> Path:
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "labels.json").write_text(json.dumps(labels))
    (root / "labels" / "train.json").write_text(json.dumps(train))
    for clip in ("7", "12"):
        write_movie(root / "20bn-something-something-v2" / f"{clip}.webm", frames=20, fps=12)
    if boxes is not None:
        (root / "boxes.json").write_text(json.dumps(boxes))
    return root


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return _raw(tmp_path)


def test_template_without_brackets_gives_the_class_and_heads_are_in_label_order(tmp_path: Path) -> None:
    plan = read_something_something(_spec(_raw(tmp_path)))
    assert plan.classes == {"action": ["Holding something", "Pushing something down"]}
    assert {clip.key: clip.labels for r in plan.recordings for clip in r.clips} == {
        "7": {"action": 1},
        "12": {"action": 0},
    }
    assert plan.recordings[0].clips[0].narration == "pushing a cup down"
    assert any("no detections" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (
            {"id": "9", "template": "Holding [somethin]"},
            r"template 'Holding somethin'.*did you mean 'Holding something'",
        ),
        ({"id": "7", "template": "Holding [something]"}, "id '7' is there twice"),
        ({"id": "../7", "template": "Holding [something]"}, "id '../7'"),
        ({"id": "9"}, "'template' is missing"),
        ({"template": "Holding [something]"}, "'id'"),
        ("7", "'id'"),
    ],
)
def test_a_bad_entry_is_named_with_its_file(tmp_path: Path, bad: object, named: str) -> None:
    raw = _raw(tmp_path, train=[*TRAIN, bad])  # type: ignore[list-item]
    with pytest.raises(UserError, match=rf"train.json, entry 3.*{named}"):
        read_something_something(_spec(raw))


@pytest.mark.parametrize("labels", [{"a": "0", "b": "2"}, {"a": "x"}, {}])
def test_bad_class_ids_are_refused(tmp_path: Path, labels: dict) -> None:
    with pytest.raises(UserError, match=r"labels\.json"):
        read_something_something(_spec(_raw(tmp_path, labels=labels)))


def test_an_unlabelled_split_needs_no_template(tmp_path: Path) -> None:
    raw = _raw(tmp_path)
    (raw / "labels" / "test.json").write_text('[{"id": "99"}]')
    plan = read_something_something(_spec(raw))
    assert [c.labels for r in plan.recordings for c in r.clips if c.split == "test"] == [{"action": None}]


def test_clips_without_boxes_have_none_and_boxes_lie_on_their_frames(tmp_path: Path) -> None:
    raw = _raw(tmp_path, boxes={"7": _frames("7", 1, 2, 5)})
    pack(_spec(raw))
    folder = ShardFolder(raw / "out")
    clips = {clip.key: clip for clip in folder.clips("train")}
    assert folder.modalities == ["video", "flow", "detections"]
    assert not clips["12"].has("detections")
    detections = json.loads(folder.read(clips["7"], "detections"))
    assert (detections["width"], detections["height"]) == (80, 48)
    assert [len(boxes) for boxes in detections["frames"]] == [2, 2, 0, 0, 2] + [0] * 15
    assert detections["frames"][0] == [[0.0, 0.0, 1.0, 1.0, 1, 1.0], [0.1, 0.25, 0.5, 0.5, 2, 1.0]]
    metadata = folder.metadata(clips["7"])
    assert metadata["modalities"]["detections"]["num_frames"] == metadata["modalities"]["video"]["num_frames"] == 20
    assert metadata["stop_s"] == pytest.approx(20 / 12, abs=1e-3)


def test_boxes_of_several_files_in_both_formats_reach_their_clips(tmp_path: Path) -> None:
    raw = _raw(tmp_path)
    (raw / "boxes").mkdir()
    (raw / "boxes" / "part_1.json").write_text(json.dumps({"7": _frames("7", 2), "999": _frames("999", 1)}))
    compact = [{"id": "12", "frames": [{"frame_objects": [_object(8, 12, 40, 24, False, 0.5)]}]}]
    (raw / "boxes" / "part_2.json").write_text(json.dumps(compact))
    pack(_spec(raw, something_something={"boxes": "boxes"}))
    folder = ShardFolder(raw / "out")
    frames = {c.key: json.loads(folder.read(c, "detections"))["frames"] for c in folder.clips("train")}
    assert [len(boxes) for boxes in frames["7"]] == [0, 2] + [0] * 18
    assert frames["12"] == [[[0.1, 0.25, 0.5, 0.5, 2, 0.5]], *[[]] * 19]


def test_boxes_that_cannot_be_used_are_said_aloud(tmp_path: Path) -> None:
    raw = _raw(tmp_path, boxes={"555": []})
    assert any("none of the 1 clips in boxes.json" in note for note in read_something_something(_spec(raw)).notes)
    (raw / "boxes.json").rename(raw / "boxes.json.gz")
    with pytest.raises(UserError, match=r"boxes\.json\.gz: .*unpack"):
        read_something_something(_spec(raw))


LAYOUTS = [
    ("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg"),
    ("u/flow_{:05d}.jpg", "v/flow_{:05d}.jpg"),
    ("u/{:d}.jpg", "v/{:d}.jpg"),
    ("u/flow_x_{:05d}.jpg", "v/flow_y_{:05d}.jpg"),
    ("flow_x/{:06d}.JPG", "flow_y/{:06d}.JPG"),
    ("flow_x_{:05d}.jpg", "flow_y_{:05d}.jpg"),
    ("flow_u_{:05d}.jpeg", "flow_v_{:05d}.jpeg"),
    ("x_{:05d}.jpg", "y_{:05d}.jpg"),
    ("u_{:03d}.jpg", "v_{:03d}.jpg"),
    ("flow_{:05d}.jpg",),
]


def _write_flow(folder: Path, layout: tuple[str, ...], numbers: range) -> Path:
    """Flow whose u is 20 + 5 * place and whose v is 255 - u, place counted from the first number."""
    for place, number in enumerate(numbers):
        u_HW = np.full((48, 80), 20 + 5 * place, np.uint8)
        v_HW = 255 - u_HW
        pictures = [np.dstack([np.full_like(u_HW, 9), v_HW, u_HW])] if len(layout) == 1 else [u_HW, v_HW]
        for name, picture in zip(layout, pictures, strict=True):
            path = folder / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
            path.write_bytes(data.tobytes())
    return folder


def _tar(folder: Path, prefix: str) -> Path:
    tar = folder.with_name(f"{folder.name}.tar")
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.add(path, f"{prefix}{path.relative_to(folder)}")
    shutil.rmtree(folder)
    return tar


def _cut_with_flow(raw: Path, **fields: object) -> CutClip | Failure:
    spec = _spec(raw, flow={"source": "files", "files_bound": 20}, **fields)
    (recording,) = [r for r in read_something_something(spec).recordings if r.name == "12"]
    (found,) = cut_recording(recording, spec)
    return found


@pytest.mark.parametrize("prefix", [None, "", "./", "12/", "./12/"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_every_layout_of_flow_gives_frame_by_frame_its_values(
    raw: Path, layout: tuple[str, ...], prefix: str | None
) -> None:
    folder = _write_flow(raw / "flow" / "12", layout, range(1, 20))
    (folder / "img_00001.jpg").write_bytes(b"a picture beside the flow")
    if prefix is not None:
        _tar(folder, prefix)
    found = _cut_with_flow(raw)
    assert isinstance(found, CutClip), found
    assert found.described["flow"]["bound"] == 20
    assert found.described["flow"]["source"] == "files"
    stored = np.stack([picture.astype(float) for picture in decode(found.payloads["flow"], "gray")])
    expected = 20 + 5 * np.minimum(np.arange(20), 18)
    assert np.abs(stored[:, 4:44].mean((1, 2)) - expected).max() < 2
    assert np.abs(stored[:, 52:92].mean((1, 2)) - (255 - expected)).max() < 2


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("num", [19, 20, 21])
def test_flow_lines_up_wherever_its_numbers_start(raw: Path, first: int, num: int) -> None:
    _write_flow(raw / "flow" / "12", LAYOUTS[5], range(first, first + num))
    found = _cut_with_flow(raw)
    assert isinstance(found, CutClip), found
    assert found.described["flow"]["num_frames"] == found.described["video"]["num_frames"] == 20
    stored = [picture[:40].mean() for picture in decode(found.payloads["flow"], "gray")]
    assert np.abs(np.array(stored) - (20 + 5 * np.minimum(np.arange(20), num - 1))).max() < 2


@pytest.mark.parametrize("num", [1, 18, 22, 40])
def test_flow_of_another_length_than_the_video_fails_the_clip(raw: Path, num: int) -> None:
    _write_flow(raw / "flow" / "12", LAYOUTS[5], range(1, num + 1))
    found = _cut_with_flow(raw)
    assert isinstance(found, Failure)
    assert f"{num} frames of flow for 20 of video" in found.error
    at_another_rate = _cut_with_flow(raw, something_something={"frames_per_second": 24})
    assert isinstance(at_another_rate, CutClip)
    assert at_another_rate.described["flow"]["num_frames"] == num


@pytest.mark.parametrize("tarred", [False, True])
@pytest.mark.parametrize(
    ("harm", "named"),
    [
        ("no v for a frame", r"12.*: flow_y_00007\.jpg is missing"),
        ("no v at all", r"12.*: flow_y_00001\.jpg is missing"),
        ("neither for a frame", r"12.*: flow_x_00007\.jpg is missing"),
        ("two layouts", r"two layouts in one, .*(flow_x_#\.jpg|u/frame_#\.jpg)"),
        ("packed and pairs", r"two layouts in one, .*flow_#\.jpg"),
        ("a number twice", r"flow_x_00003\.jpg and flow_x_3\.jpg have the same number"),
        ("gray packed", r"flow_00001\.jpg is gray"),
        ("nothing", r"no u/frame_0000000001\.jpg, .* in it"),
        ("cut", r"flow_y_00007\.jpg is no whole JPEG"),
    ],
)
def test_harmed_flow_fails_its_clip_by_name(raw: Path, harm: str, named: str, tarred: bool) -> None:
    folder = raw / "flow" / "12"
    _write_flow(folder, LAYOUTS[5], range(1, 20))
    match harm:
        case "no v for a frame":
            (folder / "flow_y_00007.jpg").unlink()
        case "no v at all":
            for path in folder.glob("flow_y_*"):
                path.unlink()
        case "neither for a frame":
            for path in folder.glob("flow_?_00007.jpg"):
                path.unlink()
        case "two layouts":
            _write_flow(folder, LAYOUTS[0], range(1, 3))
        case "packed and pairs":
            _write_flow(folder, LAYOUTS[-1], range(1, 3))
        case "a number twice":
            shutil.copy(folder / "flow_x_00003.jpg", folder / "flow_x_3.jpg")
        case "gray packed":
            for number in range(1, 20):
                (folder / f"flow_y_{number:05d}.jpg").unlink()
                (folder / f"flow_x_{number:05d}.jpg").rename(folder / f"flow_{number:05d}.jpg")
        case "nothing":
            for path in folder.glob("flow_*"):
                path.rename(folder / f"other_{path.name}")
        case "cut":
            path = folder / "flow_y_00007.jpg"
            path.write_bytes(path.read_bytes()[:-100])
    if tarred:
        _tar(folder, "./")
    found = _cut_with_flow(raw)
    assert isinstance(found, Failure)
    assert found.modality == "flow"
    assert re.search(named, found.error), found.error


@pytest.mark.parametrize("name", ["frame_{:010d}.jpg", "img_{:05d}.jpg", "image_{:d}.jpeg", "{:06d}.jpg"])
def test_pictures_are_found_under_their_usual_names_and_beside_flow(tmp_path: Path, name: str) -> None:
    _write_flow(tmp_path / "x", LAYOUTS[5], range(1, 4))
    for number in (3, 4):
        picture = number_picture(number)
        (tmp_path / "x" / name.format(number)).write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    with NumberedFrames(tmp_path / "x", "video") as frames:
        assert (frames.first, frames.last) == (3, 4)
        assert read_number(frames.read(4)) == 4


def test_flow_files_are_taken_where_there_are_any(tmp_path: Path) -> None:
    raw = _raw(tmp_path)
    write_frames(raw / "flow" / "12", list(range(1, 20)), ("u", "v"))
    pack(_spec(raw))
    folder = ShardFolder(raw / "out")
    sources = {clip.key: folder.metadata(clip)["modalities"]["flow"]["source"] for clip in folder.clips("train")}
    assert sources == {"7": "computed", "12": "files"}


plain = st.none() | st.integers() | st.text('a{}[]",:\\é', max_size=5) | st.floats(allow_nan=False)
values = st.recursive(plain, lambda v: st.lists(v, max_size=4), max_leaves=8)
entries = st.dictionaries(st.text("0123456789", min_size=1, max_size=6), st.lists(values, max_size=3), max_size=8)


@given(entries, st.sampled_from([None, 1]), st.integers(1, 64))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_indexed_entry_is_the_one_of_the_whole_file(
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
def test_a_boxes_file_that_is_no_whole_object_or_list_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"boxes\.json: not a whole JSON object"):
        index_boxes(path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"a.json": '{"7": [], "7": []}'}, r"a\.json: boxes of clip '7' are there twice"),
        ({"a.json": '[{"id": 7, "frames": []}, {"id": "7", "frames": []}]'}, r"a\.json: .*'7' are there twice"),
        ({"a.json": '{"7": []}', "b.json": '[{"id": "7", "frames": []}]'}, r"b\.json: .*'7'.*the other is in a\.json"),
        ({"a.json": '[{"id": "7", "frames": []}, {"frames": []}]'}, r"a\.json, entry 2: expected an object with 'id'"),
        ({"a.json": '{"7": []}', "b.json": '{"8": ['}, r"b\.json: not a whole JSON object"),
        ({"a.json.gz": ""}, r"no \.json file of boxes"),
    ],
)
def test_a_folder_of_boxes_is_one_set_of_clips_or_refused_by_name(
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
def test_the_best_boxes_are_kept_hands_first_and_inside_the_picture(boxes: list, most: int) -> None:
    entry = {"id": "1", "frames": [{"frame_objects": []}, {"frame_objects": [_object(*box) for box in boxes]}]}
    data, number = detections_json(entry, 427, 240, 3, most)
    frames = json.loads(data)["frames"]
    assert [len(frame) for frame in frames] == [0, number, 0]
    assert number <= most
    ranks = [(box[4], -box[5]) for box in frames[1]]
    assert ranks == sorted(ranks)
    whole = json.loads(detections_json(entry, 427, 240, 3, 30)[0])["frames"][1]
    assert frames[1] == whole[:most]
    for x0, y0, x1, y1, category, _ in whole:
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1
        assert category in (1, 2)


@settings(deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner, st.booleans()), max_size=30), st.integers(1, 14))
def test_both_formats_give_the_same_detections(boxes: list, most: int) -> None:
    labels = [_label(*box[:4], "hand" if box[4] else "cup") for box in boxes]
    objects = [_object(*box, 1.0) for box in boxes]
    data, number = detections_json([{"name": "1/0002.jpg", "labels": labels}], 427, 240, 3, most)
    compact = {"id": "1", "frames": [{"frame_objects": []}, {"frame_objects": objects}]}
    assert (data, number) == detections_json(compact, 427, 240, 3, most)


@pytest.mark.parametrize(
    ("category", "stored"),
    [("hand", 1), ("hand 2", 1), ("object hand", 1), ("hand_0", 1), ("object", 2), ("handbag", 2), ("shorthand", 2)],
)
def test_a_hand_is_a_whole_word(category: str, stored: int) -> None:
    entry = {"frames": [{"frame_objects": [_object(0, 0, 9, 9, False, 1.0) | {"category": category}]}]}
    assert json.loads(detections_json(entry, 20, 20, 1, 14)[0])["frames"][0][0][4] == stored


def test_frames_are_placed_by_their_name_whether_numbers_start_at_0_or_1() -> None:
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
