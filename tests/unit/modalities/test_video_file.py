"""Tests that stored frames of any video file are upright and are those that were on screen at their time."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip
from kits.packing import (
    Beeps,
    decode,
    decode_sound,
    epic_spec,
    heard_late_s,
    number_picture,
    read_number,
    write_cover_song,
    write_movie,
)

EARLY_S = 0.003
"""Tolerance in seconds: containers round to milliseconds, and a frame 2 ms after a moment counts as shown then."""

SPANS = ((0.0, 0.6), (0.3, 1.1), (0.313, 1.5), (0.777, 1.4), (0.777, 2.9), (1.25, 1.3))


def cut(movie: Path, spans: tuple[tuple[float, float | None], ...], **fields: Any) -> list[CutClip]:
    """Cut spans out of a video file; none may fail."""
    spec = epic_spec(movie.parent, **({"flow": {"source": "none"}} | fields))
    clips = tuple(ClipRecord(f"c{place}", "train", *span, {}) for place, span in enumerate(spans))
    items = {}
    for item in cut_recording(Recording("r", "p", clips, video_file=movie), spec):
        assert isinstance(item, CutClip), item
        items[item.record.key] = item
    return [items[clip.key] for clip in clips]


def expect_frames_on_screen(movie: Path, times: list[float], end_s: float) -> None:
    """Check that every stored frame of overlapping clips, first and last included, is on screen at its time."""
    for item in cut(movie, SPANS, video={"max_fps": 60}):
        fps = item.described["video"]["fps"]
        seen = [read_number(picture) for picture in decode(item.payloads["video"])]
        assert abs(len(seen) - (min(item.record.stop_s, end_s) - item.record.start_s) * fps) <= 1.01
        for place, number in enumerate(seen):
            moment = item.record.start_s + place / fps
            assert times[number] <= moment + EARLY_S or number == 0
            assert number + 1 == len(times) or moment < times[number + 1] + EARLY_S


@pytest.mark.parametrize("rate", ["24", "25", "30000/1001", "50", "60000/1001"])
@pytest.mark.parametrize(("suffix", "b_frames"), [("mp4", 0), ("mp4", 3), ("mkv", 3), ("webm", 0)])
def test_every_stored_frame_was_on_screen_at_its_time(
    tmp_path: Path, suffix: str, b_frames: int, rate: str
) -> None:
    fps = Fraction(rate)
    num = int(3 * fps)
    movie = write_movie(tmp_path / f"m.{suffix}", frames=num, fps=fps, b_frames=b_frames, gop=11)
    with av.open(str(movie)) as container:
        picture_types = {frame.pict_type for frame in container.decode(video=0)}
        assert (av.video.frame.PictureType.B in picture_types) == (b_frames > 0)
    expect_frames_on_screen(movie, [float(number / fps) for number in range(num)], float(num / fps))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["mp4", "mkv", "webm"]),
    st.lists(st.sampled_from([0.005, 0.011, 0.02, 0.04, 0.07, 0.3]), min_size=60, max_size=90),
    st.sampled_from([0.0, 0.08]),
    st.booleans(),
)
def test_frames_at_irregular_times_are_stored_at_those_times(
    tmp_path: Path, suffix: str, gaps: list[float], first_s: float, has_sound: bool
) -> None:
    gaps = [*gaps, *[0.04] * 75]  # long enough for every clip
    times = [float(time) for time in np.cumsum([first_s, *gaps])]
    beeps = Beeps([1.0], rate=48_000, codec="libopus" if suffix == "webm" else "aac") if has_sound else None
    b_frames = 0 if suffix == "webm" else 2
    movie = write_movie(tmp_path / f"m.{suffix}", frames=len(times), times=times, beeps=beeps, b_frames=b_frames)
    # Time 0 of a container is the start of its first stream.
    origin = 0.0 if has_sound else first_s
    expect_frames_on_screen(movie, [time - origin for time in times], times[-1] - origin)


def test_frames_hidden_by_an_edit_list_are_not_stored(tmp_path: Path) -> None:
    times = [number / 25 - 0.2 for number in range(80)]
    movie = write_movie(tmp_path / "m.mp4", frames=80, times=times, b_frames=2, beeps=Beeps([1.0]))
    with av.open(str(movie)) as container:
        assert container.streams.video[0].start_time == 0
    (item,) = cut(movie, ((0.2, 1.2),))
    assert [read_number(picture) for picture in decode(item.payloads["video"])] == list(range(10, 35))
    assert abs(heard_late_s(decode_sound(item.payloads["audio"]), 0.8)) < 0.005


def corners(pictures: list[np.ndarray]) -> list[int]:
    """Return the brightness (0 to 9) of the first picture's quarters: top left and right, bottom left and right."""
    height, width = pictures[0].shape[:2]
    return [round(float(pictures[0][y * height // 4, x * width // 4].mean()) / 25) for y in (1, 3) for x in (1, 3)]


@pytest.mark.parametrize(
    ("rotation", "upright"), [(0, [0, 3, 6, 9]), (90, [3, 9, 0, 6]), (180, [9, 6, 3, 0]), (270, [6, 0, 9, 3])]
)
def test_video_with_a_rotation_flag_is_stored_upright(tmp_path: Path, rotation: int, upright: list[int]) -> None:
    quarters = np.kron(np.array([[0, 3], [6, 9]], np.uint8) * 25, np.ones((24, 40), np.uint8))
    pictures = [np.repeat(quarters[..., None], 3, axis=2)] * 30
    # The flag counts counter-clockwise, as FFmpeg's display matrix does.
    (item,) = cut(write_movie(tmp_path / "m.mp4", pictures=pictures, rotation=rotation), ((0.1, 0.9),))
    stored = decode(item.payloads["video"])
    assert stored[0].shape[:2] == ((80, 48) if rotation % 180 else (48, 80))
    assert corners(stored) == upright
    assert (item.described["video"]["width"], item.described["video"]["height"]) == stored[0].shape[1::-1]


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv420p10le", "yuv422p", "yuv444p"])
def test_pictures_of_any_depth_and_sampling_keep_their_values(tmp_path: Path, pixels: str) -> None:
    picture = np.zeros((48, 80, 3), np.uint8)
    for place, colour in enumerate([(250, 0, 0), (0, 250, 0), (0, 0, 250), (20, 120, 220)]):
        picture[:, place * 20 : place * 20 + 20] = colour
    (item,) = cut(write_movie(tmp_path / "m.mp4", pictures=[picture] * 30, pixels=pixels), ((0.1, 0.9),))
    stored = decode(item.payloads["video"])[0].astype(int)
    assert np.abs(stored[24, 10::20] - picture[24, 10::20]).max() <= 12


def test_gray_video_is_stored_as_players_show_it(tmp_path: Path) -> None:
    levels = [20 + 3 * number for number in range(60)]
    pictures = [np.full((48, 80), level, np.uint8) for level in levels]
    movie = write_movie(tmp_path / "m.mkv", pictures=pictures, pixels="gray")
    (item,) = cut(movie, ((0.4, 1.6),))
    # Gray of limited range is 16 for black and 235 for white.
    shown = np.array([(level - 16) * 255 / 219 for level in levels[10:40]])
    assert np.abs(np.array([picture.mean() for picture in decode(item.payloads["video"])]) - shown).max() < 3


@pytest.mark.parametrize("size", [(81, 45), (80, 45), (81, 48)])
def test_odd_sizes_are_stored_even_and_complete(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    pictures = [np.pad(number_picture(n, 80, height), ((0, 0), (0, width - 80), (0, 0)), "edge") for n in range(40)]
    (item,) = cut(write_movie(tmp_path / "m.mp4", pictures=pictures, pixels="yuv444p"), ((0.2, 1.2),))
    stored = decode(item.payloads["video"])
    assert [read_number(picture) for picture in stored] == list(range(5, 30))
    height, width = stored[0].shape[:2]
    assert width % 2 == height % 2 == 0
    assert abs(width - size[0]) <= 1 >= abs(height - size[1])


def test_the_default_ones_of_several_streams_are_stored(tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "m.mp4", frames=60, beeps=Beeps([0.8], rate=48_000), decoys=True)
    with av.open(str(movie)) as container:
        assert [stream.type for stream in container.streams] == ["video", "video", "audio", "audio"]
    (item,) = cut(movie, ((0.2, 1.2),))
    assert [read_number(picture) for picture in decode(item.payloads["video"])] == list(range(5, 30))
    assert abs(heard_late_s(decode_sound(item.payloads["audio"]), 0.6)) < 0.005


def test_the_cover_of_a_song_is_not_video(tmp_path: Path) -> None:
    song = write_cover_song(tmp_path / "m.mp4", Beeps([0.8]), seconds=2.0)
    (item,) = cut(song, ((0.2, 1.2),))
    assert set(item.payloads) == {"audio"}
    assert abs(heard_late_s(decode_sound(item.payloads["audio"]), 0.6)) < 0.005
