"""Tests of the cache of decoded clips: the same batches bit for bit, within its limit, and no clip read twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from karmma_dist.modalities import MODALITIES, View
from karmma_dist.modalities.detections import DetectionsDescription, DetectionsInput
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.decoded import DecodedClips
from karmma_dist.streaming.loader import EvaluationClips, TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule

VIDEO = {"num_frames": 4, "short_side": 32, "crop": 24, "jitter": 0.4}


def batches(shards: Path, keep_decoded: int, num_workers: int = 0, **video: object) -> list[Batch]:
    inputs = InputRecipe.model_validate(
        {"video": {**VIDEO, **video}, "audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16}}
    )
    data = DataRecipe(
        shards=str(shards), num_workers=num_workers, keep_decoded=keep_decoded,
        modality_dropout={"probability": 0.3},  # type: ignore[arg-type]
    )  # fmt: skip
    clips = TrainingClips(open_shards(data), data, inputs, seed=3, batch_size=8)
    return list(training_batches(clips, Schedule(len(clips.clips), 8), 0, Position(0, 0), 3))


@pytest.mark.parametrize(
    "video", [{}, {"horizontal_flip": True}, {"sampling": "dense"}, {"short_side": 90, "crop": 80}]
)
@pytest.mark.parametrize("limit", [300_000, 10**9])
def test_batches_from_memory_equal_those_of_a_fresh_decode(shards: Path, limit: int, video: dict[str, object]) -> None:
    for kept, fresh in zip(batches(shards, limit, **video), batches(shards, 0, **video), strict=True):
        assert kept.keys == fresh.keys
        assert kept.inputs.keys() == fresh.inputs.keys()
        for modality, tensor in fresh.inputs.items():
            assert torch.equal(kept.inputs[modality], tensor)
        assert torch.equal(kept.present_BM, fresh.present_BM)


def test_workers_that_keep_clips_make_the_same_batches(shards: Path) -> None:
    for kept, fresh in zip(batches(shards, 10**9, num_workers=2), batches(shards, 0), strict=True):
        assert all(torch.equal(kept.inputs[modality], tensor) for modality, tensor in fresh.inputs.items())


def test_no_clip_is_read_again_after_the_first_epoch(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataRecipe(shards=str(shards), keep_decoded=10**9)  # type: ignore[arg-type]
    inputs = InputRecipe.model_validate({"video": VIDEO})
    clips = EvaluationClips(open_shards(data), data, inputs, "train")
    schedule = Schedule(len(clips.clips), 10)
    first = [clips.batch(part) for part in schedule.slices(0, Position(0, 0), 1)]

    def refuse(*_: object) -> bytes:
        raise AssertionError("a clip is read again")

    monkeypatch.setattr(ShardFolder, "read", refuse)
    second = [clips.batch(part) for part in schedule.slices(0, Position(0, 0), 1)]
    for before, after in zip(first, second, strict=True):
        assert all(torch.equal(before.inputs[modality], tensor) for modality, tensor in after.inputs.items())


def test_the_limit_holds_and_kept_clips_stay() -> None:
    kept = DecodedClips(100)
    clips = [Clip(f"k{number}", "s.tar", {}, {}, number) for number in range(3)]
    kept.keep(clips[0], "video", np.zeros(60, np.uint8))
    assert kept.takes_more
    kept.keep(clips[1], "video", np.zeros(60, np.uint8))
    assert not kept.takes_more
    assert kept.num_bytes == 60
    assert kept.get(clips[0], "video") is not None
    assert kept.get(clips[1], "video") is None


def test_boxes_cut_from_all_frames_are_the_best() -> None:
    settings = DetectionsInput(num_frames=2, max_boxes=1)
    view = View(np.array([0.0, 0.9]), 0.5, 0.5, True, np.ones(3, np.float32))
    boxes = [[[0.1, 0, 0.2, 1, 1, 0.5], [0.3, 0, 0.5, 1, 2, 0.9]], [], [[0.6, 0, 0.7, 1, 1, 1.0]]]
    decoder, description = MODALITIES["detections"].decoder, DetectionsDescription(3, 3)
    decoded = decoder.decode(json.dumps({"frames": boxes}).encode(), description, settings)
    sampled = decoder.cut(decoded, description, settings, [view], 1.0)[0]
    np.testing.assert_allclose(sampled[0, 0], [0.5, 0, 0.7, 1, 2, 0.9], atol=1e-6)
    np.testing.assert_allclose(sampled[1, 0], [0.3, 0, 0.4, 1, 1, 1.0], atol=1e-6)
    np.testing.assert_allclose(decoded[0, 0], [0.3, 0, 0.5, 1, 2, 0.9], atol=1e-6)  # cutting does not modify it
