"""Peak memory of packing long recordings with two workers, command line included.

    python tests/benchmarks/packing_memory.py [--minutes N] [--flow] [--scratch FOLDER]

Makes two recordings (1280x720, 30 frames/s, stereo sound) with 20 overlapping clips a minute, every 20th of them a
minute long, and packs them with `karmma-dist shard --workers 2`. Prints the largest sum of the proportional set sizes
(shared pages counted once) of all its processes, looked at five times a second. `--flow` computes optical flow as well:
slow. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

WIDTH, HEIGHT, FPS, RATE = 1280, 720, 30, 48_000
CLIPS_PER_MINUTE, LONG_EVERY = 20, 20
INTERVAL_S = 0.2
LOOP_S = 10
SPEC = """\
reader: plain
dataset: long
raw: {raw}
out: {out}
plain:
  splits: {{train: train.csv}}
  heads: {{action: ""}}
flow:
  source: {flow}
"""


def write_loop(path: Path) -> None:
    """Ten seconds of a drifting texture with sound, in closed groups of pictures."""
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    texture = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "crf": "28", "g": "60", "flags": "+cgop", "bf": "0"}
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        for second in range(LOOP_S):
            tone = 8000 * np.sin(2 * np.pi * (200 + 20 * second) * np.arange(RATE) / RATE)
            sound = av.AudioFrame.from_ndarray(np.repeat(tone.astype(np.int16), 2)[None], format="s16", layout="stereo")
            sound.sample_rate, sound.time_base, sound.pts = RATE, Fraction(1, RATE), second * RATE
            container.mux(audio.encode(sound))
            for number in range(second * FPS, (second + 1) * FPS):
                frame = av.VideoFrame.from_ndarray(np.roll(texture, 4 * number, axis=1), format="rgb24")
                frame.pts = number
                container.mux(video.encode(frame))
        for stream in (video, audio):
            container.mux(stream.encode(None))


def write_recording(path: Path, loop: Path, minutes: int) -> None:
    """Repeat the packets of the loop until the recording is long enough."""
    with av.open(str(path), "w") as container:
        for turn in range(minutes * 60 // LOOP_S):
            with av.open(str(loop)) as source:
                if turn == 0:
                    copies = {stream.index: container.add_stream_from_template(stream) for stream in source.streams}
                for packet in source.demux():
                    if packet.dts is None:
                        continue
                    shift = round(turn * LOOP_S / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = copies[packet.stream.index]
                    container.mux(packet)


def write_annotations(path: Path, names: list[str], minutes: int) -> None:
    """Clips of 2 to 6 seconds, each running into the next ones, and some a minute long."""
    random = np.random.default_rng(1)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "media", "start", "stop", "action"))
        for name in names:
            for number, start in enumerate(np.sort(random.uniform(0, minutes * 60 - 6, minutes * CLIPS_PER_MINUTE))):
                length = 60 if number % LONG_EVERY == 0 else random.uniform(2, 6)
                stop = min(start + length, minutes * 60)
                writer.writerow((f"{name}_{number}", f"{name}.mkv", f"{start:.2f}", f"{stop:.2f}", f"a{number % 5}"))


def processes_below(root: int) -> list[int]:
    """The process and all of its descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def proportional_bytes(process: int) -> int:
    """Proportional set size; 0 when the process has ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def peak_of(command: list[str]) -> tuple[int, list[int], float]:
    """Run a command: largest sum over its processes, the parts of that sum, and wall seconds."""
    started, peak, parts = time.monotonic(), 0, [0]
    with subprocess.Popen(command) as child:
        while child.poll() is None:
            sizes = sorted(filter(None, map(proportional_bytes, processes_below(child.pid))), reverse=True)
            if sum(sizes) > peak:
                peak, parts = sum(sizes), sizes
            time.sleep(INTERVAL_S)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
    return peak, parts, time.monotonic() - started


def main() -> None:
    """Make the recordings, pack them, print the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--flow", action="store_true")
    parser.add_argument("--scratch", type=Path, help="default: the system's temporary folder")
    arguments = parser.parse_args()
    if not Path(f"/proc/{os.getpid()}/smaps_rollup").is_file():
        print("packing_memory: needs Linux: no /proc/PID/smaps_rollup here", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        raw, out = Path(scratch) / "raw", Path(scratch) / "out"
        raw.mkdir()
        write_loop(raw / "loop.mkv")
        write_recording(raw / "one.mkv", raw / "loop.mkv", arguments.minutes)
        shutil.copy(raw / "one.mkv", raw / "two.mkv")
        write_annotations(raw / "train.csv", ["one", "two"], arguments.minutes)
        spec = Path(scratch) / "long.yaml"
        spec.write_text(SPEC.format(raw=raw, out=out, flow="compute" if arguments.flow else "none"))
        command = [sys.executable, "-m", "karmma_dist", "shard", str(spec), "--workers", "2"]
        peak, parts, seconds = peak_of(command)
        stored = sum(path.stat().st_size for path in out.glob("*.tar"))
    each = ", ".join(f"{size / 1e6:.0f}" for size in parts)
    num_clips = 2 * arguments.minutes * CLIPS_PER_MINUTE
    print(
        f"peak {peak / 1e9:.2f} GB in {len(parts)} processes ({each} MB); 2 recordings of {arguments.minutes} min, "
        f"{num_clips} clips, {stored / 1e6:.0f} MB stored, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
