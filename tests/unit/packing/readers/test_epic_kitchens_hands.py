"""Detections of hands and objects: each stored frame has the boxes of its own picture, and damage is no absence."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karmma_dist.errors import UserError
from karmma_dist.modalities.detections import HAND, OBJECT, hand_objects
from karmma_dist.modalities.detections.decode import picture_size, read_frames
from karmma_dist.modalities.detections.hand_objects import PICTURE_SIZE
from karmma_dist.packing.inspect.inspect import contact_sheet
from karmma_dist.packing.pack import make_plan, pack
from karmma_dist.packing.spec import PackingSpec, load_spec
from karmma_dist.packing.verify.verify import verify
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import evaluation_view
from kits.hand_objects import Box, frame_message, stored, write_hand_objects
from kits.packing import (
    Beeps,
    decode,
    epic_spec,
    movie_path,
    read_number,
    row,
    sound_row,
    write_epic,
    write_frames,
    write_movie,
    write_sounds,
)

FRAMES = 180
SPANS = [("00:00:00.10", "00:00:00.25"), ("00:00:00.50", "00:00:01.75"), ("00:00:01.01", "00:00:02.50")]


def boxes_of(number: int) -> list[Box]:
    """Return the boxes of a frame: an object whose left side tells the number, and up to three more."""
    random = np.random.default_rng(number)
    told = [number / 1000, 0.0, 1.0, 0.5, OBJECT, 1.0]
    corners = np.sort(random.random((random.integers(4), 2, 2)), axis=1).reshape(-1, 4).tolist()
    others = [[*sides, int(random.integers(HAND, OBJECT + 1)), 0.9 * random.random()] for sides in corners]
    return [*others, told] if number % 2 else [told, *others]


def spec(root: Path, out: str = "out", **fields: Any) -> PackingSpec:
    defaults = {"detections": {"source": "hand_objects"}, "flow": {"source": "none"}}
    return epic_spec(root, root / out, **(defaults | fields))


def write_recording(root: Path, video: str, spans: Sequence[tuple[str, str]] = SPANS) -> int:
    """Write annotations as the official ones, with numbered frames and detections; return the nominal rate."""
    fps = 50 if len(video) > 6 else 60
    rows = []
    for number, (start, stop) in enumerate(spans):
        first, after = (int(float(text[6:]) * fps + 1e-6) for text in (start, stop))
        rows.append(row(f"{video}_{number}", video, start, stop, start_frame=first, stop_frame=after))
    write_epic(root, rows)
    write_frames(root / "EPIC-KITCHENS/P01/rgb_frames" / video, list(range(1, FRAMES + 1)), size=(80, 80))
    write_hand_objects(root, video, {number: boxes_of(number) for number in range(1, FRAMES + 1)})
    return fps


def members(out: Path) -> dict[str, tuple[list[list[list[float]]], bytes]]:
    """Return boxes and pictures of every clip."""
    folder = ShardFolder(out)
    return {
        clip.key: (read_frames(folder.read(clip, "detections")), folder.read(clip, "video"))
        for clip in folder.clips("train")
    }


@pytest.mark.parametrize("max_fps", [12, 30, 60])
@pytest.mark.parametrize("video", ["P01_01", "P01_101"])
def test_every_stored_frame_has_the_boxes_of_its_own_picture(tmp_path: Path, video: str, max_fps: int) -> None:
    fps = write_recording(tmp_path, video)
    summary = pack(spec(tmp_path, video={"max_fps": max_fps}))
    assert not summary.failures
    assert verify(tmp_path / "out", full=True).whole
    for key, (frames, data) in members(tmp_path / "out").items():
        numbers = [read_number(picture) for picture in decode(data)]
        assert frames == [stored(boxes_of(number)) for number in numbers]
        start, stop = (float(text[6:]) for text in SPANS[int(key[-1])])
        assert numbers[0] == int(start * fps + 1e-6)
        assert len(numbers) == int(np.ceil((stop - start) * min(fps, max_fps) - 1e-6))


def test_boxes_beside_a_movie_are_those_of_the_same_moments(tmp_path: Path) -> None:
    """Official frame numbers are seconds rounded down: up to a sixtieth of a second before the movie's picture."""
    write_recording(tmp_path, "P01_01")
    write_movie(movie_path(tmp_path), frames=FRAMES, fps=60)
    pack(spec(tmp_path))
    for frames, data in members(tmp_path / "out").values():
        shown = [read_number(picture) + 1 for picture in decode(data)]  # pictures are numbered from 0
        told = [round(1000 * next(box[0] for box in boxes if box[5] == 1.0)) for boxes in frames]
        assert len(shown) == len(told)
        assert all(0 <= picture - boxes <= 1 for picture, boxes in zip(shown, told, strict=True))


def test_hands_come_first_then_the_best_of_the_objects(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01", SPANS[:1])
    boxes = [[0.1, 0.1, 0.2, 0.2, OBJECT, 0.01 * number] for number in range(20)]
    boxes += [[0.3, 0.3, 0.4, 0.4, HAND, 0.1], [0.5, 0.5, 0.6, 0.6, HAND, 0.9], [0.5, 0.5, 0.5, 0.9, HAND, 0.8]]
    write_hand_objects(tmp_path, "P01_01", dict.fromkeys(range(1, FRAMES + 1), boxes))
    pack(spec(tmp_path))
    ((frames, _),) = members(tmp_path / "out").values()
    for frame in frames:
        assert [box[4] for box in frame] == [HAND] * 2 + [OBJECT] * 12
        assert [box[5] for box in frame] == [0.9, 0.1, *(round(0.01 * number, 5) for number in range(19, 7, -1))]


def test_models_receive_the_boxes_of_the_frames_that_they_see(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01")
    pack(spec(tmp_path))
    folder = ShardFolder(tmp_path / "out")
    inputs = InputRecipe.model_validate({"video": {"short_side": 80, "crop": 80}})
    for clip in folder.clips("train"):
        metadata, view = folder.metadata(clip), evaluation_view(inputs.video, 0)
        arrays = read_sample(folder, clip, metadata, ["video", "detections"], inputs, view).arrays
        for picture, boxes in zip(arrays["video"], arrays["detections"], strict=True):
            told = next(box for box in boxes if box[5] == 1.0)
            assert round(1000 * float(told[0])) == read_number(picture)


def test_recordings_without_detections_have_none_and_say_so(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01")
    path = tmp_path / "EPIC-KITCHENS/P01/hand-objects/P01_01.pkl"
    path.unlink()
    settings = spec(tmp_path)
    summary = pack(settings)
    assert any("no detections: no recording has EPIC-KITCHENS/{participant}/hand-objects" in n for n in summary.notes)
    folder = ShardFolder(tmp_path / "out")
    assert [clip.has("detections") for clip in folder.clips("train")] == [False] * 3
    assert settings.modalities == ["video", "audio", "detections"]


def broken(video: str = "P01_01", number: int = 1, boxes: Sequence[Box] = ()) -> bytes:
    return pickle.dumps([frame_message("P01_01", 3), frame_message(video, number, boxes)], 4)


BROKEN = {
    "empty": (b"", "open", "not a pickle of detections: is empty"),
    "page": (b"<!DOCTYPE html><html></html>", "open", "not a pickle of detections: is a page of HTML or XML"),
    "cut": (b"\x80\x03]q\x00", "open", "not a pickle of detections: pickle exhausted before seeing STOP"),
    "no frame": (pickle.dumps([]), "open", "has no frame"),
    "function": (pickle.dumps([print]), "open", "byte 13: instruction SHORT_BINUNICODE makes no list of bytes"),
    "no message": (pickle.dumps([b"\xff"]), "open", "entry 0: byte 0: a number is cut"),
    "other recording": (broken(video="P01_02"), "open", "entry 1 is of recording 'P01_02'"),
    "frame 0": (broken(number=0), "open", "entry 1 is of frame 0: frames are numbered from 1"),
    "frame twice": (broken(number=3), "open", "entry 1 is of frame 3, which has one before"),
    "many boxes": (broken(boxes=[[0, 0, 1, 1, OBJECT, 0.5]] * 1001), "open", "entry 1 has more than 1,000 boxes"),
    "short": (pickle.dumps([frame_message("P01_01", n) for n in range(61, 71)]), "cut", "ends too early or starts too"),
    "elsewhere": (pickle.dumps([frame_message("P01_01", 500)]), "cut", "has frames 500 to 500, the clip is"),
}


@pytest.mark.parametrize(("content", "stage", "named"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_pickle_fails_the_clips_of_its_recording(
    tmp_path: Path, content: bytes, stage: str, named: str
) -> None:
    write_recording(tmp_path, "P01_01", SPANS[1:])
    (tmp_path / "EPIC-KITCHENS/P01/hand-objects/P01_01.pkl").write_bytes(content)
    failures = pack(spec(tmp_path)).failures
    assert {failure.key for failure in failures} == {"P01_01_0", "P01_01_1"}
    for failure in failures:
        assert (failure.modality, failure.stage) == ("detections", stage)
        assert failure.error.startswith("P01_01.pkl")
        assert named in failure.error
        assert failure.error.isprintable()


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (None, "is missing"),
        ([[0.1, 0.1, 1.5, 0.2, OBJECT, 0.5]], "a box has values that are not in [0, 1]: 0.1, 0.1, 1.5, 0.2, 0.5"),
        ([[0.1, 0.1, float("nan"), 0.2, HAND, 0.5]], "a box has values that are not in [0, 1]"),
        ([[0.1, 0.1, 0.2, 0.2, OBJECT, 7.0]], "a box has values that are not in [0, 1]"),
        ([[0.5, 0.1, 0.2, 0.2, OBJECT, 0.5]], "a box ends before it starts"),
    ],
)
def test_a_broken_frame_fails_only_clips_that_show_it(tmp_path: Path, frame: list[Box] | None, named: str) -> None:
    write_recording(tmp_path, "P01_01", [("00:00:00.10", "00:00:00.50"), *SPANS[1:]])
    frames = {number: boxes_of(number) for number in range(1, FRAMES + 1)}
    del frames[40]
    write_hand_objects(tmp_path, "P01_01", frames | ({} if frame is None else {40: frame}))
    (failure,) = pack(spec(tmp_path)).failures
    assert (failure.key, failure.modality, failure.stage) == ("P01_01_1", "detections", "parse")
    assert failure.error.startswith("P01_01.pkl: frame 40")
    assert named in failure.error


def test_boxes_of_the_last_frame_stand_for_at_most_half_a_second(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01", [("00:00:02.00", "00:00:03.00"), ("00:00:02.00", "00:00:02.60")])
    write_hand_objects(tmp_path, "P01_01", {number: boxes_of(number) for number in range(1, FRAMES - 29)})
    assert not pack(spec(tmp_path)).failures
    frames, data = members(tmp_path / "out")["P01_01_0"]
    numbers = [read_number(picture) for picture in decode(data)]
    assert frames == [stored(boxes_of(min(number, FRAMES - 30))) for number in numbers]
    assert numbers[-1] > FRAMES - 10
    write_hand_objects(tmp_path, "P01_01", {number: boxes_of(number) for number in range(1, FRAMES - 35)})
    (failure,) = pack(spec(tmp_path, "shorter")).failures
    assert (failure.key, failure.stage) == ("P01_01_0", "cut")


def test_a_pickle_that_is_no_file_or_leads_nowhere_is_damage(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01", SPANS[:1])
    path = tmp_path / "EPIC-KITCHENS/P01/hand-objects/P01_01.pkl"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    (failure,) = pack(spec(tmp_path)).failures
    assert "is a link to" in failure.error
    path.unlink()
    path.mkdir()
    (failure,) = pack(spec(tmp_path, "other")).failures
    assert "is a folder, not a file" in failure.error


def test_a_pickle_that_is_too_large_fails_its_clips_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recording(tmp_path, "P01_01", SPANS[:1])
    monkeypatch.setattr(hand_objects, "_MOST_BYTES", 1000)
    (failure,) = pack(spec(tmp_path)).failures
    assert failure.stage == "open"
    assert failure.error == "P01_01.pkl: not a pickle of detections: has more than 1,000 bytes"


def test_no_path_of_detections_leaves_the_raw_folder(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01")
    with pytest.raises(UserError, match=r"epic_kitchens\.hand_objects: path '\.\./P01_01\.pkl' leaves the raw"):
        make_plan(spec(tmp_path, epic_kitchens={"hand_objects": "../{recording}.pkl"}))


def test_detections_are_packed_only_when_asked_for(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01")
    for fields in ({}, {"detections": {"source": "none"}}):
        settings = epic_spec(tmp_path, **fields)
        assert settings.modalities == ["video", "flow", "audio"]
        assert "hand_objects" not in settings.recorded()["epic_kitchens"]
        assert all("detections" not in recording.media for recording in make_plan(settings).recordings)
    with pytest.raises(ValueError, match=r"detections.source 'auto' has no effect .*: choose hand_objects"):
        epic_spec(tmp_path, detections={"max_boxes": 3})
    with pytest.raises(ValueError, match="reader 'something_something' has no such files"):
        load_spec("something_something", raw=tmp_path, overrides=["detections.source=hand_objects"])
    other = {"hand_objects": "boxes/{recording}.pkl"}
    assert spec(tmp_path, epic_kitchens=other).recorded()["epic_kitchens"]["hand_objects"] == other["hand_objects"]


def test_sounds_have_the_same_detections_without_any_picture(tmp_path: Path) -> None:
    """Boxes are fractions of the picture: they are packed beside audio alone, and drawn."""
    write_sounds(tmp_path, [sound_row("P01_01_0", start_s=0.5, stop_s=0.7)])
    write_movie(movie_path(tmp_path), frames=0, beeps=Beeps([0.5, 0.6]), seconds=3.0)
    write_hand_objects(tmp_path, "P01_01", {number: boxes_of(number) for number in range(1, FRAMES + 1)})
    assert not pack(spec(tmp_path, reader="epic_sounds")).failures
    folder = ShardFolder(tmp_path / "out")
    (clip,) = folder.clips("train")
    assert [name for name in ("video", "audio", "detections") if clip.has(name)] == ["audio", "detections"]
    assert read_frames(folder.read(clip, "detections")) == [stored(boxes_of(number)) for number in range(31, 43, 2)]
    assert f'"width":{PICTURE_SIZE[0]},"height":{PICTURE_SIZE[1]}'.encode() in folder.read(clip, "detections")
    contact_sheet(folder, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_boxes_alone_are_packed_without_reading_a_picture(tmp_path: Path) -> None:
    write_recording(tmp_path, "P01_01")
    nothing_else = {"video": {"source": "none"}, "audio": {"source": "none"}}
    beside = pack(spec(tmp_path, **nothing_else))
    shutil.rmtree(tmp_path / "EPIC-KITCHENS/P01/rgb_frames")
    alone = pack(spec(tmp_path, "alone"))
    for summary in (beside, alone):
        assert not summary.failures
        assert summary.subsets == {"train": {"D": 3}}
        folder = ShardFolder(summary.out)
        for clip in folder.clips("train"):
            assert picture_size(folder.read(clip, "detections")) == PICTURE_SIZE
