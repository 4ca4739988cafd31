"""Something-Something V2: labels, boxes and flow reach their clips, or are refused with file and entry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from karmma_dist.errors import UserError
from karmma_dist.packing.pack import pack
from karmma_dist.packing.readers.something_something import read_something_something
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.shards.folder import ShardFolder
from kits.packing import decode, write_frames, write_movie

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


def test_templates_give_classes_in_label_order(tmp_path: Path) -> None:
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
        ({"id": "7", "template": "Holding [something]"}, "id '7' is already that of .*entry 1"),
        ({"id": "../7", "template": "Holding [something]"}, "id '../7'"),
        ({"id": "9"}, "'template' is missing"),
        ({"id": "9", "template": "Holding [something]", "label": 3}, "'label' is 3"),
        ({"template": "Holding [something]"}, "'id'"),
        ("7", "'id'"),
    ],
)
def test_a_bad_entry_is_named_with_its_file(tmp_path: Path, bad: object, named: str) -> None:
    raw = _raw(tmp_path, train=[*TRAIN, bad])  # type: ignore[list-item]
    with pytest.raises(UserError, match=rf"train.json, entry 3.*{named}"):
        read_something_something(_spec(raw))


@pytest.mark.parametrize("labels", [{"a": "0", "b": "2"}, {"a": "x"}, {"a": True}, {"a": None}, {"a": 0.0}, {}])
def test_bad_class_ids_are_refused(tmp_path: Path, labels: dict) -> None:
    with pytest.raises(UserError, match=r"labels\.json"):
        read_something_something(_spec(_raw(tmp_path, labels=labels)))


def test_an_unlabelled_split_needs_no_template(tmp_path: Path) -> None:
    raw = _raw(tmp_path)
    (raw / "labels" / "test.json").write_text('[{"id": "99"}]')
    plan = read_something_something(_spec(raw))
    assert [c.labels for r in plan.recordings for c in r.clips if c.split == "test"] == [{"action": None}]


def test_boxes_lie_on_their_frames(tmp_path: Path) -> None:
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
    assert metadata.description("detections").num_frames == metadata.description("video").num_frames == 20
    assert metadata.stop_s == pytest.approx(20 / 12, abs=1e-3)


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


def test_flow_files_are_taken_where_there_are_any(tmp_path: Path) -> None:
    raw = _raw(tmp_path)
    write_frames(raw / "flow" / "12", list(range(0, 19)), ("u", "v"))
    pack(_spec(raw))
    folder = ShardFolder(raw / "out")
    clips = {clip.key: clip for clip in folder.clips("train")}
    sources = {key: folder.metadata(clip).description("flow").source for key, clip in clips.items()}
    assert sources == {"7": "computed", "12": "files"}
    stored = [picture[:40].mean() for picture in decode(folder.read(clips["12"], "flow"), "gray")]
    assert np.abs(np.array(stored) - (20 + np.minimum(np.arange(20), 18))).max() < 1.5
