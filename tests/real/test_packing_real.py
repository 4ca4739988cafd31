"""Packing real media of many cameras, codecs and annotators. Skipped where the data is missing."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import webdataset as wds

from karmma_dist.modalities.audio.store import sound_of
from karmma_dist.modalities.detections.store import detections_json
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import pack
from karmma_dist.packing.records import CutClip, Failure
from karmma_dist.packing.spec import load_spec
from real_data import real

MEMBERS = {"video": "video.mp4", "flow": "flow.mp4", "audio": "audio.flac", "detections": "detections.json"}
GRID_RECORDINGS = {"P01_01", "P01_04", "P06_01", "P07_101", "P08_03"}
"""Recordings of the speech corpus that are packed: P06_01 and the last two are silent, P07_101 has flow in files."""
MEAN_GRAY_ERROR = 1.3
"""Largest mean error of a frame, out of 255: the sample was filmed in the dark."""
MEAN_FLOW_ERROR_PX, P99_FLOW_ERROR_PX = 0.01, 0.13


def _frames(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


def _packed(spec: str, raw: Path, out: Path, workers: int = 1) -> Path:
    summary = pack(load_spec(spec, raw=raw, out=out), workers=workers)
    assert summary.failures == []
    return out


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of some recordings of the speech corpus."""
    corpus, folder = real("grid_epic"), tmp_path_factory.mktemp("grid")
    (folder / "raw" / "annotations").mkdir(parents=True)
    (folder / "raw" / "EPIC-KITCHENS").symlink_to(corpus / "EPIC-KITCHENS")
    for path in (corpus / "annotations").glob("*.csv"):
        with open(path, newline="") as file:
            header, *rows = csv.reader(file)
        if "video_id" in header:
            rows = [row for row in rows if row[header.index("video_id")] in GRID_RECORDINGS]
        with open(folder / "raw" / "annotations" / path.name, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return _packed("grid_epic", folder / "raw", folder / "shards", workers=2)


@pytest.fixture(scope="module")
def epic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the Epic-Kitchens sample."""
    return _packed("epic_kitchens", real("epic_sample"), tmp_path_factory.mktemp("epic") / "shards")


@pytest.fixture(scope="module")
def ssv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the Something-Something sample."""
    return _packed("something_something", real("ssv2_sample"), tmp_path_factory.mktemp("ssv2") / "shards")


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Return all clips of a folder as any user of WebDataset reads them, with KEY.json parsed."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    samples = list(wds.WebDataset(tars, shardshuffle=False))
    for sample in samples:
        sample["json"] = json.loads(sample["json"])
    return samples


def _grid_keys(raw: Path) -> set[str]:
    return {key for key in _csv_keys(raw) if key.rpartition("_")[0] in GRID_RECORDINGS}


def _csv_keys(raw: Path) -> set[str]:
    rows = []
    for path in raw.glob("annotations/EPIC_100_*.csv"):
        with open(path, newline="") as file:
            rows += list(csv.DictReader(file))
    return {row["narration_id"] for row in rows if "narration_id" in row}


def _json_keys(raw: Path) -> set[str]:
    return {
        entry["id"]
        for name in ("train", "validation")
        for entry in json.loads((raw / f"labels/{name}.json").read_text())
    }


@pytest.mark.parametrize(
    ("name", "raw", "keys_of"),
    [("grid", "grid_epic", _grid_keys), ("epic", "epic_sample", _csv_keys), ("ssv2", "ssv2_sample", _json_keys)],
)
def test_webdataset_reads_every_clip_with_its_declared_members(
    name: str, raw: str, keys_of: Callable[[Path], set[str]], request: pytest.FixtureRequest
) -> None:
    samples = _samples(request.getfixturevalue(name))
    assert sorted(sample["__key__"] for sample in samples) == sorted(keys_of(real(raw)))
    for sample in samples:
        declared = {m: d for m, d in sample["json"]["modalities"].items() if d is not None}
        assert {MEMBERS[modality] for modality in declared} == {name for name in sample if name[0] != "_"} - {"json"}
        assert sample["json"]["key"] == sample["__key__"]
        for modality, description in declared.items():
            data = sample[MEMBERS[modality]]
            assert (len(data), zlib.crc32(data)) == (description["bytes"], description["crc32"])


def test_speech_clips_have_their_labels_their_modalities_and_their_length(grid: Path) -> None:
    rows: dict[str, dict[str, str]] = {}
    for split in ("train", "validation"):
        with open(real("grid_epic") / f"annotations/EPIC_100_{split}.csv", newline="") as file:
            rows |= {row["narration_id"]: row | {"split": split} for row in csv.DictReader(file)}
    silent = 0
    for sample in _samples(grid):
        metadata, row = sample["json"], rows[sample["__key__"]]
        assert metadata["split"] == row["split"]
        assert metadata["labels"] == {"verb": int(row["verb_class"]), "noun": int(row["noun_class"])}
        modalities = metadata["modalities"]
        is_silent = row["participant_id"] == "P06" or row["video_id"] in ("P07_101", "P08_03")
        silent += is_silent
        assert (modalities["audio"] is None) == is_silent
        assert modalities["flow"]["source"] == ("files" if row["video_id"] == "P07_101" else "computed")
        seconds = metadata["stop_s"] - metadata["start_s"]
        assert modalities["video"]["num_frames"] / modalities["video"]["fps"] == pytest.approx(seconds, abs=0.05)
        assert modalities["flow"]["num_frames"] / modalities["flow"]["fps"] == pytest.approx(seconds, abs=0.05)
        if not is_silent:
            assert modalities["audio"]["num_samples"] / 16_000 == pytest.approx(seconds, abs=1e-3)
    assert 0 < silent < len(rows)


def _raw_pictures(tar: Path) -> dict[str, np.ndarray]:
    """Return every JPEG of a tar by its name, gray."""
    with tarfile.open(tar) as archive:
        files = {info.name.removeprefix("./"): archive.extractfile(info) for info in archive if info.isfile()}
        return {
            name: cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_GRAYSCALE).astype(float)
            for name, file in files.items()
            if file is not None
        }


def test_the_epic_sample_stores_every_other_picture(epic: Path) -> None:
    (sample,) = _samples(epic)
    modalities = sample["json"]["modalities"]
    assert modalities["audio"] is None
    assert modalities["video"]["fps"] == 30
    raw = _raw_pictures(real("epic_sample/EPIC-KITCHENS/P01/rgb_frames/P01_01.tar"))
    stored = np.stack(_frames(sample["video.mp4"])).astype(float)
    # The row's stop frame is 202, the recording's last is 200.
    numbers = range(8, 201, 2)
    assert len(stored) == len(numbers) == modalities["video"]["num_frames"]
    for place, number in enumerate(numbers):
        near = range(max(number - 4, 2), min(number + 4, 200) + 1, 2)
        errors = {n: float(np.abs(stored[place] - raw[f"frame_{n:010d}.jpg"]).mean()) for n in near}
        assert errors[number] < MEAN_GRAY_ERROR
        assert errors[number] == min(errors.values())


def test_the_epic_sample_stores_flow_to_subpixel_precision(epic: Path) -> None:
    (sample,) = _samples(epic)
    described = sample["json"]["modalities"]["flow"]
    assert (described["source"], described["fps"], described["bound"]) == ("files", 30, 8)
    raw = _raw_pictures(real("epic_sample/EPIC-KITCHENS/P01/flow_frames/P01_01.tar"))
    stored = np.stack(_frames(sample["flow.mp4"])).astype(float)
    numbers = range(4, 101)
    assert len(stored) == len(numbers) == described["num_frames"]
    expected = np.stack([np.concatenate([raw[f"{c}/frame_{n:010d}.jpg"] for c in "uv"]) for n in numbers])
    errors_px = np.abs(stored - expected) / 127.5 * described["bound"]
    assert errors_px.mean() < MEAN_FLOW_ERROR_PX
    assert np.percentile(errors_px, 99) < P99_FLOW_ERROR_PX


def test_the_something_something_sample_keeps_its_frames_and_boxes(ssv2: Path) -> None:
    raw = real("ssv2_sample")
    annotated = json.loads((raw / "boxes.json").read_text())
    for sample in _samples(ssv2):
        key = sample["__key__"]
        with av.open(str(raw / "20bn-something-something-v2" / f"{key}.webm")) as container:
            sources = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        stored = _frames(sample["video.mp4"])
        assert len(stored) == len(sources)
        width = min(stored[0].shape[1], sources[0].shape[1])
        errors = [np.abs(a[:, :width].astype(int) - b[:, :width]).mean() for a, b in zip(stored, sources, strict=True)]
        assert max(errors) < 6
        assert ("detections.json" in sample) == (key in annotated)
        if key in annotated:
            frames = json.loads(sample["detections.json"])["frames"]
            assert len(frames) == len(sources)
            assert [len(boxes) for boxes in frames[: len(annotated[key])]] == [len(f["labels"]) for f in annotated[key]]
            assert not any(frames[len(annotated[key]) :])


def test_the_sample_boxes_are_the_same_from_compact_lists(ssv2: Path) -> None:
    annotated = json.loads((real("ssv2_sample") / "boxes.json").read_text())
    for sample in _samples(ssv2):
        if "detections.json" not in sample:
            continue
        stored = json.loads(sample["detections.json"])
        objects = [
            {"frame_objects": [o["box2d"] | {"category": "hand" if o["category"] == "hand" else "object", "score": 1.0}
                               for o in frame["labels"]]}
            for frame in annotated[sample["__key__"]]
        ]  # fmt: skip
        size = (stored["width"], stored["height"])
        data, _ = detections_json({"id": sample["__key__"], "frames": objects}, *size, len(stored["frames"]), 14)
        assert data == sample["detections.json"]


def _cut_whole(path: Path) -> CutClip | Failure:
    spec = load_spec("demo", raw=path.parent, out="unused", overrides=["video.short_side=64", "video.max_fps=30"])
    clip = ClipRecord("a", "train", 0.0, None, {})
    (cut,) = cut_recording(Recording("a", "p", (clip,), video_file=path), spec)
    return cut


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
    cut = _cut_whole(real("edge") / name)
    assert isinstance(cut, CutClip), cut
    assert set(cut.payloads) == modalities
    assert abs(cut.described["video"]["num_frames"] - num_frames) <= 1


def test_a_rotated_movie_is_stored_upright() -> None:
    cut = _cut_whole(real("edge") / "rot90.mov")
    assert isinstance(cut, CutClip)
    assert cut.described["video"]["height"] > cut.described["video"]["width"]


def test_a_damaged_movie_loses_only_the_clips_at_the_damage() -> None:
    path = real("edge") / "corrupted.mp4"
    assert isinstance(_cut_whole(path), Failure)
    spec = load_spec("demo", raw=path.parent, out="unused")
    clips = tuple(ClipRecord(f"c{n}", "train", n, n + 0.9, {}) for n in range(4))
    cuts = {
        cut.key if isinstance(cut, Failure) else cut.record.key: cut
        for cut in cut_recording(Recording("a", "p", clips, video_file=path), spec)
    }
    assert [isinstance(cuts[f"c{n}"], CutClip) for n in range(4)] == [True, True, True, False]


def test_sound_and_picture_of_a_recording_end_together() -> None:
    path = real("grid_epic") / "EPIC-KITCHENS/P01/videos/P01_01.MP4"
    with VideoFile(path) as movie:
        sound = sound_of(movie)
        for _ in movie.frames():
            pass
    assert sound is not None
    assert len(sound.samples) / 16_000 == pytest.approx(movie.end_s, abs=0.1)
    assert movie.num_frames == 3000
