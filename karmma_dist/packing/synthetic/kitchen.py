"""A synthetic kitchen as media files: untrimmed MP4s and annotations in the raw layout of Epic-Kitchens.

    write_kitchen(Path("data/kitchen"), seed=0)
    pack(load_spec("demo", raw="data/kitchen", out="shards/demo"))

Some recordings have no audio and some no video, as in real datasets. With `imu=True` they have the files of an IMU as
well, which end early (`load_spec("demo_signal", ...)` packs them).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_whole
from karmma_dist.packing.synthetic.motion import ACCELEROMETER, GYROSCOPE, motion
from karmma_dist.packing.synthetic.scene import FPS, HEIGHT, NOUNS, SOUND_RATE, VERBS, WIDTH, Event, Scene, sound
from karmma_dist.progress import Report
from karmma_dist.seeding import kitchen_generator, motion_generator

_COLUMNS = (
    "narration_id", "participant_id", "video_id", "narration_timestamp", "start_timestamp", "stop_timestamp",
    "start_frame", "stop_frame", "narration", "verb", "verb_class", "noun", "noun_class", "all_nouns",
    "all_noun_classes",
)  # fmt: skip
_PER_PARTICIPANT = 3
_NOMINAL_FPS = 60
_LONGER_S = 0.35
"""Seconds by which annotations outlast their action, in a quarter of the clips."""
_IMU_SHARE = 0.8
"""Fraction of a recording's clips during which its IMU runs."""


def write_kitchen(
    root: Path,
    *,
    seed: int = 0,
    train_recordings: int = 12,
    validation_recordings: int = 4,
    clips_per_recording: int = 24,
    difficulty: float = 1.0,
    imu: bool = False,
    progress: Report | None = None,
) -> None:
    """Write a raw dataset: EPIC-KITCHENS/PXX/videos/*.MP4 (H.264 and AAC) and annotations/EPIC_100_*.csv.

    Every fourth of six recordings of a split has no audio; in training every sixth has no video. Clips last 1 to 2
    seconds; a quarter of them overlap the next one. The IMU of a recording stops before its last fifth of the clips.

    Args:
        root: Folder to write into; created if missing.
        seed: Seed of frames, audio and annotations.
        train_recordings: Number of untrimmed recordings of the training split.
        validation_recordings: Number of recordings of the validation split, of other participants.
        clips_per_recording: Number of annotated actions in each recording.
        difficulty: Difficulty of the scene; 0 is clean, 1 the default.
        imu: True to write EPIC-KITCHENS/PXX/meta_data/*-accl.csv and *-gyro.csv as well; all other files stay the same.
        progress: Called after each recording.
    """
    total = train_recordings + validation_recordings
    first_participants = {"train": 1, "validation": 2 + (train_recordings - 1) // _PER_PARTICIPANT}
    make_folder(root / "annotations")
    _write_classes(root / "annotations" / "EPIC_100_verb_classes.csv", VERBS, "motion")
    _write_classes(root / "annotations" / "EPIC_100_noun_classes.csv", NOUNS, "object")
    done = 0
    for split, number in (("train", train_recordings), ("validation", validation_recordings)):
        rows: list[Sequence[Any]] = []
        for index in range(number):
            participant = f"P{first_participants[split] + index // _PER_PARTICIPANT:02d}"
            name = f"{participant}_{index % _PER_PARTICIPANT + 1:02d}"
            random = kitchen_generator(seed, split, index)
            events = _events(clips_per_recording, random)
            path = root / "EPIC-KITCHENS" / participant / "videos" / f"{name}.MP4"
            has_video, has_audio = not (index % 6 == 5 and split == "train"), index % 6 != 3
            _write_video_file(path, events, difficulty, random, has_video=has_video, has_audio=has_audio)
            if imu:
                folder = path.parents[1] / "meta_data"
                _write_imu(folder, name, events, difficulty, motion_generator(seed, split, index))
            rows += [_row(participant, name, place, event) for place, event in enumerate(events)]
            done += 1
            if progress is not None:
                progress("record", done, total)
        _write_table(root / "annotations" / f"EPIC_100_{split}.csv", _COLUMNS, rows)


def _events(number: int, random: np.random.Generator) -> list[Event]:
    """Draw actions that follow each other."""
    labels = [(verb, noun) for verb in range(len(VERBS)) for noun in range(len(NOUNS))]
    order: list[int] = []
    while len(order) < number:
        order += random.permutation(len(labels)).tolist()
    events, time_s = [], 0.3
    for label in order[:number]:
        length = round(float(random.uniform(1.0, 2.0)), 2)
        events.append(Event(round(time_s, 2), round(time_s + length, 2), *labels[label]))
        time_s += length + float(random.uniform(0.05, 0.4))
    return events


def _write_video_file(
    path: Path,
    events: list[Event],
    difficulty: float,
    random: np.random.Generator,
    *,
    has_video: bool,
    has_audio: bool,
) -> None:
    """Write one recording second by second, so that video and audio are interleaved in the file."""
    make_folder(path.parent)
    duration_s = int(np.ceil(events[-1].stop_s + 0.3))
    scene = Scene(events, difficulty, random)
    samples = sound(events, duration_s, difficulty, random)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            video, audio = _streams(container, has_video, has_audio)
            for second in range(duration_s):
                if audio is not None:
                    _add_audio(container, audio, samples[second * SOUND_RATE : (second + 1) * SOUND_RATE], second)
                for place in range(second * FPS, (second + 1) * FPS) if video is not None else ():
                    frame = av.VideoFrame.from_ndarray(scene.frame(place / FPS), format="rgb24")
                    frame.pts = place
                    container.mux(video.encode(frame))
            for stream in (video, audio):
                if stream is not None:
                    container.mux(stream.encode(None))
    finally:
        cv2.setNumThreads(threads)


def _streams(container: Any, has_video: bool, has_audio: bool) -> tuple[Any, Any]:
    video = audio = None
    if has_video:
        options = {"preset": "veryfast", "crf": "23", "threads": "1", "mbtree": "0"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    if has_audio:
        audio = container.add_stream("aac", rate=SOUND_RATE, layout="mono", bit_rate=64_000)
    return video, audio


def _add_audio(container: Any, stream: Any, samples: np.ndarray, second: int) -> None:
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate, frame.time_base = SOUND_RATE, Fraction(1, SOUND_RATE)
    frame.pts = second * SOUND_RATE
    container.mux(stream.encode(frame))


def _write_imu(
    folder: Path, name: str, events: list[Event], difficulty: float, random: np.random.Generator
) -> None:
    """Write the files of accelerometer and gyroscope, each with its own clock, which stop before the last fifth."""
    make_folder(folder)
    last = events[max(round(_IMU_SHARE * len(events)), 1) - 1]
    sensors = motion(events, last.stop_s + _LONGER_S, difficulty, random)
    for suffix, axes, (times_T, values_3T) in zip(
        ("accl", "gyro"), (ACCELEROMETER, GYROSCOPE), sensors, strict=True
    ):
        rows = np.concatenate([times_T[None], values_3T]).T.tolist()
        _write_table(folder / f"{name}-{suffix}.csv", ("Milliseconds", *axes), rows)


def _row(participant: str, name: str, place: int, event: Event) -> Sequence[Any]:
    # As in Epic-Kitchens, a quarter of the clips overlap the next one: the annotation ends after the action.
    stop_s = event.stop_s + (_LONGER_S if place % 4 == 1 else 0.0)
    verb, noun = VERBS[event.verb], NOUNS[event.noun]
    return (
        f"{name}_{place}", participant, name, _timestamp(event.start_s + 0.1), _timestamp(event.start_s),
        _timestamp(stop_s), int(event.start_s * _NOMINAL_FPS), int(stop_s * _NOMINAL_FPS), f"{verb} {noun}",
        verb, event.verb, noun, event.noun, f"['{noun}']", f"[{event.noun}]",
    )  # fmt: skip


def _timestamp(time_s: float) -> str:
    hundredths = round(time_s * 100)
    minutes, rest = divmod(hundredths, 6000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 100:02d}.{rest % 100:02d}"


def _write_classes(path: Path, names: tuple[str, ...], category: str) -> None:
    rows = [(number, name, f"['{name}']", category) for number, name in enumerate(names)]
    _write_table(path, ("id", "key", "instances", "category"), rows)


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_whole(path, text.getvalue().encode())
