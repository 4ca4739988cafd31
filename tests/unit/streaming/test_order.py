"""Tests of the order: the same global batches for any number of ranks, workers and accumulation steps."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.streaming.order import ClipOrder, Position, Schedule, Slice, epoch_order, evaluation_slices

WORLDS = [1, 2, 3, 4, 6, 8, 12, 24]
Batches = dict[tuple[int, int], list[int]]
"""Clip at every place of the global batch, by (epoch, step)."""


def shard_names(sizes: list[int]) -> list[str]:
    """Return each clip's shard, for shards of these sizes."""
    return [f"train-{shard:06d}.tar" for shard, size in enumerate(sizes) for _ in range(size)]


@st.composite
def orders(draw: st.DrawFn) -> ClipOrder:
    """Draw any order over shards of any sizes."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=20))
    lanes = draw(st.integers(0, 4))
    batch_size = max(1, lanes) * draw(st.integers(1, 6))
    window = draw(st.integers(1, 5)) if lanes else 0
    return ClipOrder(shard_names(sizes), batch_size, draw(st.integers(0, 2**40)), lanes, window)


def stream(schedule: Schedule, rank: int, start: Position, epochs: int, workers: int = 0) -> list[Slice]:
    """Return a rank's slices as they arrive: worker w makes every W-th, and the loader takes from each in turn."""
    slices = list(schedule.slices(rank, start, epochs))
    made = [iter(slices[worker :: max(1, workers)]) for worker in range(max(1, workers))]
    return [next(made[number % len(made)]) for number in range(len(slices))]


def global_batches(
    order: ClipOrder, world: int, accumulation: int = 1, workers: int = 0, epochs: int = 2
) -> Batches:
    """Return the batches of all ranks together and check that every place comes exactly once."""
    schedule = Schedule(order.num_clips, order.batch_size, world, accumulation)
    ranks = [stream(schedule, rank, Position(0, 0), epochs, workers) for rank in range(world)]
    assert {len(slices) for slices in ranks} == {epochs * schedule.steps_per_epoch * accumulation}
    clips = [order.clips(epoch) for epoch in range(epochs)]
    batches: dict[tuple[int, int], dict[int, int]] = {}
    for part in itertools.chain.from_iterable(ranks):
        batch = batches.setdefault((part.epoch, part.step), {})
        for place in range(part.start, part.stop):
            assert place not in batch
            batch[place] = int(clips[part.epoch][place])
    for (_, step), batch in batches.items():
        assert sorted(batch) == list(range(step * order.batch_size, (step + 1) * order.batch_size))
    return {position: [batch[place] for place in sorted(batch)] for position, batch in sorted(batches.items())}


@given(orders(), st.integers(0, 50))
def test_an_epoch_holds_every_clip_once(order: ClipOrder, epoch: int) -> None:
    assert sorted(order.clips(epoch)) == list(range(order.num_clips))


@pytest.mark.parametrize(
    ("num_clips", "seed", "epoch", "digest"),
    [
        (1, 0, 0, "af5570f5a1810b7a"),
        (30, 3, 0, "a7e1e7d604382b00"),
        (1000, 5, 7, "40516925dd3d0785"),
        (67217, 0, 0, "f67ba03dcc17b341"),
        (67217, 2**61, 99, "9d19150f50146a44"),
    ],
)
def test_the_default_order_never_changes(num_clips: int, seed: int, epoch: int, digest: str) -> None:
    order = ClipOrder(shard_names([num_clips]), batch_size=1, seed=seed)
    for clips in (epoch_order(num_clips, seed, epoch), order.clips(epoch)):
        assert hashlib.sha256(clips.astype("<i8").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("lanes", "window"), [(0, 0), (1, 1), (4, 2), (4, 99)])
def test_epochs_and_seeds_give_different_orders(lanes: int, window: int) -> None:
    names = shard_names([10] * 10)
    clip_orders = [
        tuple(ClipOrder(names, 8, seed, lanes, window).clips(epoch)) for seed in range(3) for epoch in range(3)
    ]
    assert len(set(clip_orders)) == len(clip_orders)


@pytest.mark.parametrize(("lanes", "window"), [(0, 0), (1, 3), (4, 1), (12, 2)])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", WORLDS)
def test_global_batches_are_equal_for_any_ranks_and_workers(
    world: int, workers: int, lanes: int, window: int
) -> None:
    order = ClipOrder(shard_names([13, 40, 1, 27, 40, 40, 5]), 24, seed=2, lanes=lanes, window=window)
    one_rank = global_batches(order, world=1)
    assert global_batches(order, world, workers=workers) == one_rank
    for epoch in range(2):
        taken = [clip for (e, _), batch in one_rank.items() if e == epoch for clip in batch]
        assert len(taken) == len(set(taken)) == order.num_clips - order.num_clips % 24


@pytest.mark.parametrize(("lanes", "window"), [(0, 0), (4, 1)])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 24), (2, 3), (3, 8), (4, 6), (6, 2), (12, 2)])
def test_global_batches_are_the_same_for_any_accumulation(
    world: int, accumulation: int, lanes: int, window: int
) -> None:
    order = ClipOrder(shard_names([30] * 4), 24, seed=2, lanes=lanes, window=window)
    assert global_batches(order, world, accumulation) == global_batches(order, world=1)


@given(order_seed=st.integers(0, 99), lanes=st.sampled_from([0, 1, 8]), data=st.data())
def test_changing_world_sizes_keeps_the_global_batches(order_seed: int, lanes: int, data: st.DataObject) -> None:
    """Interrupt twice at arbitrary steps (8, 3, 8 ranks): no clip is lost or repeated, all are in the same batches."""
    order = ClipOrder(shard_names([17] * 11), 24, order_seed, lanes, window=2 if lanes else 0)
    per_epoch, epochs = order.steps, 3
    stops = sorted(data.draw(st.lists(st.integers(0, per_epoch * epochs), min_size=2, max_size=2), label="stops"))
    batches: dict[tuple[int, int], list[int]] = {}
    for world, first, stop in zip((8, 3, 8), (0, *stops), (*stops, per_epoch * epochs), strict=True):
        schedule = Schedule(order.num_clips, 24, world)
        for rank in range(world):
            slices = schedule.slices(rank, Position(*divmod(first, per_epoch)), epochs)
            for part in itertools.islice(slices, stop - first):
                clips = order.clips(part.epoch)[part.start : part.stop]
                batches.setdefault((part.epoch, part.step), []).extend(int(clip) for clip in clips)
    assert batches == global_batches(order, world=8, epochs=epochs)


def shards_by_node(
    names: list[str], order: ClipOrder, epoch: int, nodes: int, ranks_per_node: int, accumulation: int
) -> Iterator[set[str]]:
    """Yield the shards that each node's ranks read in an epoch, including replacements in the same lane."""
    schedule = Schedule(order.num_clips, order.batch_size, nodes * ranks_per_node, accumulation)
    clips = order.clips(epoch)
    for node in range(nodes):
        ranks = range(node * ranks_per_node, (node + 1) * ranks_per_node)
        places = [
            place
            for rank in ranks
            for part in schedule.slices(rank, Position(epoch, 0), epoch + 1)
            for place in range(part.start, part.stop)
        ]
        tried = {other for place in places for other in itertools.islice(order.candidates(place), order.steps)}
        assert tried == set(places)
        yield {names[clips[place]] for place in places}


@pytest.mark.parametrize(("ranks_per_node", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 1)])
@pytest.mark.parametrize(("nodes", "lanes"), [(1, 1), (2, 2), (2, 4), (3, 3), (3, 6), (4, 4)])
def test_neighbouring_nodes_share_at_most_one_shard(
    nodes: int, lanes: int, ranks_per_node: int, accumulation: int
) -> None:
    names = shard_names([20, 33, 7, 50, 12, 20, 20, 41, 20, 3, 20, 20, 60, 20, 20, 20])
    order = ClipOrder(names, 96, seed=1, lanes=lanes, window=2)
    for epoch in range(3):
        touched = list(shards_by_node(names, order, epoch, nodes, ranks_per_node, accumulation))
        for one, other in itertools.combinations(range(nodes), 2):
            assert len(touched[one] & touched[other]) <= (1 if other == one + 1 else 0)


def test_nodes_read_different_shards_in_the_next_epoch() -> None:
    names = shard_names([24] * 40)
    order = ClipOrder(names, 24, seed=1, lanes=4, window=1)
    per_epoch = [list(shards_by_node(names, order, epoch, 4, 1, 1)) for epoch in range(20)]
    for node in range(4):
        assert len(set.union(*(touched[node] for touched in per_epoch))) == 40
        assert all(len(touched[node]) <= 11 for touched in per_epoch)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**40))
def test_a_lane_needs_at_most_two_windows_of_shards(window: int, lanes: int, seed: int) -> None:
    """Check that a cache of that size never fetches a shard twice in a lane and holds all shards of a step."""
    names = shard_names([32] * 30)
    order = ClipOrder(names, lanes * 8, seed, lanes, window)
    shards = np.array(names)[order.clips(0)[: order.steps * lanes * 8]].reshape(order.steps, lanes, 8)
    for lane in range(lanes):
        steps = [set(row) for row in shards[:, lane].tolist()]
        for step, now in enumerate(steps):
            before, after = set().union(*steps[:step]), set().union(*steps[step + 1 :])
            assert len(now | (before & after)) <= 2 * window


def test_one_lane_with_a_full_window_mixes_like_a_permutation() -> None:
    """Check the chance that two clips of one shard share a batch: (B - 1) / (n - 1), within 5 standard errors."""
    order = ClipOrder(shard_names([10] * 6), 6, seed=4, lanes=1, window=6)
    together = 0
    for epoch in range(4000):
        step_of_clip = np.argsort(order.clips(epoch)) // 6
        together += int(step_of_clip[0] == step_of_clip[1])
    chance = 5 / 59
    assert abs(together - 4000 * chance) < 5 * np.sqrt(4000 * chance * (1 - chance))


@pytest.mark.parametrize(("lanes", "window"), [(0, 0), (3, 1)])
def test_every_clip_is_dropped_equally_often_for_any_shard_size(lanes: int, window: int) -> None:
    order = ClipOrder(shard_names([3, 40, 10, 6]), 12, seed=4, lanes=lanes, window=window)
    assert order.num_clips % 12 == 11
    left_out = Counter(int(clip) for epoch in range(2000) for clip in order.clips(epoch)[-11:])
    chance = 11 / 59
    tolerance = 5 * np.sqrt(2000 * chance * (1 - chance))
    assert all(abs(left_out[clip] - 2000 * chance) < tolerance for clip in range(59))


@given(orders(), st.data())
def test_candidates_of_a_place_cover_every_clip_once(order: ClipOrder, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, order.num_clips - 1), label="place")
    candidates = list(order.candidates(place))
    assert candidates[0] == place
    assert sorted(candidates) == list(range(order.num_clips))


@given(orders(), st.data())
def test_places_of_a_batch_share_no_replacement_within_columns(
    order: ClipOrder, data: st.DataObject
) -> None:
    if order.steps:
        step = data.draw(st.integers(0, order.steps - 1), label="step")
        places = range(step * order.batch_size, (step + 1) * order.batch_size)
        tried = [other for place in places for other in itertools.islice(order.candidates(place), order.steps)]
        assert len(set(tried)) == len(tried)


def test_replacements_in_lanes_are_near_but_leave_lost_shards() -> None:
    names = shard_names([500] * 20)
    order = ClipOrder(names, 4, seed=0, lanes=4, window=1)
    clips = order.clips(0)
    for place in (0, 5000, order.steps * 4 - 1):
        tried = list(itertools.islice(order.candidates(place), 20))
        assert abs(tried[1] - place) == 4
        lost = names[clips[place]]
        elsewhere = next(number for number, other in enumerate(tried) if names[clips[other]] != lost)
        assert elsewhere <= 11


def test_lanes_that_do_not_divide_the_batch_are_refused() -> None:
    names = shard_names([100])
    with pytest.raises(UserError, match=r"lanes 5 .*batch_size 96 \(96 = 19 x 5 \+ 1\); the nearest .* is 4$"):
        ClipOrder(names, 96, seed=0, lanes=5, window=1)
    with pytest.raises(UserError, match=r"lanes 200 .* the nearest that does is 96$"):
        ClipOrder(names, 96, seed=0, lanes=200, window=1)


@given(st.integers(0, 2), st.integers(0, 3))
def test_resuming_is_a_seek(epoch: int, step: int) -> None:
    schedule = Schedule(num_clips=40, batch_size=8, world_size=2)
    everything = list(schedule.slices(1, Position(0, 0), epochs=3))
    resumed = list(schedule.slices(1, Position(epoch, step), epochs=3))
    assert resumed == everything[epoch * 5 + step :]


def test_an_indivisible_or_too_large_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 32 .* 3 ranks x 2 accumulation .*= 5 x 6 \+ 2\).* 30 or 36 .*=30"):
        Schedule(num_clips=100, batch_size=32, world_size=3, accumulation=2)
    with pytest.raises(UserError, match="7 training clips are fewer than one batch"):
        Schedule(num_clips=7, batch_size=8)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_gives_each_clip_once_and_equal_steps(clips: int, batch: int, world: int) -> None:
    ranks = [list(evaluation_slices(clips, batch, rank, world)) for rank in range(world)]
    places = [place for slices in ranks for part in slices for place in range(part.start, part.stop)]
    assert sorted(place for place in places if place < clips) == list(range(clips))
    assert len({len(slices) for slices in ranks}) == 1
    assert all(part.stop - part.start == batch for slices in ranks for part in slices)
