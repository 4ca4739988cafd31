"""The order of a mixture: exact shares, every clip once per pass, and no batch with a clip twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.streaming.order import ClipOrder, MixtureOrder, divided

EPOCHS = 4


@dataclass
class Case:
    """Sizes and weights of datasets, and their order."""

    sizes: list[int]
    weights: list[float]
    order: MixtureOrder

    @property
    def dataset_of(self) -> np.ndarray:
        """Dataset of each clip."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)


def make_order(sizes: list[int], weights: list[float], batch_size: int, seed: int = 0) -> MixtureOrder:
    names = [f"d{number}" for number in range(len(sizes))]
    return MixtureOrder(
        dict(zip(names, sizes, strict=True)), dict(zip(names, weights, strict=True)), batch_size, seed
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw any mixture that is not refused."""
    pairs = st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.5, 1, 2, 7]))
    datasets = draw(st.lists(pairs, min_size=1, max_size=5))
    sizes, weights = [size for size, _ in datasets], [float(weight) for _, weight in datasets]
    try:
        return Case(sizes, weights, make_order(sizes, weights, draw(st.integers(1, 10)), draw(st.integers(0, 2**40))))
    except UserError:
        reject()


@given(cases())
def test_every_epoch_has_each_datasets_exact_share(case: Case) -> None:
    order, whole = case.order, sum(case.weights)
    counts = list(order.counts.values())
    assert sum(counts) == order.num_places == sum(case.sizes) // order.batch_size * order.batch_size
    for count, weight in zip(counts, case.weights, strict=True):
        assert abs(count - order.num_places * weight / whole) < 1
    for epoch in range(EPOCHS):
        drawn = case.dataset_of[order.draw(epoch).clip_at]
        assert np.bincount(drawn, minlength=len(counts)).tolist() == counts


@given(cases())
def test_batches_hold_nearly_the_weighted_share(case: Case) -> None:
    order = case.order
    datasets = case.dataset_of[order.draw(0).clip_at].reshape(-1, order.batch_size)
    for number, count in enumerate(order.counts.values()):
        share = count * order.batch_size / order.num_places
        assert (abs((datasets == number).sum(axis=1) - share) < (1 if len(case.sizes) <= 2 else 3)).all()


@given(cases())
def test_every_clip_comes_once_before_any_comes_again(case: Case) -> None:
    """Check the passes across the borders of epochs, and that each pass has a view of its own."""
    epochs = [case.order.draw(epoch) for epoch in range(EPOCHS)]
    clips, views = (np.concatenate(arrays) for arrays in zip(*epochs, strict=True))
    for number, size in enumerate(case.sizes):
        own = case.dataset_of[clips] == number
        stream, passes = clips[own], views[own]
        assert (passes == np.arange(len(stream)) // size).all()
        for begin in range(0, len(stream) - size + 1, size):
            assert len(set(stream[begin : begin + size].tolist())) == size


@given(cases(), st.integers(0, 9))
def test_no_batch_holds_a_clip_twice_even_where_clips_are_replaced(case: Case, epoch: int) -> None:
    order, drawn = case.order, case.order.draw(epoch)
    for begin in range(0, order.num_places, order.batch_size):
        choices = [list(order.choices(drawn, place)) for place in range(begin, begin + order.batch_size)]
        tried = [choice.clip for each in choices for choice in each]
        assert len(set(tried)) == len(tried)
        for place, each in enumerate(choices, begin):
            assert each[0] == (drawn.clip_at[place], drawn.view_at[place])
            assert len({int(case.dataset_of[choice.clip]) for choice in each}) == 1
            assert len(each) > 1


@given(st.integers(2, 60), st.integers(0, 2**40), st.integers(0, 20))
def test_a_mixture_of_one_dataset_is_that_dataset(steps: int, seed: int, epoch: int) -> None:
    mixed = make_order([3 * steps], [0.5], 3, seed).draw(epoch)
    alone = ClipOrder(["a.tar"] * (3 * steps), 3, seed).draw(epoch)
    assert (mixed.clip_at == alone.clip_at).all()
    assert (mixed.view_at == alone.view_at).all()


def test_the_order_of_a_mixture_never_changes() -> None:
    order = make_order([67_217, 1_000, 30], [3, 1, 0.01], 32, seed=5)
    digest = hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in order.draw(7))).hexdigest()
    assert digest[:16] == "9a19f71f5bfed689"


def test_epochs_seeds_and_datasets_have_different_orders() -> None:
    """Check it with two datasets of the same size."""
    drawn = [make_order([60, 60], [1, 1], 6, seed).draw(epoch).clip_at for seed in range(3) for epoch in range(3)]
    orders = [tuple(clips[clips < 60]) for clips in drawn] + [tuple(clips[clips >= 60] - 60) for clips in drawn]
    assert len(set(orders)) == len(orders)


@given(st.integers(0, 10_000), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8))
def test_a_number_is_divided_by_largest_remainder(num: int, weights: list[float]) -> None:
    parts = divided(num, weights)
    assert sum(parts) == num
    left = [num * weight / sum(weights) - part for weight, part in zip(weights, parts, strict=True)]
    assert max(left) - min(left) <= 1 + 1e-6


def test_clips_change_places_only_where_a_pass_begins_in_a_batch() -> None:
    """Count how often a clip has each place of a pass: no place is preferred, also next to the border of passes."""
    order = make_order([10, 10], [1, 1], 8, seed=1)
    clips = np.concatenate([order.draw(epoch).clip_at for epoch in range(2000)])
    places = Counter(int(place) for place in np.flatnonzero(clips[clips < 10] == 0) % 10)
    expected = len(clips) / 2 / 100
    assert all(abs(places[place] - expected) < 5 * np.sqrt(expected) for place in range(10))


def test_mixtures_that_cannot_be_are_refused() -> None:
    refused = {
        r"data\.mixture: 7 training clips are fewer than one batch: lower .* \(8\) to 7": ([4, 3], [1, 1], 8),
        r"data\.mixture\.d1: weight 0\.0001 gives it none of the 200 clips": ([190, 10], [1, 0.0001], 8),
        r"data\.mixture\.d1: 5 training clips are too few for up to 4 in a batch of 8: .* 8, so": ([95, 5], [1, 1], 8),
    }
    for message, arguments in refused.items():
        with pytest.raises(UserError, match=message) as caught:
            make_order(*arguments)
        assert "\n" not in str(caught.value)
