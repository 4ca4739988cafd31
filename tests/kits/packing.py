"""Media for packing tests: videos whose frames show their number, and tiny kitchens."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.stream import Disposition

from karmma_dist.packing.spec import PackingSpec

BITS = 10
_BEEP_S = 0.1
_CLOCK = Fraction(1, 90_000)


def number_picture(number: int, width: int = 80, height: int = 48) -> np.ndarray:
    """Return a picture of ten bars that show `number` in binary."""
    bars = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8) * 200 + 20
    row = np.repeat(bars, width // BITS)
    return np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """Read the number that a picture of any size shows."""
    gray = picture if picture.ndim == 2 else picture[..., 0]
    width = gray.shape[1] / BITS
    middle = gray[gray.shape[0] // 4 : 3 * gray.shape[0] // 4]
    return sum(
        int(middle[:, int((bit + 0.25) * width) : int((bit + 0.75) * width)].mean() > 120) << bit for bit in range(BITS)
    )


@dataclass(frozen=True)
class Beeps:
    """A video's audio: silence, and a chirp of 0.1 s at each of these times in seconds."""

    at: Sequence[float] = ()
    codec: str = "aac"
    rate: int = 24_000
    layout: str = "mono"
    start_s: float = 0.0
    """Start of the stream in seconds; earlier audio is not written."""
    lost: Sequence[tuple[float, float]] = ()
    """Spans whose packets are missing in the file: the timestamps skip them."""
    level: float = 0.5
    """Peak of every channel, in (0, 1]."""


def chirp(times: np.ndarray, at: float) -> np.ndarray:
    """500 to 3,000 Hz in 0.1 s from `at` on, peak 1: unlike any shifted copy of itself, so its place can be found."""
    since = times - at
    return np.where((since >= 0) & (since < _BEEP_S), np.sin(2 * np.pi * (500 + 12_500 * since) * since), 0.0)


def heard_late_s(samples: np.ndarray, at: float, within: float = 0.3) -> float:
    """Return the delay in seconds of a chirp after `at` in samples at 16 kHz, searched `within` seconds of it."""
    rate = 16_000
    first = round((at - within) * rate)
    window = np.arange(first, first + round((2 * within + _BEEP_S) * rate))
    heard = np.where((window >= 0) & (window < len(samples)), samples[np.clip(window, 0, len(samples) - 1)], 0)
    assert np.abs(heard).max() > 500, f"nothing is heard around {at} s"
    pattern = chirp(np.arange(round(_BEEP_S * rate)) / rate, 0.0)
    return (first + int(np.argmax(np.correlate(heard.astype(float), pattern, "valid")))) / rate - at


def write_movie(
    path: Path,
    *,
    frames: int = 0,
    fps: Fraction | int = 25,
    times: Sequence[float] | None = None,
    bursts: list[float] | None = None,
    beeps: Beeps | None = None,
    seconds: float = 0.0,
    gop: int = 12,
    b_frames: int = 0,
    pixels: str = "yuv420p",
    rotation: int = 0,
    pictures: list[np.ndarray] | None = None,
    index_first: bool = False,
    decoys: bool = False,
) -> Path:
    """Write a movie of numbered frames (or `pictures`), at `fps` or `times`, and of `beeps`, or `bursts` in AAC.

    VP9 in WebM, H.264 elsewhere. With `decoys` a smaller video and a poorer sound come after them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = pictures if pictures is not None else [number_picture(number) for number in range(frames)]
    beeps = Beeps(bursts) if bursts is not None else beeps
    end_s = seconds or (times[-1] + 1 / float(fps) if times else len(pictures) / float(fps))
    with av.open(str(path), "w", options={"movflags": "+faststart"} if index_first else {}) as container:
        videos, sounds = [], []
        for shown in [pictures] + [[np.zeros((32, 32, 3), np.uint8)] * len(pictures)] * decoys:
            if shown:
                videos.append((_video_stream(container, path, shown[0], Fraction(fps), gop, b_frames, pixels), shown))
        for sound in [beeps] + [Beeps(rate=8_000)] * decoys:
            if sound is not None:
                sounds.append((container.add_stream(sound.codec, rate=sound.rate, layout=sound.layout), sound))
        for stream, _ in videos:
            stream.set_display_rotation(rotation)
            if times is not None:
                stream.codec_context.time_base = _CLOCK
        for stream, sound in sounds:
            _write_sound(container, stream, sound, end_s)
        for stream, shown in videos:
            for number, picture in enumerate(shown):
                frame = av.VideoFrame.from_ndarray(picture, format="gray" if picture.ndim == 2 else "rgb24")
                frame.pts = number if times is None else round(times[number] / _CLOCK)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def _video_stream(
    container: Any, path: Path, picture: np.ndarray, fps: Fraction, gop: int, b_frames: int, pixels: str
) -> Any:
    options = {"crf": "10", "g": str(gop), "threads": "1"}
    webm = path.suffix == ".webm"
    options |= {"b": "0", "cpu-used": "8"} if webm else {"preset": "ultrafast", "bf": str(b_frames)}
    stream = container.add_stream("libvpx-vp9" if webm else "libx264", rate=fps, options=options)
    stream.height, stream.width = picture.shape[:2]
    stream.pix_fmt = pixels
    return stream


def _write_sound(container: Any, stream: Any, beeps: Beeps, end_s: float) -> None:
    times = np.arange(round(beeps.start_s * beeps.rate), round(end_s * beeps.rate)) / beeps.rate
    mono = sum((chirp(times, at) for at in beeps.at), np.zeros(len(times))) * beeps.level
    channels = len(av.AudioLayout(beeps.layout).channels)
    samples = np.repeat(mono.astype(np.float32)[None], channels, axis=0)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=beeps.layout)
    frame.sample_rate, frame.time_base, frame.pts = beeps.rate, Fraction(1, beeps.rate), round(times[0] * beeps.rate)
    for packet in [*stream.encode(frame), *stream.encode(None)]:
        at_s = float(packet.pts * packet.time_base)
        if not any(start <= at_s < stop for start, stop in beeps.lost):
            container.mux(packet)


def write_cover_song(path: Path, beeps: Beeps, seconds: float) -> Path:
    """Write an audio file whose only picture is its cover."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(beeps.codec, rate=beeps.rate, layout=beeps.layout)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt, cover.disposition = "yuvj420p", Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        frame.pts = 0
        for packet in [*cover.encode(frame), *cover.encode(None)]:
            container.mux(packet)
        _write_sound(container, sound, beeps, seconds)
    return path


def decode(data: bytes, pixels: str = "rgb24") -> list[np.ndarray]:
    """Decode all frames of a stored member."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format=pixels) for frame in container.decode(video=0)]


def decode_sound(data: bytes) -> np.ndarray:
    """Decode all samples of a stored FLAC."""
    with av.open(io.BytesIO(data)) as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


def write_frames(
    folder: Path, numbers: list[int], components: tuple[str, ...] = ("",), size: tuple[int, int] = (80, 48)
) -> Path:
    """Write numbered JPEGs, each showing its own number; for "u" and "v" the value is the number, and 255 - it."""
    for component in components:
        (folder / component).mkdir(parents=True, exist_ok=True)
        for number in numbers:
            if component:
                value = number % 200 + 20 if component == "u" else 255 - (number % 200 + 20)
                picture = np.full(size[::-1], value, np.uint8)
            else:
                picture = number_picture(number, *size)
            ok, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 98])
            assert ok
            (folder / component / f"frame_{number:010d}.jpg").write_bytes(data.tobytes())
    return folder


COLUMNS = ["narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp",
           "start_frame", "stop_frame", "narration", "verb", "verb_class", "noun", "noun_class"]  # fmt: skip


def row(
    key: str, video: str = "P01_01", start: str = "00:00:00.10", stop: str = "00:00:01.10", **other: object
) -> dict:
    """Return one annotation with every column."""
    base = {
        "narration_id": key, "participant_id": video.split("_")[0], "video_id": video, "narration_timestamp": start,
        "start_timestamp": start, "stop_timestamp": stop, "start_frame": 7, "stop_frame": 67, "narration": "take cup",
        "verb": "take", "verb_class": 0, "noun": "cup", "noun_class": 1,
    }  # fmt: skip
    return base | other


def write_epic(
    root: Path, train: list[dict], validation: list[dict] | None = None, columns: list[str] = COLUMNS
) -> Path:
    """Write annotations in Epic-Kitchens' layout: two verbs, three nouns."""
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        if rows is not None:
            _write_table(folder / f"EPIC_100_{name}.csv", columns, rows)
    (folder / "EPIC_100_verb_classes.csv").write_text("id,key,instances,category\n0,take,[],x\n1,put,[],x\n")
    (folder / "EPIC_100_noun_classes.csv").write_text("id,key\n0,tap\n1,cup\n2,pan\n")
    return root


SOUND_COLUMNS = ["annotation_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp", "start_sample",
                 "stop_sample", "description", "class", "class_id"]  # fmt: skip
SOUND_CLASSES = ["metal-only collision", "cut / chop", "scrub / scrape / scour / wipe"]


def sound_row(
    key: str, video: str = "P01_01", start_s: float = 0.1, stop_s: float = 1.1, label: int = 0, **other: object
) -> dict:
    """Return one annotation of EPIC-SOUNDS with every column; times are rounded to milliseconds."""
    base = {
        "annotation_id": key, "participant_id": video.split("_")[0], "video_id": video,
        "start_timestamp": sound_timestamp(start_s), "stop_timestamp": sound_timestamp(stop_s),
        "start_sample": int(start_s * 24_000), "stop_sample": int(stop_s * 24_000), "description": "a clang",
        "class": SOUND_CLASSES[label], "class_id": label,
    }  # fmt: skip
    return base | other


def sound_timestamp(time_s: float) -> str:
    """Return a time in seconds as EPIC-SOUNDS writes it, HH:MM:SS.sss."""
    minutes, milliseconds = divmod(round(1000 * time_s), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def write_sounds(
    root: Path, train: list[dict], validation: list[dict] | None = None, test: list[dict] | None = None,
    columns: list[str] = SOUND_COLUMNS,
) -> Path:  # fmt: skip
    """Write the annotations of EPIC-SOUNDS; the table of the test split has no description and no class."""
    tables = {"train": (train, columns), "validation": (validation, columns)}
    tables["recognition_test_timestamps"] = (test, [name for name in columns if name in SOUND_COLUMNS[:7]])
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name, (rows, own_columns) in tables.items():
        if rows is not None:
            _write_table(root / "annotations" / f"EPIC_Sounds_{name}.csv", own_columns, rows)
    return root


def _write_table(path: Path, columns: list[str], rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def movie_path(root: Path, video: str = "P01_01") -> Path:
    """Return the path of a video file in Epic-Kitchens' layout."""
    return root / "EPIC-KITCHENS" / video.split("_")[0] / "videos" / f"{video}.MP4"


def epic_spec(root: Path, out: Path | None = None, **fields: object) -> PackingSpec:
    """Return a specification for a small Epic-Kitchens, or with another `reader` for a dataset of its recordings."""
    base = {"reader": "epic_kitchens", "dataset": "test", "raw": str(root), "out": str(out or root / "out")}
    return PackingSpec.model_validate(base | fields)


def folder_bytes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every visible file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }
