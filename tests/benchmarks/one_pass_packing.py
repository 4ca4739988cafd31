"""One pass over a recording that cuts all of its clips, against one `ffmpeg -ss START -t LENGTH -i MOVIE` per clip.

    python tests/benchmarks/one_pass_packing.py [--raw FOLDER] [--recordings N] [--repeats N]

Same clips, same H.264 settings and size, same FLAC, no flow, one thread; the arms take turns on each recording. Prints
CPU seconds (user and system, ffmpeg's processes included), clips per CPU second, their ratio, and on which frame each
arm's clips start. FOLDER is in Epic-Kitchens' layout ($GRID_EPIC_RAW by default); without it, a synthetic kitchen.
Needs ffmpeg or the package imageio-ffmpeg.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TypeVar

import av
import numpy as np

from karmma_dist.modalities.audio import SAMPLE_RATE
from karmma_dist.modalities.encode import Geometry, x264_options
from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.modalities.video import VideoSpec
from karmma_dist.modalities.video_file import Shrinker, VideoFile
from karmma_dist.modalities.yuv import Orientation, ToI420, planes
from karmma_dist.packing.clip_cutter import cut_recording
from karmma_dist.packing.pack import make_plan
from karmma_dist.packing.records import CutClip
from karmma_dist.packing.spec import PackingSpec, load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen

SPECS = {
    "short side 256": VideoSpec(),
    "region and size of shards/grid_epic.yaml": load_spec("grid_epic", raw=".", out=".").video,
}
EARLY_S = 2e-3
"""Containers round timestamps: a frame this much after the start still counts as shown."""
T = TypeVar("T")


def find_ffmpeg() -> str:
    """Path of an ffmpeg; ends the script when there is none."""
    found = shutil.which("ffmpeg")
    if found is None:
        try:
            import imageio_ffmpeg
        except ImportError:
            print("one_pass_packing: no ffmpeg here: install ffmpeg or pip install imageio-ffmpeg", file=sys.stderr)
            raise SystemExit(2) from None
        found = imageio_ffmpeg.get_ffmpeg_exe()
    return found


def measured(way: Callable[[], T], who: int) -> tuple[tuple[float, float], T]:
    """CPU and wall seconds of one call, by this process or by its children, and its result."""
    before, started = resource.getrusage(who), time.perf_counter()
    result = way()
    after, wall_s = resource.getrusage(who), time.perf_counter() - started
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s), result


def cut_in_one_pass(recording: Recording, spec: PackingSpec) -> dict[str, bytes]:
    """Stored video per clip."""
    found = list(cut_recording(recording, spec))
    failed = [cut for cut in found if not isinstance(cut, CutClip)]
    if failed:
        raise SystemExit(f"{recording.name}: {failed[0]}")
    return {cut.record.key: cut.payloads["video"] for cut in found if isinstance(cut, CutClip)}


class PerClip:
    """The usual recipe: for each clip a process that seeks, decodes, scales and encodes."""

    def __init__(self, ffmpeg: str, recording: Recording, video: VideoSpec, folder: Path) -> None:
        assert recording.video_file is not None
        self.ffmpeg, self.movie, self.folder = ffmpeg, recording.video_file, folder
        with av.open(str(self.movie)) as container:
            stream = container.streams.best("video")
            kept = Geometry.of(stream.width, stream.height, video)
            fps = min(stream.average_rate, Fraction(video.max_fps).limit_denominator(1001))
            self.has_sound = container.streams.best("audio") is not None
        left, top, right, bottom = video.region
        crop = f"crop=iw*{right - left:.4f}:ih*{bottom - top:.4f}:iw*{left:.4f}:ih*{top:.4f},"
        filters = f"{crop if video.region != (0, 0, 1, 1) else ''}scale={kept.width}:{kept.height}:flags=area"
        options = [text for name, value in x264_options(video.crf, video).items() for text in (f"-{name}", value)]
        self.encode = ["-vf", filters, "-r", str(fps), "-c:v", "libx264", *options]

    def cut(self, clip: ClipRecord) -> None:
        """Write one clip's files."""
        assert clip.stop_s is not None
        command = [
            self.ffmpeg, "-v", "error", "-nostdin", "-y", "-threads", "1", "-filter_threads", "1",
            "-ss", f"{clip.start_s:.3f}", "-t", f"{clip.stop_s - clip.start_s:.3f}", "-i", str(self.movie),
            "-map", "0:v:0", *self.encode, str(self.folder / f"{clip.key}.mp4"),
        ]  # fmt: skip
        if self.has_sound:
            command += ["-map", "0:a:0", "-ac", "1", "-ar", str(SAMPLE_RATE), str(self.folder / f"{clip.key}.flac")]
        subprocess.run(command, check=True)

    def cut_all(self, recording: Recording) -> dict[str, bytes]:
        """Stored video per clip."""
        for clip in recording.clips:
            self.cut(clip)
        return {clip.key: (self.folder / f"{clip.key}.mp4").read_bytes() for clip in recording.clips}


@dataclass
class Arm:
    """Figures of one way to cut."""

    name: str
    who: int
    """Whose CPU seconds count."""
    runs: list[tuple[float, float]] = field(default_factory=list)
    """CPU and wall seconds of each repeat, all recordings together."""
    late: Counter[int] = field(default_factory=Counter)
    num_frames: int = 0

    @property
    def cpu_s(self) -> float:
        """Median."""
        return statistics.median(run[0] for run in self.runs)

    def line(self, num_clips: int) -> str:
        """All figures."""
        cpu = [run[0] for run in self.runs]
        wall = statistics.median(run[1] for run in self.runs)
        starts = [f"{num} clips {shift:+d}" if shift else f"{num} right" for shift, num in sorted(self.late.items())]
        return (
            f"{self.name:16} CPU {self.cpu_s:6.2f} s ({min(cpu):.2f} to {max(cpu):.2f})  wall {wall:6.2f} s  "
            f"{num_clips / self.cpu_s:5.1f} clips per CPU second  {self.num_frames} frames"
            + (f"  first frames: {', '.join(starts)}" if starts else "")
        )


def look_at(arm: Arm, recording: Recording, video: VideoSpec, stored: dict[str, bytes], folder: Path) -> None:
    """Count an arm's frames and, by the look of them, which source frames its clips start on.

    The right first frame is the one on show at the clip's start. With a region the arms' pictures lie a fraction of a
    pixel apart, so that looks do not tell.
    """
    firsts = {}
    for clip in recording.clips:
        luma, num_frames = first_luma(stored[clip.key], folder)
        firsts[clip.key] = luma
        arm.num_frames += num_frames
    if video.region != (0, 0, 1, 1):
        return
    times, lumas = source_lumas(recording, video)
    for clip in recording.clips:
        right = int(np.searchsorted(times, clip.start_s + EARLY_S, side="right")) - 1
        near = range(max(right - 3, 0), min(right + 4, len(times)))
        errors = {number: float(np.square(lumas[number] - firsts[clip.key]).mean()) for number in near}
        arm.late[min(near, key=errors.__getitem__) - right] += 1


def first_luma(data: bytes, folder: Path) -> tuple[np.ndarray, int]:
    """Luma (H, W) of a stored clip's first frame, and its number of frames."""
    path = folder / "read.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return planes(ToI420()(frames[0], frames[0].width, frames[0].height))[0].astype(float), len(frames)


def source_lumas(recording: Recording, video: VideoSpec) -> tuple[list[float], list[np.ndarray]]:
    """Times and luma of all frames of a recording at the stored size."""
    assert recording.video_file is not None
    times, lumas = [], []
    with VideoFile(recording.video_file) as movie:
        shrinker = Shrinker(Geometry.of(movie.video.width, movie.video.height, video), Orientation(), 0)
        for time_s, frame in movie.frames():
            times.append(time_s)
            lumas.append(planes(shrinker(frame))[0])
    return times, lumas


def compare(ffmpeg: str, raw: Path, video: VideoSpec, num_recordings: int, repeats: int, scratch: Path) -> None:
    """Run both arms in turn and print their figures."""
    spec = PackingSpec.model_validate(
        {"reader": "epic_kitchens", "dataset": "bench", "raw": str(raw), "out": "unused", "flow": {"source": "none"}}
        | {"video": video.model_dump()}
    )
    recordings = [recording for recording in make_plan(spec).recordings if has_video(recording)][:num_recordings]
    num_clips = sum(len(recording.clips) for recording in recordings)
    one_pass, per_clip = Arm("one pass", resource.RUSAGE_SELF), Arm("ffmpeg per clip", resource.RUSAGE_CHILDREN)
    for repeat in range(repeats):
        totals = {arm.name: np.zeros(2) for arm in (one_pass, per_clip)}
        for recording in recordings:
            recipe = PerClip(ffmpeg, recording, video, scratch)
            ways = (
                (one_pass, partial(cut_in_one_pass, recording, spec)),
                (per_clip, partial(recipe.cut_all, recording)),
            )
            for arm, way in ways:
                seconds, stored = measured(way, arm.who)
                totals[arm.name] += seconds
                if repeat == 0:
                    look_at(arm, recording, video, stored, scratch)
        for arm in (one_pass, per_clip):
            arm.runs.append((float(totals[arm.name][0]), float(totals[arm.name][1])))
    print(f"{num_clips} clips of {len(recordings)} recordings, medians of {repeats} runs in turn")
    print(one_pass.line(num_clips), per_clip.line(num_clips), sep="\n")
    start_s = cost_of_starting(ffmpeg)
    print(
        f"ratio {per_clip.cpu_s / one_pass.cpu_s:.2f}; {(per_clip.cpu_s - start_s * num_clips) / one_pass.cpu_s:.2f} "
        f"without the {start_s * 1000:.0f} ms of CPU that starting ffmpeg costs per clip"
    )


def cost_of_starting(ffmpeg: str) -> float:
    """CPU seconds of a process that only says its version."""
    command = partial(subprocess.run, [ffmpeg, "-version"], check=True, stdout=subprocess.DEVNULL)
    return statistics.median(measured(command, resource.RUSAGE_CHILDREN)[0][0] for _ in range(11))


def has_video(recording: Recording) -> bool:
    """Whether the recording has a movie with pictures."""
    if recording.video_file is None:
        return False
    with av.open(str(recording.video_file)) as container:
        return container.streams.best("video") is not None


def main() -> None:
    """Measure each specification."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data" / "grid_epic"
    parser.add_argument("--raw", type=Path, default=Path(os.environ.get("GRID_EPIC_RAW", beside)))
    parser.add_argument("--recordings", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    ffmpeg = find_ffmpeg()
    with tempfile.TemporaryDirectory() as folder:
        raw, specs = arguments.raw, SPECS
        if not raw.is_dir():
            raw = Path(folder) / "kitchen"
            print(f"{arguments.raw} is not there: a synthetic kitchen instead")
            specs = {"short side 256": VideoSpec()}  # a region would leave too little of its pictures
            write_kitchen(raw, train_recordings=arguments.recordings, validation_recordings=1)
        for name, video in specs.items():
            print(f"== {name}")
            compare(ffmpeg, raw, video, arguments.recordings, arguments.repeats, Path(folder))


if __name__ == "__main__":
    main()
