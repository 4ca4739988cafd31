"""The IMU of Epic-Kitchens: two files with clocks of their own, stored to the sample, absent where they end or stop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from karmma_dist.modalities.signal import SignalInput
from karmma_dist.modalities.signal.decode import DECODER
from karmma_dist.modalities.signal.member import SignalMember, read_member
from karmma_dist.modalities.video import VideoInput
from karmma_dist.packing.pack import make_plan, pack, read_failures
from karmma_dist.packing.spec import PackingSpec, load_spec
from karmma_dist.packing.verify.verify import verify
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.views import evaluation_view
from kits.packing import epic_spec, movie_path, row, write_epic, write_movie

RATE_HZ = 198.3
SENSORS = {"accl": ("AcclX", "AcclY", "AcclZ"), "gyro": ("GyroX", "GyroY", "GyroZ")}
VIDEO_S, IMU_S, LOST_S = 10.0, 7.0, (4.0, 4.5)
SPANS = {
    "start": (0.10, 1.10), "middle": (2.30, 3.80), "across": (3.50, 5.00), "inside": (4.10, 4.40),
    "after": (5.00, 6.90), "late": (6.50, 9.00), "beyond": (8.00, 9.50),
}  # fmt: skip
COVERED = {"start", "middle", "after"}


def imu_path(root: Path, name: str, sensor: str) -> Path:
    return root / "EPIC-KITCHENS" / name.split("_")[0] / "meta_data" / f"{name}-{sensor}.csv"


def write_imu(root: Path, name: str = "P01_101", end_s: float = IMU_S) -> dict[str, np.ndarray]:
    """Write both files as the cameras' telemetry is exported: all digits, a lost stretch, an end before the video's.

    Returns:
        Milliseconds and axes by sensor, (4, T).
    """
    tables = {}
    for number, (sensor, axes) in enumerate(SENSORS.items()):
        random = np.random.default_rng(number)
        times = 0.4 * number + np.cumsum(1000 / RATE_HZ + random.uniform(-0.05, 0.05, round(end_s * RATE_HZ)))
        times = times[(times < 1000 * LOST_S[0]) | (times > 1000 * LOST_S[1])]
        counts = random.integers(-4000, 4000, (3, len(times)))
        table = np.concatenate([times[None], counts / (417 if sensor == "accl" else 3755)])
        lines = [",".join(["Milliseconds", *axes]), *(",".join(map(repr, column)) for column in table.T.tolist())]
        path = imu_path(root, name, sensor)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        tables[sensor] = table
    return tables


def timestamp(time_s: float) -> str:
    return f"00:00:{time_s:05.2f}"


def spec(root: Path, **fields: str) -> PackingSpec:
    overrides = ["flow.source=none", "video.short_side=32", *(f"{name}={value}" for name, value in fields.items())]
    return load_spec("epic_kitchens_imu", raw=root, out=root / "out", overrides=overrides)


def write_kitchen(root: Path) -> None:
    """Write a recording with clips before, in and after all gaps of its IMU, and two recordings that have no IMU."""
    write_epic(
        root,
        [row(key, "P01_101", timestamp(start), timestamp(stop)) for key, (start, stop) in SPANS.items()]
        + [row("old", "P01_01")],
        [row("validation", "P02_01")],
    )
    write_movie(movie_path(root, "P01_101"), frames=round(VIDEO_S * 10), fps=10)
    for name in ("P01_01", "P02_01"):
        write_movie(movie_path(root, name), frames=20, fps=10)


def members_of(out: Path) -> dict[str, SignalMember | None]:
    folder = ShardFolder(out)
    clips = [clip for split in folder.splits for clip in folder.clips(split)]
    return {clip.key: read_member(folder.read(clip, "signal")) if clip.has("signal") else None for clip in clips}


def test_clips_hold_the_samples_of_both_clocks(tmp_path: Path) -> None:
    write_kitchen(tmp_path)
    tables = write_imu(tmp_path)
    summary = pack(spec(tmp_path))
    assert not summary.failures
    assert verify(tmp_path / "out", full=True).whole
    members = members_of(tmp_path / "out")
    assert {key for key, member in members.items() if member is not None} == COVERED
    for key in COVERED:
        member, (start_s, stop_s) = members[key], SPANS[key]
        assert member is not None
        assert [channel.unit for channel in member.channels] == ["m/s2"] * 3 + ["rad/s"] * 3
        for track, table in zip(member.tracks, tables.values(), strict=True):
            inside = np.flatnonzero((table[0] > 1000 * start_s) & (table[0] < 1000 * stop_s))
            first, last = max(inside[0] - 1, 0), inside[-1] + 1
            assert len(track.times_T) > 0.95 * RATE_HZ * (stop_s - start_s)
            assert np.array_equal(track.times_T, table[0, first : last + 1])
            assert np.array_equal(track.values_CT, table[1:, first : last + 1])


def test_models_receive_both_sensors_at_the_moments_of_the_view(tmp_path: Path) -> None:
    write_kitchen(tmp_path)
    tables = write_imu(tmp_path)
    pack(spec(tmp_path))
    folder = ShardFolder(tmp_path / "out")
    clip = next(clip for clip in folder.clips("train") if clip.key == "middle")
    metadata, inputs = folder.metadata(clip), SignalInput(rate_hz=100, num_samples=100)
    description = metadata.description("signal")
    view = evaluation_view(VideoInput(num_frames=4), 0)
    whole = DECODER.decode(folder.read(clip, "signal"), description, inputs)
    (window,) = DECODER.cut(whole, description, inputs, [view], metadata.length_s)
    moments_ms = 1000 * (2.3 + 0.25 + np.arange(100) / 100)  # the middle second of 1.5
    for channel, (sensor, axis) in zip(window, [(s, a) for s in SENSORS for a in (1, 2, 3)], strict=True):
        table = tables[sensor]
        expected = np.interp(moments_ms, table[0], table[axis])
        assert channel == pytest.approx((expected - table[axis].mean()) / table[axis].std(), abs=1e-4)


def test_without_the_gyroscopes_file_or_switched_off_there_is_no_signal(tmp_path: Path) -> None:
    write_kitchen(tmp_path)
    write_imu(tmp_path)
    imu_path(tmp_path, "P01_101", "gyro").unlink()
    assert all("signal" not in recording.media for recording in make_plan(spec(tmp_path)).recordings)
    off = spec(tmp_path, **{"signal.source": "none"})
    assert off.modalities == ["video", "audio"]
    assert epic_spec(tmp_path).modalities == ["video", "flow", "audio"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("AcclZ", "AcclW", "P01_101-accl.csv, line 1: column 'AcclZ' is missing (did you mean 'AcclY'?)"),
        ("AcclX", "AcclX [g]", "P01_101-accl.csv, line 1: column 'AcclX' is in g, declared is m/s2"),
        ("Milliseconds", "Milliseconds (s)", "P01_101-accl.csv, line 1: column 'Milliseconds' is in s, declared is ms"),
    ],
)
def test_a_file_of_another_form_fails_the_recordings_clips(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    write_kitchen(tmp_path)
    write_imu(tmp_path)
    path = imu_path(tmp_path, "P01_101", "accl")
    path.write_text(path.read_text().replace(before, after))
    pack(spec(tmp_path))
    failures = read_failures(tmp_path / "out" / "failures.jsonl")
    assert {failure.key for failure in failures} == set(SPANS)
    assert {failure.error for failure in failures} == {message}


def test_a_damaged_line_fails_the_clips_that_need_it(tmp_path: Path) -> None:
    write_kitchen(tmp_path)
    write_imu(tmp_path)
    path = imu_path(tmp_path, "P01_101", "gyro")
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines[1:], 1) if float(line.split(",")[0]) > 2500)
    lines[number] = f"{lines[number].split(',')[0]},nan,0,0"
    path.write_text("\n".join(lines) + "\n")
    (failure,) = pack(spec(tmp_path)).failures
    assert failure.key == "middle"
    assert failure.error.endswith(f"P01_101-gyro.csv, line {number + 1}: GyroX is nan")
    members = members_of(tmp_path / "out")
    assert {key for key, member in members.items() if member is not None} == COVERED - {"middle"}
