"""Tests that every random draw is bit for bit stable, as existing runs, shards and reports require."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import karmma_dist
from karmma_dist.evaluation.conditions import Condition, build_conditions, keep
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.results import ClipResults
from karmma_dist.evaluation.statistics.bootstrap import resampled
from karmma_dist.modalities.breaking import span
from karmma_dist.modalities.video import VideoInput
from karmma_dist.packing.readers.epic_kitchens import read_epic_kitchens
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.packing.tars.assemble import shard_keys
from karmma_dist.recipe import ModalityDropout
from karmma_dist.seeding import fallback_words, forward_seed
from karmma_dist.streaming.dropout import keep_patterns
from karmma_dist.streaming.loader import is_held_out
from karmma_dist.streaming.order import ClipOrder
from karmma_dist.streaming.views import training_view
from karmma_dist.studies.statistics import Resampled
from karmma_dist.studies.study import Column
from kits.decoding import break_arrays, break_sound
from kits.packing import epic_spec, row, write_epic

KEYS = ["P01_01_0", "P01_01_1", "P22_107_15", "P30_05_é"]
MODALITIES = ["video", "flow", "audio"]
SHARDS = [f"train-{shard:06d}.tar" for shard in range(12) for _ in range(20 + shard)]


def permuted_clips() -> np.ndarray:
    return np.concatenate([ClipOrder(SHARDS, 8, seed=11).clips(epoch) for epoch in (0, 1, 40)])


def clips_in_lanes() -> np.ndarray:
    return np.concatenate([ClipOrder(SHARDS, 8, seed=11, lanes=2, window=3).clips(epoch) for epoch in (0, 1, 40)])


def dropout(draw: str) -> np.ndarray:
    recipe = ModalityDropout.model_validate({"probability": 0.4, "draw": draw})
    return np.concatenate([keep_patterns(101, 3, recipe, seed=11, epoch=epoch) for epoch in (0, 1, 40)])


def views(sampling: str) -> np.ndarray:
    video = VideoInput.model_validate({"sampling": sampling, "num_frames": 5, "horizontal_flip": True})
    drawn = [training_view(video, 90, seed=11, epoch=epoch, key=key) for epoch in (0, 7) for key in KEYS]
    return np.concatenate(
        [np.r_[view.times_F, view.top, view.left, view.flip, view.jitter_3.astype(np.float64)] for view in drawn]
    )


def dropped_sensors() -> np.ndarray:
    present_BM = torch.ones(200, 3, dtype=torch.bool)
    keys = [f"P01_{clip:03d}" for clip in range(196)] + KEYS
    conditions = [Condition(tuple(MODALITIES), drop_prob, seed) for drop_prob in (0.3, 0.8) for seed in (0, 5)]
    return torch.stack([keep(condition, keys, present_BM, MODALITIES) for condition in conditions]).numpy()


def failing_moments() -> np.ndarray:
    spans = [span(1000, 0.1, f"{seed}/{key}") for seed in (0, 5) for key in KEYS]
    return np.array([[part.start, part.stop] for part in spans])


def noisy_pixels() -> np.ndarray:
    clips = torch.full((len(KEYS), 2, 8, 8, 3), 128, dtype=torch.uint8)
    return break_arrays("video", "noise", 0.2, clips, KEYS, seed=5).numpy()


def noisy_flow() -> np.ndarray:
    clips = torch.full((len(KEYS), 2, 8, 8, 2), 128, dtype=torch.uint8)
    return break_arrays("flow", "noise", 0.2, clips, KEYS, seed=5).numpy()


def noisy_sound() -> np.ndarray:
    samples = np.full(400, 1000, dtype=np.int16)
    return np.concatenate([break_sound("noise", 3.0, samples, key, seed=5) for key in KEYS])


def lost_boxes() -> np.ndarray:
    return break_arrays("detections", "dropped", 0.4, torch.ones(len(KEYS), 20, 4, 6), KEYS, seed=5).numpy()


def clips_over_shards() -> np.ndarray:
    keys = [f"key_{number:04d}" for number in range(500)]
    shards = [shard for split in ("train", "validation") for shard in shard_keys(keys, split, 11, 64)]
    return np.array([int(key.removeprefix("key_")) for shard in shards for key in shard])


def held_out_of_training() -> np.ndarray:
    return np.array([is_held_out(f"P{number:03d}_é", fraction) for fraction in (0.1, 0.5) for number in range(500)])


def patterned_ranks(num_clips: int, num_conditions: int) -> np.ndarray:
    """Return the rank of the right class per clip and condition, int32 (N, K), in a pattern without chance."""
    return ((np.arange(num_clips)[:, None] * (3 + np.arange(num_conditions))) % 7 // 3).astype(np.int32)


def resampled_clips() -> np.ndarray:
    conditions = build_conditions(MODALITIES, subsets=True)
    outcomes = ClipResults([f"clip_{n}" for n in range(60)], conditions, {"action": patterned_ranks(60, 7)})
    return resampled(outcomes, find_figure("action_top1"), num_draws=230, seed=4)


def resampled_study() -> list[list[float] | None]:
    conditions = build_conditions(MODALITIES)
    outcomes = {
        label: {
            seed: ClipResults([f"clip_{n}" for n in range(60)], conditions, {"action": patterned_ranks(60, 9)[:, [k]]})
            for k, seed in enumerate(range(shift, shift + 4))
        }
        for shift, label in enumerate(["first", "second"])
    }
    column = Column(name="full")
    study = Resampled(outcomes, [column], num_draws=230, seed=4)
    return [study.summary(label, "full").ci for label in outcomes]


DRAWS: dict[str, tuple[Callable[[], np.ndarray], str]] = {
    "order": (permuted_clips, "8a13da3558522758"),
    "order in lanes": (clips_in_lanes, "e0784c6a9e355e2b"),
    "independent dropout": (lambda: dropout("independent"), "34f26277e4ff90b1"),
    "stratified dropout": (lambda: dropout("stratified"), "5a878601168e2d1a"),
    "views of segments": (lambda: views("segments"), "143a05b4a6c23f8f"),
    "dense views": (lambda: views("dense"), "96847ce43715a210"),
    "sensors dropped in evaluation": (dropped_sensors, "14b2bf88021a3218"),
    "moments of failure": (failing_moments, "d16ff11d0c3cedbe"),
    "noise of video": (noisy_pixels, "cd9b518b661b76fd"),
    "noise of flow": (noisy_flow, "2537adbf2bcebbcf"),
    "noise of sound": (noisy_sound, "578fd037fe4488a3"),
    "lost boxes": (lost_boxes, "883986887e28ea44"),
    "clips over shards": (clips_over_shards, "bcd783907851d34e"),
    "recordings held out of training": (held_out_of_training, "13728f0b3fb5618e"),
    "bootstrap of an evaluation": (resampled_clips, "1b15931cb7d1a430"),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_never_changes(name: str) -> None:
    draw, digest = DRAWS[name]
    assert hashlib.sha256(np.ascontiguousarray(draw()).tobytes()).hexdigest()[:16] == digest


def test_the_intervals_of_a_study_never_change() -> None:
    first, second = resampled_study()
    assert first == pytest.approx([34.39258696909824, 52.705503778329216], abs=1e-9)
    assert second == pytest.approx([33.63419768529073, 52.637754061129336], abs=1e-9)


def test_the_fallback_modality_never_changes() -> None:
    words = [16408275900817160502, 6219059701758472499, 11582579634710342968]
    assert fallback_words(3, seed=11, epoch=40).tolist() == words
    assert fallback_words(2, 2**62 - 1, 0).tolist() == [17120665681290883597, 16659307649847462856]


def test_the_seed_of_dropout_in_the_model_never_changes() -> None:
    seeds = [forward_seed(11, forward, rank, world_size=4) for forward, rank in ((0, 0), (3, 2), (1_000_000, 3))]
    assert seeds == [1171529959058969227, 7478159418059516550, 2419571274802135215]


def test_recordings_held_out_in_packing_never_change(tmp_path: Path) -> None:
    write_epic(tmp_path, [row(f"P01_{video:02d}_0", f"P01_{video:02d}") for video in range(1, 41)])
    hold_out = {"validation": 0.1, "other": 0.15}
    splits = {"train": "annotations/EPIC_100_train.csv"}
    plan = read_epic_kitchens(
        epic_spec(tmp_path, epic_kitchens={"splits": splits, "unlabelled_splits": [], "hold_out": hold_out})
    )
    videos: dict[str, list[int]] = {}
    for recording in plan.recordings:
        videos.setdefault(recording.clips[0].split, []).append(int(recording.name.removeprefix("P01_")))
    assert videos["validation"] == [1, 11, 17, 23, 24, 34]
    assert videos["other"] == [2, 4, 7, 14, 16, 21, 22, 26, 27, 31, 33]


def test_the_actions_of_the_synthetic_kitchen_never_change(tmp_path: Path) -> None:
    write_kitchen(tmp_path, seed=5, train_recordings=1, validation_recordings=1, clips_per_recording=6)
    tables = [tmp_path / "annotations" / f"EPIC_100_{split}.csv" for split in ("train", "validation")]
    written = b"".join(table.read_bytes() for table in tables)
    assert hashlib.sha256(written).hexdigest()[:16] == "01f95572239925b5"


def test_random_numbers_are_made_in_one_module_only() -> None:
    package = Path(karmma_dist.__file__).parent
    makers = re.compile(r"blake2|shake_|Philox|PCG64|default_rng|SeedSequence|RandomState|random_raw|np\.random\.seed")
    assert makers.search((package / "seeding.py").read_text())
    others = {path for path in package.rglob("*.py") if path.name != "seeding.py" and makers.search(path.read_text())}
    assert not others
