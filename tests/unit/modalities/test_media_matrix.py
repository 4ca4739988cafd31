"""Tests that frames and sound of every usual kind of file are stored at their moments.

Every picture carries its number, and a chirp is heard at 0.5 s of every sound. A file is made for each combination.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.records import CutClip
from kits.packing import Beeps, chirp, decode, decode_sound, epic_spec, heard_late_s, number_picture, read_number

SECONDS = 1.2
BEEP_S = 0.5
EARLY_S = 0.003
SOUND_S = 0.02

CONTAINERS = {
    "mp4": ("libx264", "libx265", "mpeg4", "libsvtav1"),
    "mov": ("libx264", "prores_ks", "mjpeg"),
    "mkv": ("libx264", "ffv1", "mpeg2video", "libvpx-vp9"),
    "webm": ("libvpx", "libvpx-vp9"),
    "ts": ("libx264", "mpeg2video", "libx265"),
    "avi": ("mpeg4", "mjpeg", "ffv1"),
    "flv": ("libx264", "flv"),
    "mpg": ("mpeg1video", "mpeg2video"),
}
BROADCAST = {"24", "24000/1001", "25", "30", "30000/1001", "50", "60", "60000/1001"}
"""Rates that MPEG-1 and MPEG-2 can have."""
RATES = ("24", "24000/1001", "25", "30", "30000/1001", "50", "60", "60000/1001", "120", "240", "480", "1000")

VIDEOS = [
    (suffix, codec, rate, b_frames)
    for suffix, codecs in CONTAINERS.items()
    for codec, rate, b_frames in product(codecs, RATES, (0, 2))
    if (rate in BROADCAST or not codec.startswith("mpeg") or codec == "mpeg4")
    and (not b_frames or (codec == "libx264" and suffix != "avi"))
    and (codec in ("libx264", "libvpx") or rate in ("25", "30000/1001", "60"))
    and not (suffix == "mpg" and rate in ("24", "60"))
]

SOUNDS = [
    *product(("m4a",), ("aac",), (8_000, 16_000, 22_050, 44_100, 48_000, 96_000), ("mono", "stereo", "5.1")),
    *product(("mka",), ("libopus",), (16_000, 48_000), ("mono", "stereo", "5.1", "7.1")),
    *product(("mka",), ("flac",), (8_000, 44_100, 96_000, 192_000), ("mono", "stereo", "7.1")),
    *product(("wav",), ("pcm_s16le", "pcm_s24le", "pcm_f32le", "pcm_u8"), (8_000, 48_000, 192_000), ("mono", "stereo")),
    *product(("mp3",), ("libmp3lame",), (16_000, 44_100, 48_000), ("mono", "stereo")),
    *product(("ogg",), ("libopus",), (48_000,), ("mono", "stereo")),
    *product(("mka",), ("ac3", "eac3"), (44_100, 48_000), ("stereo", "5.1")),
    *product(("m4a",), ("alac",), (44_100,), ("mono", "stereo")),
    *product(("ts",), ("mp2",), (44_100, 48_000), ("stereo",)),
    *product(("flac",), ("flac",), (16_000, 44_100), ("mono", "stereo")),
]


def write_video(path: Path, codec: str, rate: Fraction, b_frames: int) -> int:
    """Write a file of numbered frames; return their number."""
    num_frames = round(SECONDS * rate)
    options = {
        "libx264": {"preset": "ultrafast", "crf": "12", "bf": str(b_frames), "g": "12"},
        "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=none:bframes=0"},
        "libvpx": {"cpu-used": "8", "b": "2M", "deadline": "realtime"},
        "libvpx-vp9": {"cpu-used": "8", "b": "2M", "deadline": "realtime"},
        "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "lp=1"},
    }.get(codec, {"qscale": "2", "b": "4M"})
    pixels = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 160, 96, pixels
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(number_picture(number, 160, 96), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return num_frames


def cut(path: Path, start_s: float, stop_s: float, **video: Any) -> CutClip:
    spec = epic_spec(path.parent, flow={"source": "none"}, video={"crf": 8, **video})
    clips = (ClipRecord("c", "train", start_s, stop_s, {}),)
    (item,) = cut_recording(Recording("r", "p", clips, video_file=path), spec)
    assert isinstance(item, CutClip), item
    return item


@pytest.mark.parametrize(("suffix", "codec", "rate", "b_frames"), VIDEOS)
def test_frames_are_stored_at_their_moments(
    tmp_path: Path, suffix: str, codec: str, rate: str, b_frames: int
) -> None:
    path, fps = tmp_path / f"m.{suffix}", Fraction(rate)
    num_frames = write_video(path, codec, fps, b_frames)
    item = cut(path, 0.21, 0.93, max_fps=60)
    stored_fps = item.described["video"]["fps"]
    assert stored_fps == pytest.approx(min(float(fps), 60), rel=0.02)
    seen = [read_number(picture) for picture in decode(item.payloads["video"])]
    assert len(seen) == pytest.approx(0.72 * stored_fps, abs=1.01)
    assert seen[-1] < num_frames
    for place, number in enumerate(seen):
        moment = 0.21 + place / stored_fps
        assert float(number / fps) <= moment + EARLY_S
        assert moment < float((number + 1) / fps) + EARLY_S


@pytest.mark.parametrize(("suffix", "codec", "rate", "layout"), SOUNDS)
def test_sound_is_stored_at_its_moment(tmp_path: Path, suffix: str, codec: str, rate: int, layout: str) -> None:
    path = tmp_path / f"m.{suffix}"
    times = np.arange(round(SECONDS * rate)) / rate
    mono = (chirp(times, BEEP_S) * Beeps().level).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        samples = np.repeat(mono, stream.layout.nb_channels)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    sound = decode_sound(cut(path, 0.2, 1.1).payloads["audio"])
    assert len(sound) == round(0.9 * 16_000)
    assert abs(heard_late_s(sound, BEEP_S - 0.2)) < SOUND_S
