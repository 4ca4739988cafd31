"""Decoding from the first frame to the last one wanted, against the groups of pictures that hold a wanted frame; and
normalising and spectrograms clip by clip, as a worker would, against in batch. Same answers, all arms in turn.

    python tests/benchmarks/decode.py [--movie FILE] [--repeats N] [--clips N]

Clips are cut out of a movie (a synthetic kitchen's without one) and stored as packing stores them. Prints medians of
CPU milliseconds per clip on one thread; of wall-clock milliseconds where a GPU does the work.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from karmma_dist.modalities.audio.store import encode_flac, sound_of
from karmma_dist.modalities.encode import VideoEncoder
from karmma_dist.modalities.flow import FlowSpec
from karmma_dist.modalities.flow.store import ComputedFlow
from karmma_dist.modalities.stored_frames import chosen_frames, frame_numbers
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.modalities.video_file import VideoFile
from karmma_dist.modalities.yuv import ToI420
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.recipe import InputRecipe
from karmma_dist.streaming.batch import Sample, collate, prepare
from karmma_dist.streaming.views import View, training_view
from kits.decoding import decode_audio, decode_flow, decode_video
from kits.decoding import described as described_frames

FPS = 30
SIZES = {"456x256": (456, 256), "70x56": (70, 56)}
Stored = dict[str, bytes]


def read_pictures(movie: Path, number: int) -> list[np.ndarray]:
    """The first pictures of a movie, repeated when it is too short."""
    with av.open(str(movie)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), number)]
    return [pictures[place % len(pictures)] for place in range(number)]


def store(pictures: list[np.ndarray], size: tuple[int, int], sound: np.ndarray) -> Stored:
    """One clip's members."""
    spec, flow_spec = VideoSpec(), FlowSpec()
    to_i420 = ToI420()
    video = VideoEncoder(*size, Fraction(FPS), spec.crf, spec, to_i420.colorspace)
    flow = ComputedFlow(*size, Fraction(FPS), flow_spec, spec)
    for picture in pictures:
        scaled = to_i420.of_rgb(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
        video.add(scaled)
        flow.add(scaled)
    return {"video": video.finish(), "flow": flow.finish()[0], "audio": encode_flac(sound)}


def first_to_last(data: bytes, chosen: np.ndarray) -> Iterator[av.VideoFrame]:
    """The plain way: decode every frame up to the last one wanted."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = set(chosen.tolist())
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield frame
            if number == chosen[-1]:
                return


def in_turn(arms: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of each arm."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    for _ in range(repeats):
        for name, arm in arms.items():
            started = clock()
            arm()
            seconds[name].append(clock() - started)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


def table(what: str, medians: dict[str, float], per: int) -> None:
    """Print a row: milliseconds per clip, and each arm's ratio to the first."""
    first = next(iter(medians.values()))
    cells = [f"{name} {value / per:7.2f} ({value / first:4.2f} x)" for name, value in medians.items()]
    print(f"{what:34}" + "   ".join(cells), flush=True)


def compare_decoding(clips: list[Stored], length_s: int, size: str, repeats: int) -> None:
    """Both ways of getting at frames, for video and flow, without any conversion of pixels."""
    described = described_frames(length_s * FPS, FPS)
    for num_frames in (8, 16, 32):
        recipe = InputRecipe.model_validate({"video": {"num_frames": num_frames}}).video
        views = [training_view(recipe, length_s * FPS, 0, 0, f"clip_{k}") for k in range(len(clips))]
        chosen = [np.unique(frame_numbers(view.times_F * length_s, described.pictures)) for view in views]
        for modality in ("video", "flow"):
            movies = [(clip[modality], numbers) for clip, numbers in zip(clips, chosen, strict=True)]
            for data, numbers in movies:
                pairs = zip(first_to_last(data, numbers), chosen_frames(data, numbers, length_s * FPS), strict=True)
                if not all(np.array_equal(one.to_ndarray(), other.to_ndarray()) for one, other in pairs):
                    raise SystemExit("the two ways differ: do not believe the figures below")
            arms: dict[str, Callable[[], object]] = {
                "first to last": lambda movies=movies: [list(first_to_last(*movie)) for movie in movies],
                "wanted groups": lambda movies=movies: [
                    list(chosen_frames(*movie, length_s * FPS)) for movie in movies
                ],
            }
            medians = in_turn(arms, repeats, time.process_time)
            table(f"{modality} {size}, {length_s} s, {num_frames} frames", medians, len(clips))


def decode_all(clip: Stored, view: View, inputs: InputRecipe, length_s: int) -> dict[str, np.ndarray]:
    """Arrays of one clip as they leave a worker."""
    moments_s, described = view.times_F * length_s, described_frames(length_s * FPS, FPS)
    return {
        "video": decode_video(clip["video"], described, moments_s, inputs.video, view),
        "flow": decode_flow(clip["flow"], described, moments_s, inputs.video, view),
        "audio": decode_audio(clip["audio"], length_s * 16_000, moments_s, inputs.audio),
    }


def compare_preparing(clips: list[Stored], length_s: int, repeats: int) -> None:
    """The floats that models take, made clip by clip or in batch, at the paper's sizes."""
    inputs = InputRecipe()
    views = [training_view(inputs.video, length_s * FPS, 0, 0, f"clip_{k}") for k in range(len(clips))]
    arrays = [decode_all(clip, view, inputs, length_s) for clip, view in zip(clips, views, strict=True)]
    for modality in ("video", "flow", "audio"):
        samples = [
            Sample(f"clip_{k}", {}, {modality: array[modality]}, view.jitter_3)
            for k, (array, view) in enumerate(zip(arrays, views, strict=True))
        ]
        alone = [collate([sample], [modality], []) for sample in samples]
        together = collate(samples, [modality], [])
        one = torch.cat([prepare(batch, inputs, "cpu").inputs[modality] for batch in alone])
        difference = float((one - prepare(together, inputs, "cpu").inputs[modality]).abs().max())
        raw, ready = samples[0].arrays[modality].nbytes / 2**20, one[0].nbytes / 2**20
        if difference > 1e-3:
            raise SystemExit(f"the two ways differ by {difference}: do not believe the figures below")
        arms: dict[str, Callable[[], object]] = {
            "clip by clip": lambda alone=alone: [prepare(batch, inputs, "cpu") for batch in alone],
            "in batch": lambda together=together: prepare(together, inputs, "cpu"),
        }
        medians = in_turn(arms, repeats, time.process_time)
        table(f"{modality} to floats, {raw:.1f} -> {ready:.1f} MiB", medians, len(clips))
        if torch.cuda.is_available():
            gpu_arms: dict[str, Callable[[], object]] = {
                "in batch, GPU": lambda together=together: (prepare(together, inputs, "cuda"), torch.cuda.synchronize())
            }
            table(f"{modality} to floats", in_turn(gpu_arms, repeats, time.perf_counter), len(clips))


def compare_modalities(clips: list[Stored], length_s: int, size: str, inputs: InputRecipe, repeats: int) -> None:
    """What each modality of a clip costs a worker, all in all."""
    view = training_view(inputs.video, length_s * FPS, 0, 0, "clip")
    moments_s, described = view.times_F * length_s, described_frames(length_s * FPS, FPS)
    arms: dict[str, Callable[[], object]] = {
        "video": lambda: [decode_video(c["video"], described, moments_s, inputs.video, view) for c in clips],
        "flow": lambda: [decode_flow(c["flow"], described, moments_s, inputs.video, view) for c in clips],
        "audio": lambda: [
            decode_audio(c["audio"], length_s * 16_000, moments_s, inputs.audio) for c in clips
        ],
    }
    medians = in_turn(arms, repeats, time.process_time)
    table(f"worker: {size}, {length_s} s, {inputs.video.num_frames} frames", medians, len(clips))


def main() -> None:
    """Store clips, run the arms in turn and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--movie", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clips", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        movie = arguments.movie
        if movie is None:
            write_kitchen(Path(folder), train_recordings=1, validation_recordings=1, clips_per_recording=12)
            movie = sorted(Path(folder).rglob("*.MP4"))[0]
        pictures = read_pictures(movie, arguments.clips * 10 * FPS)
        with VideoFile(movie) as opened:
            sound = sound_of(opened)
    samples = np.zeros(16_000, np.int16) if sound is None else sound.samples
    samples = np.resize(samples, arguments.clips * 10 * 16_000)
    print(f"CPU milliseconds per clip, medians of {arguments.repeats} runs in turn, {arguments.clips} clips")
    for size, (width, height) in SIZES.items():
        for length_s in (3, 10):
            clips = [
                store(
                    pictures[k * 10 * FPS :][: length_s * FPS],
                    (width, height),
                    samples[k * 160_000 :][: length_s * 16_000],
                )
                for k in range(arguments.clips)
            ]
            compare_decoding(clips, length_s, size, arguments.repeats)
            small = {"video": {"num_frames": 16, "short_side": 48, "crop": 40}, "audio": {"num_windows": 1}}
            inputs = InputRecipe() if height >= 256 else InputRecipe.model_validate(small)
            compare_modalities(clips, length_s, size, inputs, arguments.repeats)
            if height >= 256 and length_s == 3:
                compare_preparing(clips, length_s, arguments.repeats)


if __name__ == "__main__":
    main()
