"""The order of clips in an epoch: one order for all ranks, workers and world sizes.

`ClipOrder` assigns a clip to every place of an epoch. Optimizer step k takes the k-th slice of `batch_size` places
(the global batch); each rank takes one contiguous part of the slice, divided into one piece per accumulation step. A
position is just (epoch, step), so every rank takes the same number of steps and resuming is a seek.

By default the order is one permutation of all clips: every batch comes from as many shards as it has clips, which
costs nothing if reads at any offset are cheap. If a whole shard is fetched before its first clip (object stores),
`lanes` and `window` keep reads together:

    places of a batch    | lane 0 | lane 1 | lane 2 | lane 3 |      lane l: places [l*B/L, (l+1)*B/L) of every batch
    ranks                | node 0: 8 ranks | node 1: 8 ranks |      a node's ranks hold whole lanes
    shards of an epoch   | 7 2 9 | 4 0 8 | 1 11 3 | 6 5 10 |        permuted, cut into lanes, mixed `window` at a time

With as many `lanes` as nodes (or a multiple), each node reads its own part of the shards, once per epoch, for any
number of ranks per node and accumulation steps; a shard on a lane's border is read by both lanes. Shards are permuted
anew each epoch, so every node sees all of them over time. `tests/benchmarks/order_mixing.py` measures the choices.

`MixtureOrder` does the same for several datasets, each with a fixed share of the places. A dataset is a stream of
passes over its clips, each permuted anew, which goes on from epoch to epoch:

    places of an epoch   | a a b a | a a b a | a a b a |      weights 3 and 1: places of b as even as possible
    clips of dataset a   | 4 0 2 5 1 3 | 2 4 0 . .             each once before any comes again
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.recipe.micro_batches import indivisible
from karmma_dist.seeding import order_words, pass_words


def epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `range(num_clips)`, int64."""
    return np.argsort(order_words(num_clips, seed, epoch), kind="stable")


class EpochOrder(NamedTuple):
    """The clips of an epoch."""

    clip_at: np.ndarray
    """Number of the clip at each place, int64."""
    view_at: np.ndarray
    """Number of the view of that clip, int64: the epoch, or the pass over its dataset."""


class Choice(NamedTuple):
    """A clip that may be used for a place."""

    clip: int
    """Number of the clip."""
    view: int
    """Number of its view."""


class ClipOrder:
    """The assignment of clips to the places of an epoch: a function of the arguments and the epoch alone.

    Args:
        shards: Each clip's shard, in the order of clip numbers.
        batch_size: Clips per optimizer step, over all ranks.
        seed: Seed of the run.
        lanes: Number of parts of a batch that read different shards; 0 for one permutation of all clips.
        window: Number of a lane's shards whose clips are mixed; only used with lanes.

    Raises:
        UserError: the number of lanes does not divide the batch size.
    """

    def __init__(self, shards: Sequence[str], batch_size: int, seed: int, lanes: int = 0, window: int = 0) -> None:
        if lanes and batch_size % lanes:
            nearest = min((d for d in range(1, batch_size + 1) if batch_size % d == 0), key=lambda d: abs(d - lanes))
            raise UserError(
                f"data.order.lanes {lanes} does not divide training.batch_size {batch_size} ({batch_size} = "
                f"{batch_size // lanes} x {lanes} + {batch_size % lanes}); the nearest that does is {nearest}"
            )
        assert not lanes or window > 0, "lanes without a window"
        numbers: dict[str, int] = {}
        self._shard_of_clip = np.array([numbers.setdefault(shard, len(numbers)) for shard in shards], dtype=np.int64)
        self.batch_size, self.seed, self.lanes, self.window = batch_size, seed, lanes, window
        self.num_clips, self.steps = len(shards), len(shards) // batch_size

    @property
    def num_places(self) -> int:
        """Number of places of an epoch."""
        return self.num_clips

    def draw(self, epoch: int) -> EpochOrder:
        """Return the clips of an epoch: each once, with the epoch's view."""
        return EpochOrder(self.clips(epoch), np.broadcast_to(np.int64(epoch), self.num_clips))

    def choices(self, drawn: EpochOrder, place: int) -> Iterator[Choice]:
        """Yield the clips that may be used for `place` in an epoch: its own, then its replacements; see `candidates`.
        """
        return (Choice(int(drawn.clip_at[each]), int(drawn.view_at[each])) for each in self.candidates(place))

    def clips(self, epoch: int) -> np.ndarray:
        """Return the clip number at every place, int64: a permutation. No step takes the last `num_clips % batch_size`.
        """
        if not self.lanes:
            return epoch_order(self.num_clips, self.seed, epoch)
        return self._laned_order(epoch)

    def _laned_order(self, epoch: int) -> np.ndarray:
        """Permute shards, drop random clips as the tail, cut into lanes, mix each lane's windows, deal to batches.

        Clips are mixed by separate words: in a shard on a lane's border, `clip_words` already decide the side.
        """
        num, taken = self.num_clips, self.steps * self.batch_size
        num_shards = int(self._shard_of_clip.max(initial=-1)) + 1
        words = order_words(num_shards + 2 * num, self.seed, epoch)
        shard_words, clip_words, mix_words = np.split(words, [num_shards, num_shards + num])
        turn = np.empty(num_shards, dtype=np.int64)
        turn[np.argsort(shard_words, kind="stable")] = np.arange(num_shards)
        by_word = np.argsort(clip_words, kind="stable")
        dropped, kept = by_word[: num - taken], by_word[num - taken :]
        sequence = kept[np.argsort(turn[self._shard_of_clip[kept]], kind="stable")]
        turns = turn[self._shard_of_clip[sequence]].reshape(self.lanes, taken // self.lanes)
        group = (turns - turns[:, :1]) // self.window
        lane = np.broadcast_to(np.arange(self.lanes)[:, None], group.shape)
        mixed = sequence[np.lexsort((mix_words[sequence], group.reshape(-1), lane.reshape(-1)))]
        lane_part = self.batch_size // self.lanes
        per_batch = mixed.reshape(self.lanes, self.steps, lane_part).swapaxes(0, 1)  # (step, lane, place of the part)
        return np.concatenate([per_batch.reshape(-1), dropped])

    def candidates(self, place: int) -> Iterator[int]:
        """Yield the places whose clip may be used for `place`: itself, then its replacements while clips are damaged.

        Every place of the epoch comes once. First come the places of the same column (the same place of other
        batches), so that no two places of a batch get the same clip; then clips that no step takes; then all others.
        The walk along the column starts half an epoch later. With lanes that would be another node's shard or one no
        longer in the cache, so the walk starts at the next step with doubling strides: it stays near but soon leaves a
        lost shard.
        """
        yield place
        step, column = divmod(place, self.batch_size)
        if self.lanes:
            strides = [2**power for power in range(self.steps.bit_length())]
            near = [step + stride for stride in strides] + [step - stride for stride in strides]
            walk = [*near, *range(step + 1, self.steps), *range(step, -1, -1)]
        else:
            walk = [(step + self.steps // 2 + further) % self.steps for further in range(self.steps)]
        same_column = (other * self.batch_size + column for other in walk if 0 <= other < self.steps)
        dropped = range(self.steps * self.batch_size + column, self.num_clips, self.batch_size)
        seen = {place}
        for candidate in itertools.chain(same_column, dropped, range(self.num_clips)):
            if candidate not in seen:
                seen.add(candidate)
                yield candidate


class MixtureOrder:
    """The assignment of several datasets' clips to the places of an epoch: a function of the arguments and the epoch.

    Places are divided among the datasets by weight, exactly in every epoch (largest remainder), and spread evenly: the
    j-th of the n places of dataset i of D lies at (j + (i + 1/2) / D) / n of the epoch. So every batch, and every
    rank's part of it, holds a dataset's share but for less than one clip with two datasets, and at most two or three
    with eight. The pattern is that of every epoch; clips are permuted anew in each pass. No batch holds a clip twice:
    where a pass ends within a batch, clips of the next pass that the batch already has change places with later ones.

    Args:
        sizes: Number of clips by dataset; clips are numbered dataset by dataset.
        weights: Weight by dataset.
        batch_size: Clips per optimizer step, over all ranks.
        seed: Seed of the run.

    Raises:
        UserError: all clips are fewer than one batch, or a dataset has no place, or too few clips for its share of a
            batch.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._sizes = list(sizes.values())
        self._first = np.cumsum([0, *self._sizes])
        num_clips = sum(self._sizes)
        self.num_places = num_clips // batch_size * batch_size
        if not self.num_places:
            raise UserError(
                f"data.mixture: {num_clips} training clips are fewer than one batch: lower training.batch_size "
                f"({batch_size}) to {num_clips} or less"
            )
        counts = divided(self.num_places, [weights[name] for name in sizes])
        self._dataset_at = _evenly_spread(counts)
        self._places = [np.flatnonzero(self._dataset_at == number) for number in range(len(counts))]
        self._most = [int(np.bincount(places // batch_size).max(initial=0)) for places in self._places]
        self.counts = dict(zip(sizes, counts, strict=True))
        """Number of places of an epoch by dataset."""
        for number, name in enumerate(sizes):
            self._check(name, number, weights[name])

    def _check(self, name: str, number: int, weight: float) -> None:
        size, most = self._sizes[number], self._most[number]
        if not most:
            raise UserError(
                f"data.mixture.{name}: weight {weight:g} gives it none of the {self.num_places} clips of an epoch: "
                "raise it, or remove the dataset"
            )
        if size < 2 * most:
            raise UserError(
                f"data.mixture.{name}: {size} training clips are too few for up to {most} in a batch of "
                f"{self.batch_size}: it takes twice as many, {2 * most}, so that no batch has a clip twice: lower its "
                "weight or training.batch_size"
            )

    def draw(self, epoch: int) -> EpochOrder:
        """Return the clips of an epoch, and the passes over their datasets that they belong to."""
        clip_at, view_at = np.empty(self.num_places, dtype=np.int64), np.empty(self.num_places, dtype=np.int64)
        for dataset, (size, places) in enumerate(zip(self._sizes, self._places, strict=True)):
            begin = epoch * len(places)
            number, turn = divmod(begin, size)
            passes = range(number, (begin + len(places) - 1) // size + 1)
            stream = np.concatenate([self._clips_of_pass(dataset, each) for each in passes])
            clip_at[places] = stream[turn : turn + len(places)]
            view_at[places] = (begin + np.arange(len(places))) // size
        return EpochOrder(clip_at, view_at)

    def choices(self, drawn: EpochOrder, place: int) -> Iterator[Choice]:
        """Yield the clips that may be used for `place` in an epoch: its own, then replacements of the same dataset.

        The clips that the batch does not have are dealt to the batch's places of that dataset, from half a pass later
        on, so that no two places get the same clip.
        """
        clip, view = int(drawn.clip_at[place]), int(drawn.view_at[place])
        yield Choice(clip, view)
        dataset = self._dataset_at[place]
        begin = place - place % self.batch_size
        own = begin + np.flatnonzero(self._dataset_at[begin : begin + self.batch_size] == dataset)
        clips = self._clips_of_pass(int(dataset), int(drawn.view_at[own[0]]))
        turn = int(np.flatnonzero(clips == drawn.clip_at[own[0]])[0])
        later = np.roll(clips, -(turn + len(clips) // 2))
        others = later[~np.isin(later, drawn.clip_at[own])]
        for other in others[int(np.searchsorted(own, place)) :: len(own)].tolist():
            yield Choice(other, view)

    def _clips_of_pass(self, dataset: int, number: int) -> np.ndarray:
        """Return the clips of a pass in their order, int64, the first ones not those of the batch that it begins in."""
        order = self._permutation(dataset, number)
        before, after = self._in_first_batch(dataset, number)
        if before:
            former = self._permutation(dataset, number - 1)[-before:]  # the end of a pass changes places with none
            middle = order[after : len(order) - self._most[dataset]]
            twice = np.flatnonzero(np.isin(order[:after], former))
            free = after + np.flatnonzero(~np.isin(middle, former))[: len(twice)]
            order[twice], order[free] = order[free], order[twice]
        return self._first[dataset] + order

    def _permutation(self, dataset: int, number: int) -> np.ndarray:
        return np.argsort(pass_words(self._sizes[dataset], self.seed, dataset, number), kind="stable")

    def _in_first_batch(self, dataset: int, number: int) -> tuple[int, int]:
        """Return the numbers of the dataset's places before and after the beginning of a pass in the same batch."""
        places = self._places[dataset]
        turn = number * self._sizes[dataset] % len(places)
        begin = int(places[turn]) // self.batch_size * self.batch_size
        first, last = np.searchsorted(places, [begin, begin + self.batch_size])
        return (turn - int(first), int(last) - turn) if number else (0, 0)


def divided(num: int, weights: Sequence[float]) -> list[int]:
    """Divide a number in proportion to weights: rounded down, the largest remainders first rounded up."""
    exact = [num * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(parts)), key=lambda part: parts[part] - exact[part])
    for part in by_remainder[: num - sum(parts)]:
        parts[part] += 1
    return parts


def _evenly_spread(counts: Sequence[int]) -> np.ndarray:
    """Return a sequence of the numbers 0, 1, ..., each as often as `counts` says, int16. See `MixtureOrder`."""
    phases = (np.arange(len(counts)) + 0.5) / len(counts)
    times = np.concatenate([(np.arange(n) + phase) / n for n, phase in zip(counts, phases, strict=True) if n])
    numbers = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return numbers[np.argsort(times, kind="stable")]


@dataclass(frozen=True)
class Position:
    """A position in training: `step` optimizer steps of `epoch` are done."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Slice:
    """One rank's clips of one forward pass."""

    epoch: int
    step: int
    start: int
    """First place in the epoch's order."""
    stop: int
    """Place after the last one."""


@dataclass(frozen=True)
class Schedule:
    """The division of an epoch into steps, ranks and accumulation steps.

    Raises:
        UserError: ranks and accumulation do not divide the batch, or the clips are fewer than one batch.
    """

    num_clips: int
    batch_size: int
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * self.accumulation):
            raise UserError(indivisible(self.batch_size, self.world_size, self.accumulation))
        if self.num_clips < self.batch_size:
            raise UserError(
                f"{self.num_clips} training clips are fewer than one batch: lower training.batch_size "
                f"({self.batch_size}) to {self.num_clips} or less"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps per epoch."""
        return self.num_clips // self.batch_size

    @property
    def dropped_clips(self) -> int:
        """Number of clips at the end of each epoch's order that no step takes (different ones in each epoch)."""
        return self.num_clips % self.batch_size

    def slices(self, rank: int, start: Position, epochs: int) -> Iterator[Slice]:
        """Yield the slices of this rank's forward passes from `start` to the end of the last epoch, in order.

        A rank's places in a step are contiguous for any accumulation, so the ranks of a node share its lanes.
        """
        part = self.batch_size // (self.world_size * self.accumulation)
        for epoch in range(start.epoch, epochs):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                for micro in range(self.accumulation):
                    first = step * self.batch_size + (rank * self.accumulation + micro) * part
                    yield Slice(epoch, step, first, first + part)


def evaluation_slices(num_clips: int, batch_size: int, rank: int, world_size: int) -> Iterator[Slice]:
    """Yield this rank's slices of a pass over all clips in their stored order.

    Every rank yields the same number of slices of the same length; places from `num_clips` on are padding.
    """
    stride = batch_size * world_size
    for step, base in enumerate(range(0, num_clips, stride)):
        first = base + rank * batch_size
        yield Slice(0, step, first, first + batch_size)
