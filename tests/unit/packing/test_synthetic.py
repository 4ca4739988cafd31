"""The synthetic kitchen: media files that depend on the seed, with the gaps that real datasets have."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import numpy as np
import pytest

from karmma_dist.packing.pack import make_plan, pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.packing.synthetic.motion import motion
from karmma_dist.packing.synthetic.scene import NOUNS, VERBS, Event, Scene, sound
from karmma_dist.shards.folder import ShardFolder

SMALL = {"train_recordings": 6, "validation_recordings": 1, "clips_per_recording": 2}


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_kitchen(tmp_path / name, seed=seed, **SMALL)
    first, again, other = (_files(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.endswith(".MP4"))


def test_an_imu_comes_on_top_and_ends_before_the_last_fifth_of_the_clips(tmp_path: Path) -> None:
    small = {"train_recordings": 1, "validation_recordings": 1, "clips_per_recording": 5}
    for name, imu in (("without", False), ("with", True)):
        write_kitchen(tmp_path / name, seed=3, imu=imu, **small)
    without, files = (_files(tmp_path / name) for name in ("without", "with"))
    added = {Path(name).name for name in files.keys() - without.keys()}
    assert added == {f"{name}-{sensor}.csv" for name in ("P01_01", "P02_01") for sensor in ("accl", "gyro")}
    assert {name: files[name] for name in without} == without
    overrides = ["flow.source=none", "video.short_side=16"]
    pack(load_spec("demo_signal", raw=tmp_path / "with", out=tmp_path / "out", overrides=overrides))
    folder = ShardFolder(tmp_path / "out")
    for split in folder.splits:
        has = {int(clip.key.rsplit("_")[-1]): clip.has("signal") for clip in folder.clips(split)}
        assert has == {number: number < 4 for number in range(5)}


def test_the_imu_moves_along_the_axis_of_the_verb() -> None:
    axes = {"slide": {0}, "lift": {1}, "stir": {0, 1}, "bring": {2}}
    for verb, name in enumerate(VERBS):
        event = Event(0.5, 3.5, verb, 0)
        (times_T, accelerations_3T), (_, rates_3T) = motion([event], 5.0, 0.0, np.random.default_rng(verb))
        inside = (times_T >= 500) & (times_T < 3500)
        moved = accelerations_3T[:, inside].std(axis=1)
        assert set(np.argsort(moved)[-len(axes[name]) :].tolist()) == axes[name]
        assert accelerations_3T[:, ~inside].std(axis=1).max() < 1e-9
        assert rates_3T.shape[0] == 3


def test_some_recordings_have_no_sound_and_some_no_picture(kitchen: Path, shards: Path) -> None:
    streams = {}
    for path in sorted(kitchen.rglob("*.MP4")):
        with av.open(str(path)) as container:
            streams[path.stem] = {stream.type for stream in container.streams}
    kinds = list(streams.values())
    assert {"video"} in kinds
    assert {"audio"} in kinds
    assert {"video", "audio"} in kinds
    folder = ShardFolder(shards)
    for split in folder.splits:
        for clip in folder.clips(split):
            types = streams["_".join(clip.key.split("_")[:2])]
            assert clip.has("video") == clip.has("flow") == ("video" in types)
            assert clip.has("audio") == ("audio" in types)


def test_annotations_have_the_official_columns_and_existing_recordings(kitchen: Path) -> None:
    plan = make_plan(load_spec("demo", raw=kitchen, out="unused"))
    assert plan.classes == {"verb": list(VERBS), "noun": list(NOUNS)}
    assert {r.participant for r in plan.recordings if r.clips[0].split == "train"}.isdisjoint(
        r.participant for r in plan.recordings if r.clips[0].split == "validation"
    )
    for recording in plan.recordings:
        assert recording.video_file is not None
        with av.open(str(recording.video_file)) as container:
            seconds = container.duration / av.time_base
        assert all(clip.stop_s is not None and clip.stop_s <= seconds + 0.05 for clip in recording.clips)
    with open(kitchen / "annotations" / "EPIC_100_train.csv", newline="") as file:
        for row in csv.DictReader(file):
            minutes, seconds_text = row["start_timestamp"].split(":")[1:]
            start_s = int(minutes) * 60 + float(seconds_text)
            assert abs(int(row["start_frame"]) - start_s * 60) <= 1


@pytest.mark.parametrize("verb", range(len(VERBS)))
def test_the_object_moves_during_its_event_and_nothing_else_does(verb: int) -> None:
    scene = Scene([Event(0.0, 2.0, verb, 1)], 0.0, np.random.default_rng(verb))
    empty = Scene([Event(9.0, 9.1, verb, 1)], 0.0, np.random.default_rng(verb))
    pictures = [scene.frame(n / 15).astype(int) for n in range(30)]
    still = [empty.frame(n / 15).astype(int) for n in range(30)]
    moved = np.abs(pictures[0] - pictures[7]).sum()
    rested = np.abs(still[0] - still[7]).sum()
    assert moved > 10 * max(rested, 1)


def test_sound_fills_the_recording_and_stays_in_range() -> None:
    samples = sound([Event(0.2, 1.4, 2, 3)], 2, 1.0, np.random.default_rng(0))
    assert samples.shape == (48_000,)
    assert samples.dtype == np.float32
    assert np.abs(samples).max() <= 1
