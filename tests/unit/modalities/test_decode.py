"""Tests of decoding stored video, flow and audio: the requested moments, bit for bit, or an error."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.modalities import DecodeError
from karmma_dist.modalities.audio import AudioInput
from karmma_dist.modalities.audio.store import encode_flac
from karmma_dist.modalities.encode import VideoEncoder
from karmma_dist.modalities.stored_frames import chosen_frames, frame_numbers, group_starts
from karmma_dist.modalities.video import VideoInput, VideoSpec
from karmma_dist.modalities.yuv import ToI420
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import DamageError
from karmma_dist.streaming.loader import num_stored_frames
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import View, evaluation_view, training_view
from kits.decoding import CENTRE, decode_audio, decode_flow, decode_video, described
from kits.packing import number_picture, read_number


def moving_picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Return a moving texture with faint noise, so that predicting a picture from the previous one is imperfect."""
    texture = np.random.default_rng(0).integers(0, 200, (height // 4, width // 4, 3), dtype=np.uint8)
    noise = np.random.default_rng(number).integers(0, 16, (height, width, 3), dtype=np.uint8)
    return noise + np.roll(texture.repeat(4, axis=0).repeat(4, axis=1), 3 * number, axis=1)


def stored(pictures: list[np.ndarray], gop: int = 15, fps: Fraction | int = 30, crf: int = 30) -> bytes:
    """Encode pictures as packing does."""
    height, width = pictures[0].shape[:2]
    spec = VideoSpec(gop=gop)
    gray, to_i420 = pictures[0].ndim == 2, ToI420()
    encoder = VideoEncoder(width, height, Fraction(fps), crf, spec, None if gray else to_i420.colorspace)
    for picture in pictures:
        encoder.add(picture if gray else to_i420.of_rgb(picture))
    return encoder.finish()


def foreign(num_frames: int, codec: str = "libx264", skipped: int = 0, suffix: str = "mp4", **options: str) -> bytes:
    """Encode a video with other settings; its first `skipped` packets lie before an edit list's start."""
    file = io.BytesIO()
    with av.open(file, "w", format={"mp4": "mp4", "mkv": "matroska"}[suffix]) as container:
        stream = container.add_stream(codec, rate=30, options={"threads": "1", "sc_threshold": "0"} | options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(moving_picture(number), format="rgb24")
            frame.pts = number
            for packet in stream.encode(frame):
                mux_shifted(container, packet, skipped)
        for packet in stream.encode(None):
            mux_shifted(container, packet, skipped)
    return file.getvalue()


def mux_shifted(container: av.container.OutputContainer, packet: av.Packet, skipped: int) -> None:
    shift = round(skipped / 30 / packet.time_base)
    packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
    container.mux(packet)


def full_pass(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


def packets_of(data: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(data)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def starts_of(data: bytes) -> list[int] | None:
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return group_starts(stream.codec_context, [packet for packet in container.demux(stream) if packet.size])


def assert_chosen_frames_are_exact(data: bytes, chosen: list[int]) -> None:
    expected = full_pass(data)
    frames = [frame.to_ndarray() for frame in chosen_frames(data, np.array(chosen), len(expected))]
    assert len(frames) == len(chosen)
    for number, frame in zip(chosen, frames, strict=True):
        assert np.array_equal(frame, expected[number]), number


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_frames=st.integers(1, 70), gop=st.integers(1, 40))
def test_chosen_frames_of_packed_video_equal_a_full_pass(
    data: st.DataObject, num_frames: int, gop: int
) -> None:
    movie = stored([moving_picture(number) for number in range(num_frames)], gop)
    assert starts_of(movie) == list(range(0, num_frames, gop))
    for _ in range(3):
        assert_chosen_frames_are_exact(movie, sorted(data.draw(st.sets(st.integers(0, num_frames - 1), min_size=1))))


FOREIGN: dict[str, tuple[Callable[[], bytes], bool]] = {
    "B-frames": (lambda: foreign(50, bf="3", g="12"), False),
    "B-frames, open groups": (lambda: foreign(50, bf="2", g="10", **{"x264-params": "open-gop=1"}), False),
    "no B-frames, open groups": (lambda: foreign(50, bf="0", g="10", **{"x264-params": "open-gop=1"}), True),
    "no B-frames, intra refresh": (lambda: foreign(50, bf="0", g="10", **{"x264-params": "intra-refresh=1"}), True),
    "several references and slices": (lambda: foreign(50, bf="0", g="9", refs="4", slices="3", preset="slow"), True),
    "scene cuts": (lambda: foreign(50, bf="0", g="50", sc_threshold="400"), True),
    "an edit list inside a group": (lambda: foreign(50, skipped=7, bf="0", g="10"), False),
    "an edit list before B-frames": (lambda: foreign(50, skipped=6, bf="2", g="10"), False),
    "Matroska": (lambda: foreign(50, suffix="mkv", bf="0", g="10"), True),
    "MPEG-4 part 2": (lambda: foreign(50, "mpeg4", g="10"), False),
    "VP9": (lambda: foreign(50, "libvpx-vp9", g="10", **{"cpu-used": "8", "auto-alt-ref": "1"}), False),
}


@pytest.fixture(scope="module")
def foreign_movies() -> dict[str, bytes]:
    return {name: make() for name, (make, _) in FOREIGN.items()}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_encoders_video_has_entry_points_only_if_safe(
    foreign_movies: dict[str, bytes], name: str
) -> None:
    assert (starts_of(foreign_movies[name]) is not None) == FOREIGN[name][1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_chosen_frames_of_other_encoders_equal_a_full_pass(
    foreign_movies: dict[str, bytes], data: st.DataObject
) -> None:
    movie = foreign_movies[data.draw(st.sampled_from(list(FOREIGN)))]
    num_frames = len(full_pass(movie))
    assert_chosen_frames_are_exact(movie, sorted(data.draw(st.sets(st.integers(0, num_frames - 1), min_size=1))))


FILLS: list[Callable[[int], bytes]] = [
    lambda num: b"\xff" * num,
    lambda num: bytes(num),
    lambda num: np.random.default_rng(5).bytes(num),
]


def with_a_damaged_packet(movie: bytes, number: int, fill: Callable[[int], bytes] = FILLS[0]) -> bytes:
    """Return the video with the second half of a packet overwritten."""
    packet = packets_of(movie)[number]
    content = bytearray(movie)
    middle, end = packet.pos + packet.size // 2, packet.pos + packet.size
    content[middle:end] = fill(end - middle)
    return bytes(content)


@pytest.mark.parametrize("fill", FILLS, ids=["ones", "zeros", "noise"])
@pytest.mark.parametrize("damaged", [0, 15, 17, 24])
def test_a_damaged_packet_before_a_chosen_frame_is_an_error(
    damaged: int, fill: Callable[[int], bytes]
) -> None:
    movie = with_a_damaged_packet(stored([moving_picture(number) for number in range(45)]), damaged, fill)
    last_of_group = damaged // 15 * 15 + 14
    with pytest.raises((DecodeError, av.error.FFmpegError)):
        list(chosen_frames(movie, np.array([last_of_group]), 45))


def test_a_group_without_a_chosen_frame_is_not_decoded() -> None:
    whole = stored([moving_picture(number) for number in range(45)])
    movie = with_a_damaged_packet(with_a_damaged_packet(whole, 15), 40)
    expected = full_pass(whole)
    chosen = np.array([3, 14, 30, 39])
    frames = [frame.to_ndarray() for frame in chosen_frames(movie, chosen, 45)]
    assert all(np.array_equal(frame, expected[number]) for frame, number in zip(frames, chosen, strict=True))


@pytest.mark.parametrize("declared", [44, 46])
def test_an_undeclared_number_of_frames_is_an_error(declared: int) -> None:
    movie = stored([moving_picture(number) for number in range(45)])
    with pytest.raises(DecodeError, match=f"45 frames in it, declared {declared}"):
        list(chosen_frames(movie, np.array([0]), declared))


@settings(max_examples=20, deadline=None)
@given(share=st.floats(0.02, 0.98))
def test_a_cut_video_is_an_error_for_every_frame(share: float) -> None:
    pictures = [moving_picture(number) for number in range(20)]
    for movie in (stored(pictures), foreign(20, suffix="mkv", bf="0")):
        with pytest.raises((DecodeError, av.error.FFmpegError)):
            list(chosen_frames(movie[: int(share * len(movie))], np.array([0]), 20))


def test_a_cut_member_is_damage_that_names_clip_and_member(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ShardFolder(shards)
    clip = next(clip for clip in folder.clips("train") if clip.has("video") and clip.has("audio"))
    metadata = folder.metadata(clip)
    read = ShardFolder.read
    monkeypatch.setattr(ShardFolder, "read", lambda self, clip, name: read(self, clip, name)[:-200])
    view = evaluation_view(VideoInput(), num_stored_frames(metadata))
    for modality in ("video", "flow", "audio"):
        with pytest.raises(DamageError, match=rf"{clip.key}\.{modality}.*does not decode") as caught:
            read_sample(folder, clip, metadata, [modality], InputRecipe(), view)
        assert "\n" not in str(caught.value)


RATES = [Fraction(12), Fraction(25), Fraction(30), Fraction(30000, 1001), Fraction(50), Fraction(60000, 1001)]


@settings(max_examples=300, deadline=None)
@given(
    video_fps=st.sampled_from(RATES), flow_fps=st.sampled_from(RATES), num_stored=st.integers(1, 2000),
    num_frames=st.integers(1, 64), stride=st.integers(1, 5), sampling=st.sampled_from(["segments", "dense"]),
    epoch=st.none() | st.integers(0, 5),
)  # fmt: skip
def test_video_and_flow_show_the_same_moment_at_any_rates(
    video_fps: Fraction, flow_fps: Fraction, num_stored: int, num_frames: int, stride: int, sampling: str,
    epoch: int | None,
) -> None:  # fmt: skip
    recipe = VideoInput(num_frames=num_frames, stride=stride, sampling=sampling)
    view = (
        evaluation_view(recipe, num_stored) if epoch is None else training_view(recipe, num_stored, 0, epoch, "key")
    )
    stored_video, stored_flow = described(num_stored, video_fps), described(10**6, flow_fps)
    moments_s = view.times_F * stored_video.length_s
    shown = [frame_numbers(moments_s, member.pictures) for member in (stored_video, stored_flow)]
    for numbers, fps in zip(shown, (video_fps, flow_fps), strict=True):
        assert (numbers <= moments_s * float(fps) + 1e-3).all()
        assert (moments_s * float(fps) < numbers + 1 + 1e-3).all()
    if sampling == "dense":
        start = shown[0][0]
        assert (shown[0] == np.minimum(start + stride * np.arange(num_frames), num_stored - 1)).all()
    else:
        assert (shown[0] == np.floor(view.times_F * num_stored + 1e-4)).all()


@pytest.mark.parametrize(("flow_fps", "num_flow"), [(30, 60), (50, 100), (15, 30), (50, 71), (50, 130)])
@pytest.mark.parametrize("sampling", ["segments", "dense"])
def test_counters_burnt_into_video_and_flow_agree_on_the_moment(flow_fps: int, num_flow: int, sampling: str) -> None:
    """Check it for flow that ends before the video, whose last frame is repeated, and for flow that ends after it."""
    recipe = VideoInput(num_frames=12, short_side=80, crop=80, sampling=sampling, stride=3)
    movie = stored([number_picture(number, 80, 80) for number in range(60)], crf=10)
    halves = [number_picture(number, 80, 80)[..., 0] for number in range(num_flow)]
    flow_movie = stored([np.concatenate([half, 255 - half]) for half in halves], fps=flow_fps, crf=10)
    for view in (evaluation_view(recipe, 60), training_view(recipe, 60, 0, 3, "key")):
        moments_s = view.times_F * 2.0
        pictures = decode_video(movie, described(60, 30), moments_s, recipe, view)
        flow = decode_flow(flow_movie, described(num_flow, flow_fps), moments_s, recipe, view)
        assert [read_number(picture) for picture in pictures] == np.floor(moments_s * 30 + 1e-4).tolist()
        expected = np.minimum(np.floor(moments_s * flow_fps + 1e-4), num_flow - 1).tolist()
        assert [read_number(frame[..., 0]) for frame in flow] == expected
        assert [read_number(255 - frame[..., 1]) for frame in flow] == expected


def test_a_clip_with_too_few_frames_repeats_them_in_order() -> None:
    recipe = VideoInput(num_frames=9, short_side=80, crop=80)
    movie = stored([number_picture(number, 80, 80) for number in range(3)], crf=10)
    view = evaluation_view(recipe, 3)
    pictures = decode_video(movie, described(3, 30), view.times_F * 0.1, recipe, view)
    assert [read_number(picture) for picture in pictures] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def ramp(width: int, height: int, across: bool) -> np.ndarray:
    """Return gray that grows by 3 per pixel, to the right or downwards."""
    row, column = np.arange(width) * 3, np.arange(height)[:, None] * 3
    return np.broadcast_to(row if across else column, (height, width)).astype(np.uint8)


@pytest.mark.parametrize("short_side", [32, 48, 64])
@pytest.mark.parametrize("flip", [False, True])
@given(top=st.floats(0, 1, exclude_max=True), left=st.floats(0, 1, exclude_max=True))
@settings(max_examples=10, deadline=None)
def test_video_and_flow_share_one_crop_and_keep_their_aspect(
    short_side: int, flip: bool, top: float, left: float
) -> None:
    """Encode columns and rows in two frames, so that a crop one pixel off, or a stretched one, gives other values."""
    ramps = [ramp(64, 48, across) for across in (True, False)]
    movie = stored([np.repeat(gray[..., None], 3, axis=2) for gray in ramps], crf=1)
    flow_movie = stored([np.concatenate([gray, gray]) for gray in ramps], crf=1)
    recipe = VideoInput(num_frames=2, short_side=short_side, crop=24)
    view = View(np.array([0.25, 0.75]), top, left, flip, np.ones(3, np.float32))
    moments_s = view.times_F * 2 / 30
    pictures = decode_video(movie, described(2, 30), moments_s, recipe, view)[..., 0].astype(float)
    flow = decode_flow(flow_movie, described(2, 30), moments_s, recipe, view).astype(float)
    if flip:
        flow[..., 0] = 255 - flow[..., 0]
    scale = short_side / 48
    first = int(left * (round(64 * scale) - 23)), int(top * (short_side - 23))
    places = (np.arange(24) + np.array(first)[:, None] + 0.5) / scale - 0.5
    expected_columns, expected_rows = 3 * np.clip(places[0], 0, 63), 3 * np.clip(places[1], 0, 47)
    expected = [np.tile(expected_columns, (24, 1)), np.tile(expected_rows[:, None], (1, 24))]
    for number in range(2):
        wanted = expected[number][:, ::-1] if flip else expected[number]
        for shown in (pictures[number], flow[number, ..., 0], flow[number, ..., 1]):
            assert np.abs(shown - wanted)[2:-2, 2:-2].mean() < 1.5  # one pixel off: at least 2.25
    assert pictures.shape == (2, 24, 24)


def test_mirroring_reverses_horizontal_flow_only() -> None:
    u_HW, v_HW = np.full((48, 64), 200, np.uint8), np.full((48, 64), 30, np.uint8)
    movie = stored([np.concatenate([u_HW, v_HW])], crf=1)
    recipe = VideoInput(num_frames=1, short_side=48, crop=48)
    mirrored = View(np.array([0.5]), 0.5, 0.5, True, np.ones(3, np.float32))
    flow = decode_flow(movie, described(1, 30), np.array([0.0]), recipe, mirrored)
    assert np.unique(flow[..., 0]).tolist() == [55]
    assert np.unique(flow[..., 1]).tolist() == [30]


@pytest.mark.parametrize("short_side", [24, 40, 48, 72, 96])
def test_resizing_does_not_mix_the_two_components_of_flow(short_side: int) -> None:
    u_HW, v_HW = np.zeros((48, 64), np.uint8), np.full((48, 64), 255, np.uint8)
    movie = stored([np.concatenate([u_HW, v_HW])], crf=0)
    recipe = VideoInput(num_frames=1, short_side=short_side, crop=short_side)
    flow = decode_flow(movie, described(1, 30), np.array([0.0]), recipe, CENTRE)
    assert int(flow[..., 0].max()) == 0
    assert int(flow[..., 1].min()) == 255


def with_click(num_samples: int, index: int) -> np.ndarray:
    samples = np.zeros(num_samples, np.int16)
    samples[index] = 20_000
    return samples


@settings(max_examples=40, deadline=None)
@given(num_samples=st.integers(8_000, 40_000), moment_s=st.floats(0, 2.4), data=st.data())
def test_each_audio_window_is_centred_on_its_frame(
    num_samples: int, moment_s: float, data: st.DataObject
) -> None:
    audio = AudioInput(num_windows=3, window_s=0.1)
    moments_s = np.array([0.1, 0.3, moment_s])
    index = data.draw(st.integers(0, num_samples - 1))
    samples = with_click(num_samples, index)
    windows = decode_audio(encode_flac(samples), num_samples, moments_s, audio)
    assert windows.shape == (3, 1600)
    assert windows.dtype == np.int16
    padded = np.pad(samples, (1600, 1600 + 40_000))
    for window, moment in zip(windows, moments_s, strict=True):
        start = round(moment * 16_000) + 800
        assert np.array_equal(window, padded[start : start + 1600])


def test_fewer_windows_than_frames_are_spread_evenly() -> None:
    samples = np.arange(20_000, dtype=np.int16)
    audio = AudioInput(num_windows=2, window_s=0.25)
    windows = decode_audio(encode_flac(samples), 20_000, np.linspace(0, 1, 8), audio)
    assert windows[:, 2000].tolist() == [5_000, 15_000]


def foreign_flac(rate: int, layout: str) -> bytes:
    file = io.BytesIO()
    channels = {"mono": 1, "stereo": 2}[layout]
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=rate, layout=layout, format="s16")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, channels * 4000), np.int16), format="s16", layout=layout)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(("rate", "layout"), [(44_100, "mono"), (16_000, "stereo")])
def test_audio_in_another_format_than_stored_is_an_error(rate: int, layout: str) -> None:
    with pytest.raises(DecodeError, match="not mono s16 at 16000 Hz"):
        decode_audio(foreign_flac(rate, layout), 4000, np.array([0.1]), AudioInput(num_windows=1))


def test_cut_damaged_or_overlong_audio_is_an_error() -> None:
    samples = (np.random.default_rng(0).standard_normal(32_000) * 3000).astype(np.int16)
    whole = encode_flac(samples)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for data in (whole[: len(whole) // 2], bytes(flipped)):
        with pytest.raises((DecodeError, av.error.FFmpegError)):
            decode_audio(data, 32_000, np.array([1.0]), AudioInput(num_windows=1))
    with pytest.raises(DecodeError, match="32000 samples in it, declared 31999"):
        decode_audio(whole, 31_999, np.array([1.0]), AudioInput(num_windows=1))
