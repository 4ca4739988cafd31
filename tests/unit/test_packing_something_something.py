"""Something-Something V2 and Something-Else's boxes: read, placed, clamped, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_kit import write_frames, write_movie

from karmma_dist.errors import UserError
from karmma_dist.packing import boxes as boxes_module
from karmma_dist.packing.boxes import detections_json, index_boxes, read_boxes
from karmma_dist.packing.pack import pack
from karmma_dist.packing.records import MediaError
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


def _raw(root: Path, train: list[dict] = TRAIN, labels: dict = LABELS, boxes: dict | None = None) -> Path:
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "labels.json").write_text(json.dumps(labels))
    (root / "labels" / "train.json").write_text(json.dumps(train))
    for clip in ("7", "12"):
        write_movie(root / "20bn-something-something-v2" / f"{clip}.webm", frames=20, fps=12)
    if boxes is not None:
        (root / "boxes.json").write_text(json.dumps(boxes))
    return root


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
        spans = index_boxes(path)
    assert {key: read_boxes(path, span) for key, span in spans.items()} == content


@pytest.mark.parametrize("text", ["", "[]", '{"1": [1, 2], "2": [', '{"1": [1]', '{"1": [1]} x', "{1: []}"])
def test_a_boxes_file_that_is_no_whole_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a whole JSON object"):
        index_boxes(path)


corner = st.floats(-500, 1500)


@settings(deadline=None)
@given(st.lists(st.tuples(corner, corner, corner, corner, st.booleans()), max_size=30), st.integers(1, 14))
def test_boxes_are_inside_ordered_and_at_most_as_many_as_asked(boxes: list, most: int) -> None:
    labels = [_label(*box[:4], "hand" if box[4] else "cup") for box in boxes]
    data, number = detections_json([{"name": "1/0002.jpg", "labels": labels}], 427, 240, 3, most)
    frames = json.loads(data)["frames"]
    assert [len(frame) for frame in frames] == [0, number, 0]
    assert number <= most
    categories = [box[4] for box in frames[1]]
    assert categories == sorted(categories)
    for x0, y0, x1, y1, category, score in frames[1]:
        assert 0 <= x0 <= x1 <= 1
        assert 0 <= y0 <= y1 <= 1
        assert category in (1, 2)
        assert score == 1.0


@pytest.mark.parametrize("frames", [[{"name": "1/0001.jpg"}], [{"labels": [{"box": 3}]}], ["x"], [{"labels": 3}]])
def test_boxes_of_another_format_fail_the_clip(frames: list) -> None:
    with pytest.raises(MediaError, match="another format"):
        detections_json(frames, 427, 240, 3, 14)
