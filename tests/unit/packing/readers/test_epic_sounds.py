"""EPIC-SOUNDS: rows become clips cut by time from every medium, classes are paired, what is wrong is named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.modalities.recording import Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import pack
from karmma_dist.packing.readers.epic_sounds import frames_shown, read_epic_sounds
from karmma_dist.packing.records import CutClip
from karmma_dist.packing.spec import PackingSpec
from karmma_dist.packing.verify.verify import verify
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import evaluation_view
from kits.packing import (
    SOUND_CLASSES,
    SOUND_COLUMNS,
    Beeps,
    decode,
    decode_sound,
    epic_spec,
    heard_late_s,
    movie_path,
    number_picture,
    read_number,
    sound_row,
    write_frames,
    write_movie,
    write_sounds,
)

RATE = 16_000
OTHER = {"class": "zip", "class_id": 3}


def spec(root: Path, **fields: object) -> PackingSpec:
    return epic_spec(root, reader="epic_sounds", **fields)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"stop_timestamp": "00:00:00.050"}, "stop_timestamp 00:00:00.050 is not after 00:00:00.100"),
        ({"start_timestamp": "59184"}, "start_timestamp '59184' is not HH:MM:SS.ss"),
        ({"class_id": 1}, "class_id 1 is 'metal-only collision', and 'cut / chop' in"),
        ({"class": "cut / chop"}, "class_id 0 is 'cut / chop', and 'metal-only collision' in"),
        ({"class_id": 3}, "class 'metal-only collision' has id 3, and 0 in"),
        ({"class": "zip", "class_id": 4}, "class_id 4, but no row has 2: ids are 0, 1, 2, ..."),
        ({"class_id": -1}, "class_id -1 is no class: clips without a class go into a split of unlabelled_splits"),
        ({"class_id": ""}, "class_id '' is not a whole number"),
        ({"class": " "}, "class is empty"),
        ({"annotation_id": "P01_01_0"}, "annotation_id 'P01_01_0' is already that of"),
        ({"annotation_id": "../P01"}, "annotation_id '../P01': only letters"),
        ({"video_id": "../../etc"}, "video_id '../../etc'"),
        ({"participant_id": ".."}, "participant_id '..'"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, bad: dict, named: str) -> None:
    write_sounds(tmp_path, [sound_row("P01_01_0"), sound_row("P01_01_1", label=1)], [sound_row("P01_01_2") | bad])
    with pytest.raises(UserError) as caught:
        read_epic_sounds(spec(tmp_path))
    text = str(caught.value)
    assert "\n" not in text
    assert f"{tmp_path}/annotations/EPIC_Sounds_validation.csv, row 2: " in text
    assert named in text


@pytest.mark.parametrize(
    "column", [name for name in SOUND_COLUMNS if name not in ("start_sample", "stop_sample", "description")]
)
def test_only_columns_that_are_needed_must_exist(tmp_path: Path, column: str) -> None:
    needed = [name for name in SOUND_COLUMNS if name not in ("start_sample", "stop_sample", "description")]
    write_sounds(tmp_path, [sound_row("P01_01_0")], columns=needed)
    assert read_epic_sounds(spec(tmp_path)).keys("train") == ["P01_01_0"]
    write_sounds(tmp_path, [sound_row("P01_01_0")], columns=[name for name in needed if name != column])
    with pytest.raises(UserError, match=f"EPIC_Sounds_train.csv: column '{column}' is missing"):
        read_epic_sounds(spec(tmp_path))


def test_classes_are_paired_over_all_labelled_splits(tmp_path: Path) -> None:
    rows = [sound_row(f"P01_01_{label}", label=label) for label in (2, 0, 1)]
    write_sounds(tmp_path, rows[:2], rows[2:], [sound_row("P01_101_0", "P01_101")])
    plan = read_epic_sounds(spec(tmp_path))
    assert plan.classes == {"sound": SOUND_CLASSES}
    assert plan.splits == ("train", "validation", "test")
    clips = {clip.key: clip for recording in plan.recordings for clip in recording.clips}
    assert {key: clip.labels["sound"] for key, clip in clips.items()} == {
        "P01_01_0": 0, "P01_01_1": 1, "P01_01_2": 2, "P01_101_0": None,
    }  # fmt: skip
    assert (clips["P01_01_0"].narration, clips["P01_101_0"].narration) == ("a clang", "")


def test_settings_of_epic_kitchens_recordings_hold_for_sounds(tmp_path: Path) -> None:
    rows = [sound_row(f"P01_{n:02d}_0", f"P01_{n:02d}") for n in range(1, 30)]
    write_sounds(tmp_path, rows, [sound_row("P02_01_0", "P02_01"), sound_row("P02_01_1", "P02_01") | OTHER])
    with pytest.raises(UserError, match=r"class_id 3, but no row has 1"):
        read_epic_sounds(spec(tmp_path))
    write_sounds(tmp_path, rows, [sound_row("P02_01_0", "P02_01"), sound_row("P02_01_1", "P02_01", label=1)])
    fields = {"hold_out": {"held": 0.5}, "pruned_splits": ["validation"]}
    plan = read_epic_sounds(spec(tmp_path, epic_sounds=fields))
    assert plan.keys("validation") == ["P02_01_0"]
    assert 5 < len(plan.keys("held")) < 25
    one = read_epic_sounds(spec(tmp_path, participants=["P02"]))
    assert [recording.name for recording in one.recordings] == ["P02_01"]
    assert one.classes == plan.classes


@given(start_ms=st.integers(0, 4_000_000), length_ms=st.integers(1, 5000), fps=st.sampled_from([50, 60]))
def test_frame_numbers_are_of_the_frames_that_are_shown(start_ms: int, length_ms: int, fps: int) -> None:
    """Compare in whole milliseconds: frame n is shown from 1000 (n - 1) / fps on, at the start 2 ms earlier."""
    stop_ms = start_ms + length_ms
    first, stop = frames_shown(start_ms / 1000, stop_ms / 1000, fps)
    assert 1000 * (first - 1) <= (start_ms + 2) * fps < 1000 * first
    assert first < stop
    assert 1000 * (stop - 2) < stop_ms * fps <= 1000 * (stop - 1) or (stop == first + 1 and length_ms <= 2)


@pytest.mark.parametrize(("video", "fps", "per_flow"), [("P01_01", 60, 2), ("P01_101", 50, 1)])
def test_movie_frames_and_flow_of_a_clip_show_the_same_moments(
    tmp_path: Path, video: str, fps: int, per_flow: int
) -> None:
    seconds, stored_fps = 3, min(fps, 30)
    spans = [(0.0, 0.1), (0.017, 0.217), (0.5, 0.6), (0.999, 2.345), (1.0, 1.2), (2.801, 3.0)]
    write_sounds(tmp_path, [sound_row(f"{video}_{n}", video, *span) for n, span in enumerate(spans)])
    folder = tmp_path / "EPIC-KITCHENS/P01"
    write_movie(movie_path(tmp_path, video), frames=seconds * fps, fps=fps)
    write_frames(folder / "rgb_frames" / video, list(range(1, seconds * fps + 1)))
    write_frames(folder / "flow_frames" / video, list(range(1, seconds * fps // per_flow + 1)), ("u", "v"))
    settings = spec(tmp_path, audio={"source": "none"}, flow={"source": "files"})
    (recording,) = read_epic_sounds(settings).recordings
    without = Recording(video, "P01", recording.clips, frames=recording.frames, media=recording.media, nominal_fps=fps)
    by_time = {cut.record.key: cut for cut in cut_recording(recording, settings) if isinstance(cut, CutClip)}
    by_number = {cut.record.key: cut for cut in cut_recording(without, settings) if isinstance(cut, CutClip)}
    assert len(by_time) == len(by_number) == len(spans)
    for clip in recording.clips:
        assert clip.stop_s is not None
        num = max(1, int(np.ceil((clip.stop_s - clip.start_s) * stored_fps - 1e-6)))
        shown = np.floor((clip.start_s + 0.002 + np.arange(num) / stored_fps) * fps)
        times = [read_number(picture) for picture in decode(by_time[clip.key].payloads["video"])]
        numbers = np.array([read_number(picture) for picture in decode(by_number[clip.key].payloads["video"])])
        assert times == shown.tolist()
        assert numbers[0] == shown[0] + 1
        assert ((shown + 1 - numbers) <= (fps % stored_fps > 0)).all()  # equal if whole frames are left out
        assert (numbers <= shown + 1).all()
        for cut in (by_time[clip.key], by_number[clip.key]):
            pictures = decode(cut.payloads["flow"], "gray")
            files = np.floor((clip.start_s + 0.002) * fps / per_flow) + 1 + np.arange(len(pictures))
            values = [float(picture[: picture.shape[0] // 2].mean()) for picture in pictures]
            assert values == pytest.approx((files % 200 + 20).tolist(), abs=0.5)


def segments(seed: int, num: int, end_s: float) -> list[tuple[float, float]]:
    """Return spans in whole milliseconds of 0.1 to 1.5 s that overlap heavily, the last two with the same span."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, round(1000 * end_s) - 100, num - 1)
    lengths = random.integers(100, 1500, num - 1)
    spans = [(int(a) / 1000, min(int(a + b) / 1000, end_s)) for a, b in zip(starts, lengths, strict=True)]
    return [*spans, spans[-1]]


@pytest.mark.parametrize("codec", ["aac", "flac"])
def test_overlapping_sounds_are_cut_to_the_sample(tmp_path: Path, codec: str) -> None:
    """Compare with one clip of the whole recording, whose chirps are where they belong."""
    end_s, beeps = 6.0, (0.5, 1.75, 3.1, 4.4)
    spans = segments(0, 40, end_s)
    assert sum(a[1] > b[0] for a, b in pairwise(sorted(spans))) > 30
    rows = [sound_row(f"P01_01_{n}", start_s=a, stop_s=b) for n, (a, b) in enumerate(spans)]
    write_sounds(tmp_path, [*rows, sound_row("whole", start_s=0.0, stop_s=end_s)])
    write_movie(movie_path(tmp_path), frames=0, beeps=Beeps(beeps, codec=codec), seconds=end_s)
    summary = pack(spec(tmp_path, video={"source": "none"}, flow={"source": "none"}))
    assert not summary.failures
    folder = ShardFolder(tmp_path / "out")
    samples = {clip.key: decode_sound(folder.read(clip, "audio")) for clip in folder.clips("train")}
    whole = samples.pop("whole")
    assert len(whole) == end_s * RATE
    assert max(abs(heard_late_s(whole, at)) for at in beeps) < 0.002
    assert len(samples) == len(spans)
    for number, (start_s, stop_s) in enumerate(spans):
        first, num = round(start_s * RATE), round((stop_s - start_s) * RATE)
        assert np.array_equal(samples[f"P01_01_{number}"], whole[first : first + num])


def test_models_receive_whole_views_of_the_shortest_sounds(tmp_path: Path) -> None:
    """Windows of 1.116 s hold all of a clip of 0.1 s and silence around it; 32 frames repeat those it has."""
    lengths = (0.1, 0.2, 0.5)
    rows = [sound_row(f"P01_01_{n}", start_s=1.0, stop_s=1.0 + length) for n, length in enumerate(lengths)]
    write_sounds(tmp_path, rows)
    pictures = [number_picture(number, 80, 80) for number in range(90)]
    write_movie(movie_path(tmp_path), pictures=pictures, fps=30, beeps=Beeps([1.0]))
    pack(spec(tmp_path, flow={"source": "none"}))
    assert verify(tmp_path / "out", full=True).whole
    folder = ShardFolder(tmp_path / "out")
    inputs = InputRecipe.model_validate({"video": {"num_frames": 32, "short_side": 80, "crop": 80}})
    for clip in folder.clips("train"):
        length_s, metadata = lengths[int(clip.key[-1])], folder.metadata(clip)
        samples = decode_sound(folder.read(clip, "audio"))
        view = evaluation_view(inputs.video, 0)
        arrays = read_sample(folder, clip, metadata, ["video", "audio"], inputs, view).arrays
        numbers = [read_number(picture) for picture in arrays["video"]]
        assert numbers == [30 + int(time * round(30 * length_s)) for time in view.times_F]
        assert arrays["audio"].shape == (32, inputs.audio.window_samples)
        for window, time in zip(arrays["audio"], view.times_F, strict=True):
            first = inputs.audio.window_samples // 2 - round(time * length_s * RATE)
            assert np.array_equal(window[first : first + len(samples)], samples)
            assert not window[:first].any()
            assert not window[first + len(samples) :].any()


def test_what_a_recording_lacks_is_absent_or_a_named_failure(tmp_path: Path) -> None:
    """A recording of 3 s: a clip may end up to 10 s after it; one that starts after it, or ends later, fails."""
    write_sounds(
        tmp_path,
        [
            sound_row("inside", start_s=1.0, stop_s=1.2), sound_row("across", start_s=2.5, stop_s=4.0),
            sound_row("after", start_s=3.5, stop_s=4.0), sound_row("late", start_s=2.0, stop_s=1081.4),
            sound_row("silent", "P01_02"), sound_row("deaf", "P02_01"),
        ],
        test=[sound_row("unlabelled", start_s=0.2, stop_s=0.9)],
    )  # fmt: skip
    write_movie(movie_path(tmp_path), frames=90, fps=30, beeps=Beeps([1.0]))
    write_movie(movie_path(tmp_path, "P01_02"), frames=60, fps=30)
    summary = pack(spec(tmp_path, flow={"source": "none"}))
    assert [(failure.key, failure.modality, failure.stage, failure.error) for failure in summary.failures] == [
        ("after", "video", "cut", "starts at 3.50 s, the video ends at 3.00 s"),
        ("late", "video", "cut", "stop 1081.4 s is after the end of P01_01.MP4 at 3.03 s: are these milliseconds?"),
    ]
    assert any("1 recordings (1 clips) left out: no media file; the first is P02_01" in n for n in summary.notes)
    folder = ShardFolder(tmp_path / "out")
    packed = {clip.key: clip for split in folder.splits for clip in folder.clips(split)}
    assert not packed["silent"].has("audio")
    assert packed["inside"].has("audio")
    length = len(decode_sound(folder.read(packed["across"], "audio")))
    assert length == 1.5 * RATE
    assert packed["unlabelled"].labels == {"sound": None}
    assert folder.classes == {"sound": SOUND_CLASSES[:1]}
