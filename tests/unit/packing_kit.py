"""What the packing tests make for themselves: movies whose every frame says its own number, and tiny kitchens."""

from __future__ import annotations

import csv
import hashlib
import io
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from karmma_dist.packing.spec import PackingSpec

BITS = 10
TONE_HZ = 1000.0


def number_picture(number: int, width: int = 80, height: int = 48) -> np.ndarray:
    """A picture of ten bars that spell `number` in binary."""
    bars = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8) * 200 + 20
    row = np.repeat(bars, width // BITS)
    return np.repeat(np.tile(row, (height, 1))[..., None], 3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """The number spelled by a picture of any size."""
    gray = picture if picture.ndim == 2 else picture[..., 0]
    width = gray.shape[1] / BITS
    middle = gray[gray.shape[0] // 4 : 3 * gray.shape[0] // 4]
    return sum(
        int(middle[:, int((bit + 0.25) * width) : int((bit + 0.75) * width)].mean() > 120) << bit for bit in range(BITS)
    )


def write_movie(
    path: Path,
    *,
    frames: int = 0,
    fps: Fraction | int = 25,
    bursts: list[float] | None = None,
    seconds: float = 0.0,
    gop: int = 12,
    rate: int = 24_000,
    pictures: list[np.ndarray] | None = None,
    index_first: bool = False,
) -> Path:
    """Write a movie of numbered frames (or `pictures`) and, with `bursts`, tone bursts of 0.1 s there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = pictures if pictures is not None else [number_picture(number) for number in range(frames)]
    with av.open(str(path), "w", options={"movflags": "+faststart"} if index_first else {}) as container:
        video = audio = None
        if pictures:
            options = {"crf": "10", "g": str(gop), "threads": "1"}
            codec = "libvpx-vp9" if path.suffix == ".webm" else "libx264"
            options |= {"b": "0", "cpu-used": "8"} if path.suffix == ".webm" else {"preset": "ultrafast"}
            video = container.add_stream(codec, rate=Fraction(fps), options=options)
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = "yuv420p"
        if bursts is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono")
            times = np.arange(round((seconds or len(pictures) / fps) * rate)) / rate
            on = sum(((times >= at) & (times < at + 0.1)).astype(np.float32) for at in bursts) + np.zeros(len(times))
            samples = (0.5 * on * np.sin(2 * np.pi * TONE_HZ * times)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
    return path


def decode(data: bytes, pixels: str = "rgb24") -> list[np.ndarray]:
    """All frames of a stored member."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format=pixels) for frame in container.decode(video=0)]


def decode_sound(data: bytes) -> np.ndarray:
    """All samples of a stored FLAC."""
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
    """One annotation with every column."""
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
            with open(folder / f"EPIC_100_{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
    (folder / "EPIC_100_verb_classes.csv").write_text("id,key,instances,category\n0,take,[],x\n1,put,[],x\n")
    (folder / "EPIC_100_noun_classes.csv").write_text("id,key\n0,tap\n1,cup\n2,pan\n")
    return root


def movie_path(root: Path, video: str = "P01_01") -> Path:
    """Where Epic-Kitchens keeps a movie."""
    return root / "EPIC-KITCHENS" / video.split("_")[0] / "videos" / f"{video}.MP4"


def epic_spec(root: Path, out: Path | None = None, **fields: object) -> PackingSpec:
    """A specification for a small Epic-Kitchens."""
    base = {"reader": "epic_kitchens", "dataset": "test", "raw": str(root), "out": str(out or root / "out")}
    return PackingSpec.model_validate(base | fields)


def folder_bytes(folder: Path) -> dict[str, str]:
    """sha256 of every visible file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }
