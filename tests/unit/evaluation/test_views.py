"""Several views of a clip: their positions, the mean of their probabilities, and that one view changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector, Predictions
from karmma_dist.evaluation.views import mean_over_views, parse_views
from karmma_dist.modalities.stored_frames import _crop
from karmma_dist.modalities.video import VideoInput
from karmma_dist.recipe import ViewsRecipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import evaluation_batches, is_wide, num_stored_frames
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import evaluation_view, evaluation_views
from kits.evaluation import KITCHEN_INPUTS, but_for_rounding, clips_of, flat
from kits.fusion import CONDITIONS, HEADS, MODALITIES, Fusion, make_batches


def with_views(batch: Batch, num: int, change: float) -> Batch:
    """Repeat each clip `num` times, with the inputs of view v shifted by v * change."""
    inputs = {
        m: torch.cat([row + v * change for row in x.split(1) for v in range(num)]) for m, x in batch.inputs.items()
    }
    return replace(
        batch,
        keys=[key for key in batch.keys for _ in range(num)],
        present_BM=batch.present_BM.repeat_interleave(num, 0),
        inputs=inputs,
        labels={head: values.repeat_interleave(num) for head, values in batch.labels.items()},
        valid_B=batch.valid_B.repeat_interleave(num),
    )


def predict(batches: list[Batch], num_views: int) -> tuple[Predictions, list[dict]]:
    collector = PredictionCollector(MODALITIES, CONDITIONS)
    results = evaluate(
        Fusion(), batches, CONDITIONS, device="cpu", num_views=num_views, predictions=collector
    )
    return collector.finish(), results.rows


@pytest.mark.parametrize("num", [2, 3, 6])
def test_the_prediction_is_the_mean_of_the_views_softmaxes(num: int):
    batches = make_batches(num=20)
    together, _ = predict([with_views(batch, num, 0.125) for batch in batches], num)
    alone = []
    for view in range(num):
        moved = [replace(b, inputs={m: x + view * 0.125 for m, x in b.inputs.items()}) for b in batches]
        alone.append(predict(moved, 1)[0])
    for head in HEADS:
        mean = np.mean([np.exp(one.log_probs[head].astype(np.float64)) for one in alone], axis=0)
        assert np.exp(together.log_probs[head]) == pytest.approx(mean, rel=1e-5, abs=1e-12)
    assert (together.prediction_NK == alone[0].prediction_NK).all()


def test_equal_views_equal_one_view_exactly():
    batches = make_batches(num=30)
    one, expected = predict(batches, 1)
    for num in (2, 3, 10):
        many, rows = predict([with_views(batch, num, 0.0) for batch in batches], num)
        assert flat(rows) == but_for_rounding(expected)
        for head in HEADS:
            np.testing.assert_allclose(many.log_probs[head], one.log_probs[head], rtol=1e-6)
            log_probs_RC = torch.from_numpy(one.log_probs[head])
            assert torch.equal(mean_over_views(log_probs_RC.repeat_interleave(num, 0), num), log_probs_RC)


def test_each_view_is_encoded_once_under_its_clips_masks():
    batches, model = make_batches(), Fusion()
    evaluate(model, [with_views(b, 3, 0.5) for b in batches], CONDITIONS, device="cpu", num_views=3)
    assert model.num_encoded == {
        m: 3 * sum(int(b.present_BM[:, c].sum()) for b in batches) for c, m in enumerate(MODALITIES)
    }
    assert model.num_fused <= len(batches) * 7


def test_one_view_is_unchanged_bit_for_bit():
    scores = torch.randn(5, 7, dtype=torch.float64).log_softmax(1)
    assert mean_over_views(scores, 1) is scores
    video = VideoInput(num_frames=7, short_side=40, crop=32)
    for wide in (True, False):
        (only,) = evaluation_views(video, 50, ViewsRecipe(), is_wide=wide)
        assert (only.times_F == (np.arange(7) + 0.5) / 7).all()
        assert (only.top, only.left, only.flip) == (0.5, 0.5, False)


@given(st.integers(1, 12), st.integers(1, 20))
def test_samplings_spread_evenly_over_each_segment(temporal: int, num_frames: int):
    video = VideoInput(num_frames=num_frames)
    views = evaluation_views(video, 90, ViewsRecipe(temporal=temporal), is_wide=True)
    times = np.sort(np.concatenate([view.times_F for view in views]))
    np.testing.assert_allclose(np.diff(times), 1 / (temporal * num_frames))
    assert all((np.floor(view.times_F * num_frames) == np.arange(num_frames)).all() for view in views)


@given(st.integers(1, 10), st.integers(1, 200), st.integers(1, 4))
def test_dense_windows_keep_their_stride_from_start_to_end(temporal: int, stored: int, stride: int):
    video = VideoInput(num_frames=8, sampling="dense", stride=stride)
    views = evaluation_views(video, stored, ViewsRecipe(temporal=temporal), is_wide=True)
    frames = [(view.times_F * stored).astype(int) for view in views]
    assert [f[0] for f in frames] == sorted(f[0] for f in frames)
    for of_view in frames:
        assert 0 <= of_view.min() <= of_view.max() < stored
        if stored >= 7 * stride + 1:
            assert (np.diff(of_view) == stride).all()


@given(st.integers(8, 60), st.integers(8, 60), st.integers(1, 8))
def test_three_crops_cover_the_longer_side(width: int, height: int, size: int):
    picture = np.dstack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.uint8)  # (x, y) of each pixel
    views = evaluation_views(VideoInput(), 9, ViewsRecipe(spatial=3), is_wide=width >= height)
    corners = [tuple(_crop(picture, size, view)[0, 0].tolist()) for view in views]
    middle_x, middle_y = (width - size + 1) // 2, (height - size + 1) // 2
    if width >= height:
        assert corners == [(0, middle_y), (middle_x, middle_y), (width - size, middle_y)]
    else:
        assert corners == [(middle_x, 0), (middle_x, middle_y), (middle_x, height - size)]


@settings(max_examples=3, deadline=None)
@given(temporal=st.integers(1, 3), spatial=st.sampled_from([1, 3]))
def test_decoding_all_views_at_once_equals_decoding_each(shards: Path, temporal: int, spatial: int):
    views = ViewsRecipe(temporal=temporal, spatial=spatial)
    clips = clips_of(shards, views)
    (batch,) = evaluation_batches(clips, len(clips.clips))
    taken = dict.fromkeys(clips.data.modalities, 0)
    for number, clip in enumerate(clips.clips):
        metadata = clips.folder.metadata(clip)
        looks = evaluation_views(KITCHEN_INPUTS.video, num_stored_frames(metadata), views, is_wide=is_wide(metadata))
        wanted = [m for m in taken if clip.has(m)]
        for v, look in enumerate(looks):
            assert batch.keys[number * views.num + v] == clip.key
            sample = read_sample(clips.folder, clip, metadata, wanted, KITCHEN_INPUTS, look)
            for name, expected in sample.arrays.items():
                assert (batch.inputs[name][taken[name]].numpy() == expected).all()
                taken[name] += 1


def test_without_views_batches_have_the_evaluation_view(shards: Path):
    clips = clips_of(shards)
    (batch,) = evaluation_batches(clips, len(clips.clips))
    assert batch.keys == [clip.key for clip in clips.clips]
    clip = clips.clips[0]
    view = evaluation_view(KITCHEN_INPUTS.video, num_stored_frames(clips.folder.metadata(clip)))
    wanted = [m for m in clips.data.modalities if clip.has(m)]
    alone = read_sample(clips.folder, clip, clips.folder.metadata(clip), wanted, KITCHEN_INPUTS, view)
    assert all((batch.inputs[m][0].numpy() == array).all() for m, array in alone.arrays.items())


def test_every_member_is_read_once_for_all_views(shards: Path, monkeypatch: pytest.MonkeyPatch):
    clips = clips_of(shards, ViewsRecipe(temporal=2, spatial=3))
    reads: list[tuple[str, str]] = []
    read = type(clips.folder).read
    monkeypatch.setattr(
        type(clips.folder), "read", lambda self, clip, name: reads.append((clip.key, name)) or read(self, clip, name)
    )
    for _ in evaluation_batches(clips, 4):
        pass
    assert len(set(reads)) == len(reads) >= 2 * len(clips.clips)


def test_invalid_views_are_refused():
    assert parse_views("10x3") == ViewsRecipe(temporal=10, spatial=3)
    for text in ("", "3", "0x1", "3x2", "x3", "-1x1", "3x1x1", "1000x1"):
        with pytest.raises(UserError, match="TEMPORALxSPATIAL"):
            parse_views(text)
