"""Tests that audio stays aligned with video for any codec, container, channels, late start or lost packets."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.modalities.audio.store import Sound
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip
from kits.packing import Beeps, decode, decode_sound, epic_spec, heard_late_s, number_picture, write_movie

FLASHES = (1.0, 2.2, 3.0)
STARTS = (0.0, 0.37, 0.933, 1.5)
CLIP_S = 2.0
ALIGNED_S = 0.02

AAC_48, OPUS = Beeps(FLASHES, rate=48_000), Beeps(FLASHES, rate=48_000, codec="libopus")
SURROUND = Beeps(FLASHES, rate=48_000, layout="5.1")
LOST = [(1.4, 1.9)]
MANY_LOST = [(tenth / 10, tenth / 10 + 0.03) for tenth in (2, 4, 6, 8, 13, 15, 17, 19, 26)]
"""Intervals that each lose one or two packets of 20 ms."""

SOUNDS = {
    "AAC with its priming in MP4": ("m.mp4", Beeps(FLASHES)),
    "AAC at 44.1 kHz, stereo, in MKV": ("m.mkv", Beeps(FLASHES, rate=44_100, layout="stereo")),
    "Opus in WebM": ("m.webm", OPUS),
    "Opus in MKV": ("m.mkv", OPUS),
    "5.1 AAC in MP4": ("m.mp4", SURROUND),
    "5.1 AC-3 in MKV": ("m.mkv", Beeps(FLASHES, rate=48_000, layout="5.1", codec="ac3")),
    "AAC that starts late in MP4": ("m.mp4", Beeps(FLASHES, rate=48_000, start_s=0.3)),
    "AAC that starts late in MKV": ("m.mkv", Beeps(FLASHES, rate=48_000, start_s=0.3)),
    "Opus that starts late in WebM": ("m.webm", Beeps(FLASHES, rate=48_000, start_s=0.3, codec="libopus")),
    "AAC with a gap in MP4": ("m.mp4", Beeps(FLASHES, rate=48_000, lost=LOST)),
    "AAC with a gap in MKV": ("m.mkv", Beeps(FLASHES, rate=48_000, lost=LOST)),
    "Opus with a gap in WebM": ("m.webm", Beeps(FLASHES, rate=48_000, lost=LOST, codec="libopus")),
    "AAC with many lost packets in MP4": ("m.mp4", Beeps(FLASHES, rate=48_000, lost=MANY_LOST)),
    "AAC with many lost packets in MKV": ("m.mkv", Beeps(FLASHES, rate=48_000, lost=MANY_LOST)),
    "Opus with many lost packets in WebM": ("m.webm", Beeps(FLASHES, rate=48_000, lost=MANY_LOST, codec="libopus")),
}


def cut_flashes(movie: Path) -> list[CutClip]:
    """Cut clips at arbitrary times, each with some of the flashes and beeps."""
    spec = epic_spec(movie.parent, flow={"source": "none"}, video={"max_fps": 50})
    clips = tuple(ClipRecord(f"c{start}", "train", start, start + CLIP_S, {}) for start in STARTS)
    items = list(cut_recording(Recording("r", "p", clips, video_file=movie), spec))
    assert all(isinstance(item, CutClip) for item in items), items
    return [item for item in items if isinstance(item, CutClip)]


@pytest.mark.parametrize("name", SOUNDS)
def test_flash_and_beep_stay_together_in_every_cut_clip(tmp_path: Path, name: str) -> None:
    file, beeps = SOUNDS[name]
    flashes = {round(flash_s * 50) + offset for flash_s in FLASHES for offset in range(5)}
    pictures = [np.full((48, 80, 3), 250 if number in flashes else 5, np.uint8) for number in range(200)]
    movie = write_movie(tmp_path / file, pictures=pictures, fps=50, beeps=beeps, b_frames=0 if "webm" in file else 2)
    for item in cut_flashes(movie):
        samples = decode_sound(item.payloads["audio"])
        assert len(samples) == round(CLIP_S * 16_000)
        assert item.described["audio"] == {"sample_rate": 16_000, "num_samples": len(samples)}
        bright = np.array([picture.mean() > 128 for picture in decode(item.payloads["video"])])
        lit = np.flatnonzero(bright[1:] & ~bright[:-1]) + 1
        offsets = [flash_s - item.record.start_s for flash_s in FLASHES]
        inside = [offset for offset in offsets if 0 < offset < CLIP_S - 0.15]
        seen = [place / 50 for place in lit if place / 50 < CLIP_S - 0.14]
        assert len(seen) == len(inside)
        for flash_s, beep_s in zip(seen, inside, strict=True):
            # A stored frame is up to one period late.
            assert -0.003 <= flash_s - beep_s <= 1 / 50 + 0.003
            assert abs(heard_late_s(samples, beep_s)) < ALIGNED_S


@pytest.mark.parametrize("layout", ["mono", "stereo", "5.1"])
def test_the_mix_of_channels_is_as_loud_as_each(tmp_path: Path, layout: str) -> None:
    for level in (0.1, 0.9):
        beeps = Beeps(FLASHES, rate=48_000, layout=layout, level=level)
        pictures = [number_picture(0)] * 100
        (first, *_) = cut_flashes(write_movie(tmp_path / "m.mp4", pictures=pictures, beeps=beeps))
        peak = np.abs(decode_sound(first.payloads["audio"]).astype(float)).max() / 32_767
        assert level * 0.8 < peak < min(level * 1.25, 1.0)


def pieces_of(places: list[tuple[float, int]], rate: int) -> Sound:
    """Return audio of frames at these times, as a decoder would give them, with a beep at every full second."""
    sound = Sound()
    for time_s, num in places:
        times = time_s + np.arange(num) / rate
        loud = (times % 1.0 < 0.05) & (times > 0.5)
        samples = np.where(loud, 0.5 * np.sin(2 * np.pi * 1000 * times), 0).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        sound.add(frame, time_s)
    sound.finish()
    return sound


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.004, 0.012, 0.016, 0.04, 0.3, -0.004, -0.016, -0.1]), max_size=60),
    st.sampled_from([16_000, 44_100, 48_000]),
    st.floats(-0.05, 0.4),
)
def test_audio_stays_in_place_even_if_timestamps_jump(jumps: list[float], rate: int, first_s: float) -> None:
    places, time_s = [], first_s
    for jump in [*jumps, *[0.0] * 110]:
        time_s = max(time_s + jump, first_s)
        places.append((time_s, 1024))
        time_s += 1024 / rate
    samples = pieces_of(places, rate).samples
    assert abs(len(samples) / 16_000 - max(start_s + 1024 / rate for start_s, _ in places)) < ALIGNED_S
    # No timestamp jumps after this one: beeps start on the full second.
    settled = places[len(jumps)][0] + 0.5
    second = int(np.ceil(settled))
    window = np.abs(samples[int((second - 0.3) * 16_000) : int((second + 0.3) * 16_000)].astype(int))
    if len(window) > 0.4 * 16_000:
        assert abs(np.flatnonzero(window > 3000)[0] / 16_000 - 0.3) < ALIGNED_S
