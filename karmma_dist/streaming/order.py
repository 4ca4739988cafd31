"""Which clip is where in the epoch: one order for every rank, worker and world size.

`epoch_order(n, seed, epoch)` is a permutation of clip numbers. Optimizer step k of the epoch takes its k-th slice of
`batch_size` clips; each rank takes its part of the slice, one part per accumulation step. A position is
(epoch, step) and nothing else, so every rank takes the same number of steps and resuming is a seek.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from karmma_dist.errors import UserError


def random_words(num: int, *key: int) -> np.ndarray:
    """`num` uniform 64-bit words that are a function of `key` (two non-negative integers at most) alone.

    Philox is counter-based and its raw output is fixed for all time, unlike numpy's derived distributions.
    """
    return np.random.Philox(key=np.array([*key, 0][:2], dtype=np.uint64)).random_raw(num)


def epoch_order(num_clips: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of `range(num_clips)`, int64."""
    return np.argsort(random_words(num_clips, seed, 2 * epoch), kind="stable")


@dataclass(frozen=True)
class Position:
    """Where training stands: `step` optimizer steps of `epoch` are done."""

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
    """One past the last."""


@dataclass(frozen=True)
class Schedule:
    """How an epoch divides into steps, ranks and accumulation steps.

    Raises:
        UserError: ranks and accumulation do not divide the batch, or there are fewer clips than one batch.
    """

    num_clips: int
    batch_size: int
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulation
        if self.batch_size % parts:
            nearest = max(1, round(self.batch_size / parts)) * parts
            raise UserError(
                f"training.batch_size {self.batch_size} does not divide into {self.world_size} ranks x "
                f"{self.accumulation} accumulation steps = {parts} parts; the nearest that does is {nearest}"
            )
        if self.num_clips < self.batch_size:
            raise UserError(
                f"{self.num_clips} training clips are fewer than one batch: lower training.batch_size "
                f"({self.batch_size}) to {self.num_clips} or less"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.num_clips // self.batch_size

    @property
    def dropped_clips(self) -> int:
        """Clips at the end of each epoch's order that no step takes (other ones each epoch)."""
        return self.num_clips % self.batch_size

    def slices(self, rank: int, start: Position, epochs: int) -> Iterator[Slice]:
        """This rank's forward passes from `start` to the end of the last epoch, in order."""
        part = self.batch_size // (self.world_size * self.accumulation)
        for epoch in range(start.epoch, epochs):
            for step in range(start.step if epoch == start.epoch else 0, self.steps_per_epoch):
                for micro in range(self.accumulation):
                    first = step * self.batch_size + (micro * self.world_size + rank) * part
                    yield Slice(epoch, step, first, first + part)


def evaluation_slices(num_clips: int, batch_size: int, rank: int, world_size: int) -> Iterator[Slice]:
    """This rank's share of a pass over all clips in their stored order.

    Every rank yields the same number of slices of the same length; places at or past `num_clips` are padding.
    """
    stride = batch_size * world_size
    for step, base in enumerate(range(0, num_clips, stride)):
        first = base + rank * batch_size
        yield Slice(0, step, first, first + batch_size)
