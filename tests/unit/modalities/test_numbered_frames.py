"""Tests of numbered frames: every layout gives each frame's values, and a damaged one fails its clip by name."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from karmma_dist.modalities.numbered_frames import NumberedFrames
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip, Failure, MediaFinder
from karmma_dist.packing.spec import PackingSpec
from kits.packing import decode, number_picture, read_number, write_movie

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
    """Write flow with u = 20 + 5 * place and v = 255 - u, where place counts from the first number."""
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


def _cut_with_flow(raw: Path, flow_fps: int = 12) -> CutClip | Failure:
    """Cut a recording that is one clip of 20 frames at 12 frames/s, with the flow in raw/flow/12 or its tar."""
    movie = raw / "12.webm"
    if not movie.exists():
        write_movie(movie, frames=20, fps=12)
    record = ClipRecord("12", "train", 0.0, None, {"action": 0}, start_frame=0)
    flow = MediaFinder(raw).frames("flow/12", "flow")
    spec = PackingSpec.model_validate(
        {"reader": "something_something", "dataset": "ss", "raw": str(raw), "out": str(raw / "out"),
         "flow": {"source": "files", "files_bound": 20, "bound": 20}}
    )  # fmt: skip
    media = {"flow": MediaFile(flow)}
    recording = Recording("12", "", (record,), video_file=movie, media=media, nominal_fps=flow_fps)
    (clip,) = cut_recording(recording, spec)
    return clip


@pytest.mark.parametrize("prefix", [None, "", "./", "12/", "./12/"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout[0])
def test_every_layout_of_flow_gives_the_values_of_each_frame(
    tmp_path: Path, layout: tuple[str, ...], prefix: str | None
) -> None:
    folder = _write_flow(tmp_path / "flow" / "12", layout, range(1, 20))
    (folder / "img_00001.jpg").write_bytes(b"a picture next to the flow")
    if prefix is not None:
        _tar(folder, prefix)
    clip = _cut_with_flow(tmp_path)
    assert isinstance(clip, CutClip), clip
    assert clip.described["flow"]["bound"] == 20
    assert clip.described["flow"]["source"] == "files"
    stored = np.stack([picture.astype(float) for picture in decode(clip.payloads["flow"], "gray")])
    expected = 20 + 5 * np.minimum(np.arange(20), 18)
    assert np.abs(stored[:, 4:44].mean((1, 2)) - expected).max() < 2
    assert np.abs(stored[:, 52:92].mean((1, 2)) - (255 - expected)).max() < 2


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("num", [19, 20, 21])
def test_flow_is_aligned_whatever_its_first_number(tmp_path: Path, first: int, num: int) -> None:
    _write_flow(tmp_path / "flow" / "12", LAYOUTS[5], range(first, first + num))
    clip = _cut_with_flow(tmp_path)
    assert isinstance(clip, CutClip), clip
    assert clip.described["flow"]["num_frames"] == clip.described["video"]["num_frames"] == 20
    stored = [picture[:40].mean() for picture in decode(clip.payloads["flow"], "gray")]
    assert np.abs(np.array(stored) - (20 + 5 * np.minimum(np.arange(20), num - 1))).max() < 2


@pytest.mark.parametrize("num", [1, 18, 22, 40])
def test_flow_of_another_length_than_the_video_fails_the_clip(tmp_path: Path, num: int) -> None:
    _write_flow(tmp_path / "flow" / "12", LAYOUTS[5], range(1, num + 1))
    clip = _cut_with_flow(tmp_path)
    assert isinstance(clip, Failure)
    assert f"{num} frames of flow for 20 of video" in clip.error
    at_another_rate = _cut_with_flow(tmp_path, flow_fps=24)
    assert isinstance(at_another_rate, CutClip)
    assert at_another_rate.described["flow"]["num_frames"] == num


@pytest.mark.parametrize("tarred", [False, True])
@pytest.mark.parametrize(
    ("harm", "named"),
    [
        ("no v for a frame", r"12.*: flow_y_00007\.jpg is missing"),
        ("no v at all", r"12.*: flow_y_00001\.jpg is missing"),
        ("neither for a frame", r"12.*: flow_x_00007\.jpg is missing"),
        ("two layouts", r"two layouts, .*(flow_x_#\.jpg|u/frame_#\.jpg)"),
        ("packed and pairs", r"two layouts, .*flow_#\.jpg"),
        ("a number twice", r"flow_x_00003\.jpg and flow_x_3\.jpg have the same number"),
        ("gray packed", r"flow_00001\.jpg is gray"),
        ("nothing", r"no u/frame_0000000001\.jpg, .* in it"),
        ("cut", r"flow_y_00007\.jpg is not a complete JPEG"),
    ],
)
def test_damaged_flow_fails_its_clip_and_names_the_file(tmp_path: Path, harm: str, named: str, tarred: bool) -> None:
    folder = tmp_path / "flow" / "12"
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
    clip = _cut_with_flow(tmp_path)
    assert isinstance(clip, Failure)
    assert clip.modality == "flow"
    assert re.search(named, clip.error), clip.error


@pytest.mark.parametrize("name", ["frame_{:010d}.jpg", "img_{:05d}.jpg", "image_{:d}.jpeg", "{:06d}.jpg"])
def test_pictures_are_found_by_usual_names_next_to_flow(tmp_path: Path, name: str) -> None:
    _write_flow(tmp_path / "x", LAYOUTS[5], range(1, 4))
    for number in (3, 4):
        picture = number_picture(number)
        (tmp_path / "x" / name.format(number)).write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    with NumberedFrames(tmp_path / "x", "video") as frames:
        assert (frames.first, frames.last) == (3, 4)
        assert read_number(frames.read(4)) == 4
