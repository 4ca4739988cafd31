"""Cutting: every stored frame, sample and flow value is the right one; damage fails only the clips that contain it."""

from __future__ import annotations

import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.modalities.audio.store import encode_flac
from karmma_dist.modalities.encode import Geometry
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.flow.store import quantise_flow
from karmma_dist.modalities.pictures import ClipPictures
from karmma_dist.modalities.recording import ClipRecord, MediaFile, Recording
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip, Failure
from karmma_dist.packing.spec import PackingSpec
from kits.packing import (
    decode,
    decode_sound,
    epic_spec,
    number_picture,
    read_number,
    write_frames,
    write_movie,
)

FRAMES, FPS, PERIOD = 100, 25, 0.04


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four seconds of numbered frames with tone bursts at 1.0 and 2.5 s."""
    return write_movie(tmp_path_factory.mktemp("movie") / "m.mp4", frames=FRAMES, fps=FPS, bursts=[1.0, 2.5])


def clip(key: str, start_s: float, stop_s: float | None, **frames: int) -> ClipRecord:
    return ClipRecord(key, "train", start_s, stop_s, {"verb": 0}, **frames)


def spec(root: Path, **fields: object) -> PackingSpec:
    return epic_spec(root, **({"flow": {"source": "none"}} | fields))


def cut(recording: Recording, spec: PackingSpec) -> dict[str, CutClip | Failure]:
    found = list(cut_recording(recording, spec))
    keyed = {(item.key if isinstance(item, Failure) else item.record.key): item for item in found}
    assert len(keyed) == len(found) == len(recording.clips)
    return keyed


def numbers(item: CutClip | Failure) -> list[int]:
    assert isinstance(item, CutClip), item
    return [read_number(picture) for picture in decode(item.payloads["video"])]


spans = st.tuples(st.floats(0, 3.6), st.floats(0.04, 1.5)).map(lambda s: (round(s[0], 2), round(s[0] + s[1], 2)))


@given(st.lists(spans, min_size=1, max_size=4), st.sampled_from([8.0, 10.0, 12.5, 25.0, 60.0]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stored_frames_show_the_source_at_their_times(
    movie: Path, tmp_path: Path, spans: list[tuple[float, float]], max_fps: float
) -> None:
    clips = tuple(clip(f"c{place}", *span) for place, span in enumerate(spans))
    found = cut(Recording("r", "p", clips, video_file=movie), spec(tmp_path, video={"max_fps": max_fps}))
    fps = min(max_fps, FPS)
    for record in clips:
        seen = numbers(found[record.key])
        end = min(record.stop_s, FRAMES * PERIOD)
        assert abs(len(seen) - (end - record.start_s) * fps) <= 1
        for place, number in enumerate(seen):
            moment = record.start_s + place / fps
            assert number * PERIOD <= moment + 0.003
            assert moment < (number + 1) * PERIOD + 0.003


def test_overlapping_clips_are_cut_as_if_each_were_alone(movie: Path, tmp_path: Path) -> None:
    clips = (clip("a", 0.5, 1.5), clip("b", 0.5, 1.5), clip("c", 1.02, 3.0), clip("d", 0.0, 4.0))
    settings = epic_spec(tmp_path)
    together = cut(Recording("r", "p", clips, video_file=movie), settings)
    for record in clips:
        alone = cut(Recording("r", "p", (record,), video_file=movie), settings)[record.key]
        assert isinstance(alone, CutClip)
        assert alone.payloads == together[record.key].payloads
        assert alone.described == together[record.key].described


def test_a_clip_file_is_stored_frame_by_frame(tmp_path: Path) -> None:
    # Matroska rounds timestamps to milliseconds: 1/12 s never falls on one.
    movie = write_movie(tmp_path / "m.mkv", frames=30, fps=12)
    found = cut(Recording("r", "p", (clip("a", 0.0, None),), video_file=movie), spec(tmp_path))["a"]
    assert numbers(found) == list(range(30))
    assert found.stop_s == pytest.approx(2.5)


def test_clips_past_the_end_are_clamped_or_fail(movie: Path, tmp_path: Path) -> None:
    clips = (clip("late", 3.8, 5.0), clip("after", 4.5, 5.0))
    found = cut(Recording("r", "p", clips, video_file=movie), spec(tmp_path))
    assert numbers(found["late"]) == [95, 96, 97, 98, 99]
    assert isinstance(found["after"], Failure)
    assert "4.50 s" in found["after"].error


def test_a_movie_without_sound_or_picture_does_not_fail(tmp_path: Path) -> None:
    silent = write_movie(tmp_path / "silent.mp4", frames=50)
    dark = write_movie(tmp_path / "dark.mp4", bursts=[0.5], seconds=2.0)
    settings = epic_spec(tmp_path)
    assert set(cut(Recording("r", "p", (clip("a", 0.2, 1.0),), video_file=silent), settings)["a"].payloads) == {
        "video",
        "flow",
    }
    assert set(cut(Recording("r", "p", (clip("a", 0.2, 1.0),), video_file=dark), settings)["a"].payloads) == {"audio"}


def test_damage_in_the_middle_fails_only_its_clips(movie: Path, tmp_path: Path) -> None:
    data = bytearray(movie.read_bytes())
    with_damage = tmp_path / "damaged.mp4"
    with av.open(str(movie)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.pts is not None]
        hit = next(p for p in packets if p.is_keyframe and p.pts * p.time_base >= 1.8)
        data[hit.pos + 4 : hit.pos + hit.size] = bytes(255 for _ in range(hit.size - 4))
        hit_s = float(hit.pts * hit.time_base)
    with_damage.write_bytes(data)
    before, across, after = (
        clip("before", 0.2, hit_s - 0.1),
        clip("across", hit_s - 0.4, hit_s + 0.2),
        clip("after", 3.0, 3.8),
    )
    found = cut(Recording("r", "p", (before, across, after), video_file=with_damage), spec(tmp_path))
    assert isinstance(found["across"], Failure)
    assert (found["across"].modality, found["across"].stage) == ("video", "decode")
    whole = cut(Recording("r", "p", (before, after), video_file=movie), spec(tmp_path))
    assert found["before"].payloads == whole["before"].payloads
    assert found["after"].payloads == whole["after"].payloads


def test_a_cut_movie_fails_its_lost_clips(tmp_path: Path) -> None:
    # The index comes first, as in streamed files: frames that are cut off are declared but missing.
    noise = list(np.random.default_rng(0).integers(0, 255, (100, 48, 80, 3), dtype=np.uint8))
    path = write_movie(tmp_path / "m.mp4", pictures=noise, index_first=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = cut(Recording("r", "p", (clip("early", 0.1, 1.0), clip("late", 3.0, 3.5)), video_file=path), spec(tmp_path))
    assert isinstance(found["early"], CutClip)
    assert isinstance(found["late"], Failure)


@pytest.mark.parametrize("content", [b"", b"not a movie at all", bytes(5000)])
def test_a_file_that_is_no_movie_fails_every_clip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.mp4"
    path.write_bytes(content)
    found = cut(Recording("r", "p", (clip("a", 0, 1), clip("b", 1, 2)), video_file=path), spec(tmp_path))
    assert all(isinstance(item, Failure) and item.stage == "open" for item in found.values())


def test_numbered_frames_are_cut_by_number_and_clamped(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "rgb", list(range(1, 81)))
    flow = write_frames(tmp_path / "flow", list(range(1, 41)), ("u", "v"))
    record = clip("a", 0.0, 1.4, start_frame=21, stop_frame=105)
    recording = Recording("r", "p", (record,), frames=frames, media={"flow": MediaFile(flow, rate=2)}, nominal_fps=60)
    found = cut(recording, epic_spec(tmp_path, video={"max_fps": 30}))["a"]
    assert numbers(found) == list(range(21, 81, 2))
    assert found.described["video"]["fps"] == found.described["flow"]["fps"] == 30
    values = [picture[10, 40] for picture in decode(found.payloads["flow"], "gray")]
    assert np.abs(np.array(values, float) - (np.arange(11, 41) + 20)).max() <= 2
    assert found.described["flow"]["source"] == "files"


def test_a_tar_of_frames_equals_the_folder_unless_cut(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "rgb", list(range(1, 31)))
    tar = tmp_path / "rgb.tar"
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.glob("*.jpg")):
            archive.add(path, f"./{path.name}")
    record = clip("a", 0.0, 0.3, start_frame=3, stop_frame=20)
    results = [cut(Recording("r", "p", (record,), frames=path), spec(tmp_path))["a"] for path in (folder, tar)]
    assert results[0].payloads == results[1].payloads
    with tarfile.open(tar) as archive:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in archive]
    whole = tar.read_bytes()
    for size in (ends[12], ends[12] - 700, ends[12] + 100):
        tar.write_bytes(whole[:size])
        found = cut(Recording("r", "p", (record,), frames=tar), spec(tmp_path))["a"]
        assert isinstance(found, Failure)
        assert found.stage == "open"


@pytest.mark.parametrize("prefix", ["", "./", "P01_01/", "./P01_01/", "data/P01_01/"])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_inside_a_tar_may_have_folders_before_them(tmp_path: Path, prefix: str, form: int) -> None:
    folders = {
        "rgb": write_frames(tmp_path / "rgb", list(range(1, 31))),
        "flow": write_frames(tmp_path / "flow", list(range(1, 16)), ("u", "v")),
    }
    tars = {}
    for name, folder in folders.items():
        tars[name] = tmp_path / f"{name}.tar"
        with tarfile.open(tars[name], "w", format=form) as archive:
            archive.add(folder, prefix or ".", recursive=False)
            for path in sorted(folder.rglob("*.jpg"), reverse=True):
                archive.add(path, f"{prefix}{path.relative_to(folder)}")
    record = clip("a", 0.0, 0.3, start_frame=3, stop_frame=20)
    cuts = [
        cut(
            Recording("r", "p", (record,), frames=paths["rgb"], media={"flow": MediaFile(paths["flow"], rate=2)}),
            epic_spec(tmp_path),
        )["a"]
        for paths in (folders, tars)
    ]
    assert set(cuts[0].payloads) == {"video", "flow"}
    assert cuts[0].payloads == cuts[1].payloads
    assert cuts[0].described == cuts[1].described


@pytest.mark.parametrize("harm", ["missing", "cut", "other size"])
def test_a_bad_frame_fails_only_the_clips_that_show_it(tmp_path: Path, harm: str) -> None:
    frames = write_frames(tmp_path / "rgb", list(range(1, 61)))
    path = frames / "frame_0000000030.jpg"
    if harm == "missing":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        write_frames(frames, [30], size=(160, 96))
    clips = (clip("a", 0, 0.3, start_frame=1, stop_frame=20), clip("b", 0.4, 0.8, start_frame=25, stop_frame=50))
    found = cut(Recording("r", "p", clips, frames=frames), spec(tmp_path, video={"max_fps": 60}))
    assert isinstance(found["a"], CutClip)
    assert isinstance(found["b"], Failure)


def test_computed_flow_is_the_motion_between_stored_frames(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    wide = np.kron(random.integers(0, 255, (24, 60)), np.ones((4, 4))).astype(np.uint8)
    pictures = [np.repeat(wide[:, 60 - 2 * n : 180 - 2 * n, None], 3, 2) for n in range(12)]
    movie = write_movie(tmp_path / "m.mp4", pictures=pictures)
    recording = Recording("r", "p", (clip("a", 0.0, 0.48),), video_file=movie)
    found = cut(recording, epic_spec(tmp_path, flow={"bound": 4}))["a"]
    flow = np.stack(decode(found.payloads["flow"], "gray")).astype(float)
    assert flow.shape[0] == found.described["video"]["num_frames"] == 12
    u, v = flow[:, :96], flow[:, 96:]
    assert np.median((u[:, 20:-20, 20:-20] - 127.5) / 127.5 * 4) == pytest.approx(2.0, abs=0.1)
    assert np.median((v[:, 20:-20, 20:-20] - 127.5) / 127.5 * 4) == pytest.approx(0.0, abs=0.1)
    np.testing.assert_allclose(flow[-1], flow[-2], atol=6)


@settings(deadline=None)
@given(st.floats(-50, 50), st.sampled_from([1.0, 8.0, 20.0]))
def test_flow_is_quantised_to_half_a_step_and_clipped(u: float, bound: float) -> None:
    stored = quantise_flow(np.full((2, 3, 2), (u, -u), np.float32), bound)
    assert stored.shape == (4, 3)
    back = (stored.astype(float) - 127.5) / 127.5 * bound
    assert abs(back[0, 0] - np.clip(u, -bound, bound)) <= bound / 127.5 * 0.51
    assert abs(back[2, 0] + np.clip(u, -bound, bound)) <= bound / 127.5 * 0.51


@settings(deadline=None)
@given(
    st.integers(40, 2000),
    st.integers(40, 2000),
    st.integers(16, 512),
    st.tuples(*[st.floats(0, 0.4)] * 2, *[st.floats(0.6, 1)] * 2),
)
def test_the_stored_picture_has_even_sides_and_is_never_enlarged(
    width: int, height: int, short_side: int, region: tuple[float, float, float, float]
) -> None:
    spec = VideoSpec(short_side=short_side, region=region)
    across, down = (region[2] - region[0]) * width, (region[3] - region[1]) * height
    if min(across, down) < 18:
        return
    found = Geometry.of(width, height, spec)
    assert found.width % 2 == found.height % 2 == 0
    assert found.left >= 0 <= found.top
    assert found.left + found.width <= found.scaled_width
    assert found.top + found.height <= found.scaled_height
    assert min(found.width, found.height) <= min(across, down, short_side) + 1
    assert found.width / found.height == pytest.approx(across / down, rel=2 / min(found.width, found.height) + 0.01)


def test_the_region_is_what_is_stored(tmp_path: Path) -> None:
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[48:, 80:] = 200
    movie = write_movie(tmp_path / "m.mp4", pictures=[picture] * 10)
    settings = spec(tmp_path, video={"region": [0.55, 0.55, 0.95, 0.95], "short_side": 32})
    found = cut(Recording("r", "p", (clip("a", 0, 0.3),), video_file=movie), settings)["a"]
    stored = decode(found.payloads["video"])[0]
    assert stored.shape[0] == 32
    assert stored.min() > 180


def test_audio_survives_flac_bit_by_bit() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32767, 12_345).astype(np.int16)
    np.testing.assert_array_equal(decode_sound(encode_flac(samples)), samples)


def test_flow_none_and_video_none_store_only_the_rest(movie: Path, tmp_path: Path) -> None:
    record = clip("a", 0.2, 1.0)
    no_video = epic_spec(tmp_path, video={"source": "none"})
    found = cut(Recording("r", "p", (record,), video_file=movie), no_video)["a"]
    assert set(found.payloads) == {"flow", "audio"}
    files_only = epic_spec(tmp_path, flow=FlowSpec(source="files").model_dump())
    assert set(cut(Recording("r", "p", (record,), video_file=movie), files_only)["a"].payloads) == {"video", "audio"}


def test_frame_rates_are_kept_exactly(tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "m.mp4", pictures=[number_picture(n) for n in range(40)], fps=Fraction(30000, 1001))
    found = cut(Recording("r", "p", (clip("a", 0, 1.0),), video_file=movie), spec(tmp_path))["a"]
    assert found.described["video"]["fps"] == pytest.approx(30000 / 1001, abs=1e-5)
    assert numbers(found) == list(range(30))


def test_media_that_break_their_reader_cost_their_own_clips_only(
    movie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_on_second(self: ClipPictures) -> object:
        if self.num_frames > 20:
            raise av.error.FFmpegError(5, "broken in an unforeseen way")
        return finish(self)

    finish = ClipPictures.finish
    monkeypatch.setattr(ClipPictures, "finish", break_on_second)
    clips = (clip("a", 0.0, 0.4), clip("b", 0.1, 1.4), clip("c", 1.5, 1.8))
    found = cut(Recording("r", "p", clips, video_file=movie), spec(tmp_path))
    assert isinstance(found["a"], CutClip)
    for key in "bc":
        failed = found[key]
        assert isinstance(failed, Failure)
        assert "unforeseen" in failed.error
