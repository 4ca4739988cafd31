"""One order for everyone: the same global batches for any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.recipe import ModalityDropout
from karmma_dist.streaming.dropout import keep_patterns, keep_present
from karmma_dist.streaming.order import Position, Schedule, epoch_order, evaluation_slices


@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_holds_every_clip_once(num_clips: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_clips, seed, epoch)) == list(range(num_clips))


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = [tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size: int, accumulation: int) -> None:
    schedule = Schedule(num_clips=100, batch_size=24, world_size=world_size, accumulation=accumulation)
    ranks = [list(schedule.slices(rank, Position(0, 0), epochs=2)) for rank in range(world_size)]
    assert len({len(slices) for slices in ranks}) == 1
    for epoch, step in itertools.product(range(2), range(4)):
        places = sorted(
            place
            for slices in ranks
            for part in slices
            if (part.epoch, part.step) == (epoch, step)
            for place in range(part.start, part.stop)
        )
        assert places == list(range(step * 24, step * 24 + 24))
    assert schedule.dropped_clips == 4


@given(st.integers(0, 2), st.integers(0, 3))
def test_resuming_is_a_seek(epoch: int, step: int) -> None:
    schedule = Schedule(num_clips=40, batch_size=8, world_size=2)
    everything = list(schedule.slices(1, Position(0, 0), epochs=3))
    resumed = list(schedule.slices(1, Position(epoch, step), epochs=3))
    assert resumed == everything[epoch * 5 + step :]


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(UserError, match=r"batch_size 32 .* 3 ranks x 2 accumulation .* = 6 .* nearest .* is 30"):
        Schedule(num_clips=100, batch_size=32, world_size=3, accumulation=2)
    with pytest.raises(UserError, match="7 training clips are fewer than one batch"):
        Schedule(num_clips=7, batch_size=8)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_gives_every_clip_to_one_rank_and_equal_steps_to_all(clips: int, batch: int, world: int) -> None:
    ranks = [list(evaluation_slices(clips, batch, rank, world)) for rank in range(world)]
    places = [place for slices in ranks for part in slices for place in range(part.start, part.stop)]
    assert sorted(place for place in places if place < clips) == list(range(clips))
    assert len({len(slices) for slices in ranks}) == 1
    assert all(part.stop - part.start == batch for slices in ranks for part in slices)


@given(st.integers(1, 3), st.integers(0, 1000))
def test_stratified_dropout_at_one_half_holds_each_pattern_once_in_every_run(modalities: int, seed: int) -> None:
    dropout = ModalityDropout(probability=0.5, draw="stratified")
    patterns = keep_patterns(2**modalities * 5, modalities, dropout, seed, epoch=1)
    for run in patterns.reshape(5, 2**modalities, modalities):
        assert len({tuple(pattern) for pattern in run}) == 2**modalities


@pytest.mark.parametrize("draw", ["independent", "stratified"])
@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_each_modality_is_dropped_with_its_probability(draw: str, probability: float) -> None:
    dropout = ModalityDropout.model_validate({"probability": probability, "draw": draw})
    kept = np.concatenate([keep_patterns(8_000, 3, dropout, seed=1, epoch=epoch) for epoch in range(5)])
    tolerance = 4 * np.sqrt(probability * (1 - probability) / len(kept))
    assert np.abs(kept.mean(axis=0) - (1 - probability)).max() < tolerance
    pairs = np.array([(kept[:, a] & kept[:, b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
    assert np.abs(pairs - (1 - probability) ** 2).max() < 4 * np.sqrt(0.25 / len(kept))


def test_an_empty_pattern_keeps_one_modality_that_is_there_each_equally_often() -> None:
    present = np.array([True, False, True])
    chosen = [keep_present(np.zeros(3, dtype=bool), present, word) for word in range(1000)]
    assert all(kept.sum() == 1 and not kept[1] for kept in chosen)
    assert sum(kept[0] for kept in chosen) == 500


def test_without_dropout_everything_is_kept() -> None:
    assert keep_patterns(10, 3, ModalityDropout(), seed=0, epoch=0).all()
