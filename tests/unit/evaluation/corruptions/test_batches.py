"""Broken sensors work together with views, predictions and comparisons of models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.corruptions.kinds import parse_corruption
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.exports.predictions import PredictionCollector, Predictions
from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.report.sections import differences
from karmma_dist.evaluation.statistics.bootstrap import add_intervals
from karmma_dist.evaluation.statistics.compare import compare
from karmma_dist.modalities import MODALITIES as ALL
from karmma_dist.recipe import ViewsRecipe
from karmma_dist.streaming.batch import Batch, Sample, collate
from karmma_dist.streaming.loader import evaluation_batches
from kits.evaluation import KITCHEN_INPUTS, clips_of, flat
from kits.sensors import (
    EVERY,
    HEADS,
    MODALITIES,
    SENSORS,
    Average,
    conditions_for,
    make_batches,
    sample,
    windows_of,
)

NUM_VIEWS = 2


class Unsure(Average):
    """A model that gives every class some probability, so that every view influences the mean."""

    def __init__(self, scale: float = 0.02) -> None:
        super().__init__()
        self.scale = scale

    def fuse(self, tokens: dict[str, Tensor], present_BM: Tensor, keep_BM: Tensor) -> dict[str, Tensor]:
        return {head: self.scale * logits_BC for head, logits_BC in super().fuse(tokens, present_BM, keep_BM).items()}


def look(number: int, view: int) -> Sample:
    """Return inputs with other frames and boxes in every view, and the same audio cut at other moments."""
    lacking = MODALITIES[number % 5] if number % 5 < 4 else None
    has = [name for name in MODALITIES if name != lacking]
    seen, heard = sample(number + 100 * view, has), sample(number, has)
    arrays, signals = dict(seen.arrays), dict(heard.uncut)
    for sound in signals.values():
        moved = replace(sound, view=replace(sound.view, times_F=sound.view.times_F + 0.06 * view))
        signals["audio"], arrays["audio"] = moved, windows_of(moved)
    return replace(heard, arrays=arrays, uncut=signals)


def batches_of(views: list[int], num: int = 10) -> list[Batch]:
    """Return batches of four clips, the last one padded, with one row per clip and view."""
    rows = [[look(number, view) for view in views] for number in range(num)]
    padding = [[None] * len(views)] * (-num % 4)
    clips: list[list[Sample | None]] = [*rows, *padding]  # type: ignore[list-item]
    return [
        collate([row for rows in clips[first : first + 4] for row in rows], MODALITIES, list(HEADS))
        for first in range(0, num, 4)
    ]


def predictions_of(batches: list[Batch]) -> Predictions:
    """Return the predictions for prepared batches with everything present."""
    condition = [Condition(tuple(MODALITIES))]
    collector = PredictionCollector(MODALITIES, condition)
    evaluate(Unsure(), batches, condition, device="cpu", predictions=collector)
    return collector.finish()


def test_figures_of_a_broken_sensor_average_its_broken_views():
    conditions = conditions_for(*EVERY)
    batches = batches_of(list(range(NUM_VIEWS)))
    results = evaluate(Unsure(), batches, conditions, device="cpu", num_views=NUM_VIEWS, sensors=SENSORS)
    for condition, row in zip(conditions[1:], results.rows[1:], strict=True):
        assert condition.corrupt is not None
        corruption = parse_corruption(condition.corrupt)
        alone = []
        for view in range(NUM_VIEWS):
            batches = batches_of([view])
            broken = [SENSORS.broken(batch, SENSORS.intact(batch), corruption, condition.seed) for batch in batches]
            alone.append(predictions_of(broken))
        for head in HEADS:
            of_views = np.stack([one.log_probs[head] for one in alone]).astype(np.float64)
            mean_NC = np.logaddexp.reduce(of_views) - np.log(NUM_VIEWS)
            labels_N = alone[0].labels[head]
            losses_N = -np.take_along_axis(mean_NC, labels_N[:, None], axis=1)
            assert row.figures[f"{head}_loss"] == pytest.approx(losses_N.mean(), rel=1e-5)
            assert row.figures[f"{head}_top1"] == pytest.approx(100 * (mean_NC.argmax(axis=1) == labels_N).mean())
    losses = [row.figures["verb_loss"] for row in results.rows]
    assert all(loss != losses[0] for loss in losses[1:])


def test_only_the_broken_sensors_views_are_encoded_again():
    model, batches = Unsure(), batches_of([0, 1, 2])
    conditions = conditions_for("video:blur:1", "audio:mute:2", subsets=True)
    evaluate(model, batches, conditions, device="cpu", num_views=3, sensors=SENSORS)
    present = {m: sum(int(batch.present_BM[:, c].sum()) for batch in batches) for c, m in enumerate(MODALITIES)}
    times = {"video": 2, "flow": 1, "audio": 2, "detections": 1}
    assert model.num_encoded == {name: times[name] * num for name, num in present.items()}


@pytest.mark.parametrize("num_views", [1, NUM_VIEWS])
def test_predictions_are_made_with_intact_sensors_only(num_views: int):
    intact = conditions_for(subsets=True, drop_prob=0.3, num_seeds=2)
    every = conditions_for(*EVERY, subsets=True, drop_prob=0.3, num_seeds=2)
    made, rows = [], []
    for conditions in (intact, every):
        collector = PredictionCollector(MODALITIES, intact)
        results = evaluate(
            Unsure(), batches_of(list(range(num_views))), conditions, device="cpu",
            num_views=num_views, predictions=collector, sensors=SENSORS,
        )  # fmt: skip
        made.append(collector.finish())
        rows.append(results.rows)
    expected, actual = made
    assert actual.keys == expected.keys
    for name in ("present_NM", "prediction_NK", "clip_R", "mask_R"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name))
    for head in HEADS:
        assert np.array_equal(actual.log_probs[head], expected.log_probs[head])
    assert rows[1][: len(intact)] == rows[0]
    assert len(rows[1]) == len(every) > len(intact)


def test_models_are_paired_per_corruption_and_averaged_with_intact_sensors():
    broken = conditions_for("audio:mute:3", "camera:black:5", subsets=True, sweep=True)
    intact = [condition for condition in broken if condition.corrupt is None]
    actual = []
    for conditions in (intact, broken):
        models = {
            name: add_intervals(
                evaluate(Unsure(scale), make_batches(30), conditions, device="cpu", sensors=SENSORS), num_draws=50
            )
            for name, scale in (("straight", 0.02), ("upside down", -0.02))
        }
        actual.append((models, compare(models, num_draws=50)))
    (plain, expected), (models, comparison) = actual
    (pair,), (expected_pair,) = comparison.pairs, expected.pairs
    for key in ("subset_average", "drop_curve_area"):  # equal up to the order of summation
        assert pair.test(key) is not None
        assert flat(pair.test(key)) == pytest.approx(flat(expected_pair.test(key)))
    for name, with_broken in models.items():
        assert flat(with_broken.summary) == pytest.approx(flat(plain[name].summary))
    assert comparison.average_rank == expected.average_rank
    assert [test.corrupt for test in pair.conditions] == [condition.corrupt for condition in broken]
    first, second = models.values()
    for test, one, other in zip(pair.conditions, first.rows, second.rows, strict=True):
        assert test.difference == pytest.approx(other.figures["action_top1"] - one.figures["action_top1"])
    lines = "".join(map(markdown.section, differences(comparison))).splitlines()
    assert sum(line.startswith("| V+F+A+D camera:black:5 | 0 |") for line in lines) == 1
    assert sum(line.startswith("| V+F+A+D | 0 |") for line in lines) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_view_has_the_full_audio_and_its_own_cuts(shards: Path, num_workers: int):
    clips = clips_of(shards, ViewsRecipe(temporal=2, spatial=3))
    clips.data = clips.data.model_copy(update={"num_workers": num_workers})
    clips.uncut = ["audio"]
    with evaluation_batches(clips, 4) as batches:
        for batch in batches:
            present = batch.present_BM[:, clips.data.modalities.index("audio")].tolist()
            keys = [key for key, has in zip(batch.keys, present, strict=True) if has]
            sounds = batch.uncut["audio"]
            for sound, windows in zip(sounds, batch.inputs["audio"], strict=True):
                cut = sound.cut(ALL["audio"].decoder, KITCHEN_INPUTS.audio)
                assert torch.equal(torch.from_numpy(cut), windows)
            # A clip has one copy of its samples, whatever the number of views.
            assert len({id(sound.decoded) for sound in sounds}) == len(set(keys))
            moments = {tuple(sound.view.times_F.tolist()) for sound in sounds[:6]}
            assert len(moments) == 2
