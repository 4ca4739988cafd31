"""The official annotation lists: every row becomes its clip. Skipped where the data is missing."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.pack import make_plan
from karmma_dist.packing.readers import find_reader
from karmma_dist.packing.readers.something_something import read_something_something
from karmma_dist.packing.records import Plan
from karmma_dist.packing.spec import load_spec
from real_data import real

EPIC = {
    "train": ("EPIC_100_train_reconstructed.csv.gz", 67_217),
    "validation": ("EPIC_100_validation.csv", 9_668),
    "test": ("EPIC_100_test_timestamps.csv", 13_092),
}


def _rows(split: str) -> Iterator[dict[str, str]]:
    path = real("annotations/epic100") / EPIC[split][0]
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as file:
        yield from csv.DictReader(file)


def _seconds(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


@pytest.fixture(scope="module")
def epic_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan of the official lists, with an empty file for every video."""
    raw = tmp_path_factory.mktemp("epic")
    (raw / "annotations").mkdir()
    for path in real("annotations/epic100").glob("*.csv*"):
        (raw / "annotations" / path.name.replace("_reconstructed", "")).symlink_to(path)
    for participant, video in {(row["participant_id"], row["video_id"]) for split in EPIC for row in _rows(split)}:
        movie = raw / "EPIC-KITCHENS" / participant / "videos" / f"{video}.MP4"
        movie.parent.mkdir(parents=True, exist_ok=True)
        movie.touch()
    return make_plan(load_spec("epic_kitchens", raw=raw, out=raw / "out"))


@pytest.fixture(scope="module")
def epic_clips(epic_plan: Plan) -> dict[str, tuple[Recording, ClipRecord]]:
    return {clip.key: (recording, clip) for recording in epic_plan.recordings for clip in recording.clips}


def test_epic_kitchens_has_its_splits_and_classes(epic_plan: Plan) -> None:
    assert [len(names) for names in epic_plan.classes.values()] == [97, 300]
    assert {split: len(epic_plan.keys(split)) for split in epic_plan.splits} == {s: num for s, (_, num) in EPIC.items()}


@pytest.mark.parametrize("split", EPIC)
def test_every_row_of_epic_kitchens_becomes_its_clip(
    split: str, epic_clips: dict[str, tuple[Recording, ClipRecord]]
) -> None:
    rows = list(_rows(split))
    assert len(rows) == EPIC[split][1]
    for row in rows:
        recording, clip = epic_clips[row["narration_id"]]
        assert (recording.participant, recording.name, clip.split) == (row["participant_id"], row["video_id"], split)
        assert (clip.start_frame, clip.stop_frame) == (int(row["start_frame"]), int(row["stop_frame"]))
        assert clip.start_s == pytest.approx(_seconds(row["start_timestamp"]), abs=1e-6)
        assert clip.stop_s == pytest.approx(_seconds(row["stop_timestamp"]), abs=1e-6)
        labels = {head: int(row[f"{head}_class"]) if split != "test" else None for head in ("verb", "noun")}
        assert clip.labels == labels
        assert clip.narration == row.get("narration", "")


def test_epic_frame_numbers_start_at_1_at_nominal_rate(
    epic_clips: dict[str, tuple[Recording, ClipRecord]],
) -> None:
    for recording, clip in epic_clips.values():
        assert recording.nominal_fps == (50 if len(recording.name.split("_")[1]) == 3 else 60)
        assert clip.stop_s is not None
        assert clip.stop_frame is not None
        for seconds, frame in ((clip.start_s, clip.start_frame), (clip.stop_s, clip.stop_frame)):
            assert abs(frame - max(1, math.floor(seconds * recording.nominal_fps + 1e-6))) <= 1, clip.key


def test_no_epic_clip_ends_after_its_pictures_or_flow(
    epic_clips: dict[str, tuple[Recording, ClipRecord]],
) -> None:
    with open(real("annotations/epic100") / "EPIC_100_frame_counts.csv", newline="") as file:
        counts = {row["video_id"]: row for row in csv.DictReader(file)}
    for recording, clip in epic_clips.values():
        assert clip.stop_frame is not None
        last, per_flow = clip.stop_frame - 1, 2 if recording.nominal_fps == 60 else 1
        assert clip.start_frame <= last <= int(counts[recording.name]["rgb_n_frames"]), clip.key
        assert (last - 1) // per_flow + 1 <= int(counts[recording.name]["flow_n_frames"]), clip.key


def test_every_row_of_something_something_finds_its_class(tmp_path: Path) -> None:
    official = real("annotations/ssv2")
    (tmp_path / "labels").symlink_to(official)
    names = [f"labels/something-something-v2-{name}.json" for name in ("train_reconstructed", "validation", "labels")]
    splits = dict(zip(("train", "validation"), names, strict=False))
    overrides = [f"something_something.{name}" for name in (f"splits={splits}", f"heads={{action: {names[2]}}}")]
    spec = load_spec("something_something", raw=tmp_path, out=tmp_path / "out", overrides=overrides)
    plan = read_something_something(spec)
    classes = json.loads((official / "something-something-v2-labels.json").read_text())
    assert len(plan.classes["action"]) == len(classes) == 174
    clips = {clip.key: clip for recording in plan.recordings for clip in recording.clips}
    assert {split: len(plan.keys(split)) for split in plan.splits} == {"train": 168_913, "validation": 24_777}
    train = json.loads(gzip.decompress((official / "something-something-v2-train_reconstructed.json.gz").read_bytes()))
    validation = json.loads((official / "something-something-v2-validation.json").read_text())
    for split, entries in (("train", train), ("validation", validation)):
        for entry in entries:
            clip = clips[entry["id"]]
            assert clip.split == split
            assert clip.labels == {"action": int(classes[entry["template"].replace("[", "").replace("]", "")])}
            assert clip.narration == entry.get("label", entry["template"])
    assert {clip.labels["action"] for clip in clips.values()} == set(range(174))


SOUNDS = {"validation": ("validation", 8_035), "test": ("recognition_test_timestamps", 5_131)}


def test_every_row_of_epic_sounds_becomes_its_clip(tmp_path: Path) -> None:
    """Also that samples repeat the timestamps, which is why the reader takes those alone."""
    (tmp_path / "annotations").symlink_to(real("annotations/epic_sounds"))
    plan = find_reader("epic_sounds").read(load_spec("epic_sounds", raw=tmp_path, out=tmp_path / "out"))
    names = plan.classes["sound"]
    assert len(names) == 44
    clips = {clip.key: (recording, clip) for recording in plan.recordings for clip in recording.clips}
    for split, (name, num) in SOUNDS.items():
        with open(tmp_path / "annotations" / f"EPIC_Sounds_{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(plan.keys(split)) == num
        for row in rows:
            recording, clip = clips[row["annotation_id"]]
            assert clip.split == split
            assert (recording.participant, recording.name) == (row["participant_id"], row["video_id"])
            label = clip.labels["sound"]
            assert (label is None) == (split == "test")
            assert label is None or (names[label], str(label)) == (row["class"], row["class_id"])
            assert clip.stop_s is not None
            for time_s, column in ((clip.start_s, "start"), (clip.stop_s, "stop")):
                assert time_s == pytest.approx(_seconds(row[f"{column}_timestamp"]), abs=1e-6)
                assert -1 <= int(row[f"{column}_sample"]) - round(time_s * 24_000) <= 0
