"""Packing real media: whatever cameras, codecs and annotators left behind. Skipped where the data is not there."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import av
import numpy as np
import pytest

from karmma_dist.packing.cut import cut_recording
from karmma_dist.packing.movie import Movie
from karmma_dist.packing.pack import pack
from karmma_dist.packing.planning import make_plan
from karmma_dist.packing.records import ClipRecord, CutClip, Failure, Recording
from karmma_dist.packing.spec import load_spec
from karmma_dist.shards import ShardFolder

DATA = Path(os.environ.get("KARMMA_DIST_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def real(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no real data: {path} is not there (set KARMMA_DIST_REAL_DATA)")
    return path


def _frames(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def test_the_epic_kitchens_sample_is_cut_by_frame_number_and_clamped(tmp_path: Path) -> None:
    pack(load_spec("epic_kitchens", raw=real("epic_sample"), out=tmp_path))
    folder = ShardFolder(tmp_path)
    (clip,) = folder.clips("train")
    modalities = folder.metadata(clip)["modalities"]
    assert modalities["audio"] is None
    # Frames 8 to 200 of 60/s become 30/s; flow 4 to 100 is at 30/s already.
    assert modalities["video"]["num_frames"] == modalities["flow"]["num_frames"] == 97
    assert modalities["video"]["fps"] == modalities["flow"]["fps"] == 30
    assert modalities["flow"]["source"] == "files"


def test_the_something_something_sample_keeps_its_frames_and_boxes(tmp_path: Path) -> None:
    raw = real("ssv2_sample")
    pack(load_spec("something_something", raw=raw, out=tmp_path))
    folder = ShardFolder(tmp_path)
    annotated = json.loads((raw / "boxes.json").read_text())
    clips = [clip for split in folder.splits for clip in folder.clips(split)]
    assert len(clips) == len(list((raw / "20bn-something-something-v2").iterdir()))
    for clip in clips:
        with av.open(str(raw / "20bn-something-something-v2" / f"{clip.key}.webm")) as container:
            sources = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        stored = _frames(folder.read(clip, "video"))
        assert len(stored) == len(sources)
        width = min(stored[0].shape[1], sources[0].shape[1])
        errors = [np.abs(a[:, :width].astype(int) - b[:, :width]).mean() for a, b in zip(stored, sources, strict=True)]
        assert max(errors) < 6
        assert clip.has("detections") == (clip.key in annotated)
        if clip.has("detections"):
            boxes = json.loads(folder.read(clip, "detections"))["frames"]
            assert len(boxes) == len(sources)
            assert [len(frame) for frame in boxes[: len(annotated[clip.key])]] == [
                len(frame["labels"]) for frame in annotated[clip.key]
            ]


def test_speech_clips_line_up_with_their_annotations_in_every_layout(tmp_path: Path) -> None:
    spec = load_spec("grid_epic", raw=real("grid_epic"), out=tmp_path)
    plan = make_plan(spec)
    for name, expected in {
        "P01_01": {"video", "flow", "audio"},
        "P06_01": {"video", "flow"},
        "P07_101": {"video", "flow"},
    }.items():
        (recording,) = [r for r in plan.recordings if r.name == name]
        first = Recording(**{f: getattr(recording, f) for f in recording.__slots__} | {"clips": recording.clips[:3]})
        for cut in cut_recording(first, spec):
            assert isinstance(cut, CutClip)
            assert set(cut.payloads) == expected
            seconds = cut.record.stop_s - cut.record.start_s
            described = cut.described
            assert described["video"]["num_frames"] / described["video"]["fps"] == pytest.approx(seconds, abs=0.05)
            assert described["flow"]["num_frames"] / described["flow"]["fps"] == pytest.approx(seconds, abs=0.05)
            if "audio" in expected:
                assert described["audio"]["num_samples"] / 16_000 == pytest.approx(seconds, abs=1e-3)


def _cut_whole(path: Path) -> CutClip | Failure:
    spec = load_spec("demo", raw=path.parent, out="unused", overrides=["video.short_side=64", "video.max_fps=30"])
    clip = ClipRecord("a", "train", 0.0, None, {})
    (found,) = cut_recording(Recording("a", "p", (clip,), movie=path), spec)
    return found


@pytest.mark.parametrize(
    ("name", "modalities", "num_frames"),
    [
        ("av1_noaudio.mkv", {"video", "flow"}, 125),
        ("ego4d_3c0dffd0.mp4", {"video", "flow", "audio"}, 60),
        ("h264_10bit.mp4", {"video", "flow"}, 30),
        ("h2b_task93_0_1920x1080_opus.webm", {"video", "flow", "audio"}, 107),
        ("nasa_13013_2video_2audio.mp4", {"video", "flow", "audio"}, 390),
        ("rot90.mov", {"video", "flow"}, 3),
        ("unordered.mov", {"video", "flow"}, 4),
    ],
)
def test_awkward_movies_keep_every_frame(name: str, modalities: set[str], num_frames: int) -> None:
    found = _cut_whole(real("edge") / name)
    assert isinstance(found, CutClip), found
    assert set(found.payloads) == modalities
    assert abs(found.described["video"]["num_frames"] - num_frames) <= 1


def test_a_rotated_movie_is_stored_upright() -> None:
    found = _cut_whole(real("edge") / "rot90.mov")
    assert isinstance(found, CutClip)
    assert found.described["video"]["height"] > found.described["video"]["width"]


def test_a_damaged_movie_loses_only_the_clips_at_the_damage() -> None:
    path = real("edge") / "corrupted.mp4"
    assert isinstance(_cut_whole(path), Failure)
    spec = load_spec("demo", raw=path.parent, out="unused")
    clips = tuple(ClipRecord(f"c{n}", "train", n, n + 0.9, {}) for n in range(4))
    found = {
        cut.key if isinstance(cut, Failure) else cut.record.key: cut
        for cut in cut_recording(Recording("a", "p", clips, movie=path), spec)
    }
    assert [isinstance(found[f"c{n}"], CutClip) for n in range(4)] == [True, True, True, False]


def test_official_annotations_are_read_whole(tmp_path: Path) -> None:
    official = real("annotations/epic100")
    (tmp_path / "annotations").mkdir()
    for path in official.glob("*.csv*"):
        name = path.name.replace("_reconstructed", "")
        (tmp_path / "annotations" / name).write_bytes(path.read_bytes())
    with open(official / "EPIC_100_validation.csv", newline="") as file:
        videos = {(row["participant_id"], row["video_id"]) for row in csv.DictReader(file)}
    for participant, video in videos:
        folder = tmp_path / "EPIC-KITCHENS" / participant / "videos"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{video}.MP4").touch()
    plan = make_plan(load_spec("epic_kitchens", raw=tmp_path, out=tmp_path / "out"))
    assert [len(names) for names in plan.classes.values()] == [97, 300]
    assert len(plan.keys("validation")) == 9668
    assert plan.splits == ("train", "validation", "test")


def test_sound_and_picture_of_a_recording_end_together() -> None:
    path = real("grid_epic") / "EPIC-KITCHENS/P01/videos/P01_01.MP4"
    with Movie(path) as movie:
        sound = movie.sound()
        for _ in movie.frames():
            pass
    assert sound is not None
    assert len(sound.samples) / 16_000 == pytest.approx(movie.end_s, abs=0.1)
    assert movie.num_frames == 3000
