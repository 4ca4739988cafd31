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
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.recipe.micro_batches import indivisible
from karmma_dist.seeding import order_words


def epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of `range(num_clips)`, int64."""
    return np.argsort(order_words(num_clips, seed, epoch), kind="stable")


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
