"""Division of an optimizer step's clips over ranks and forward passes, with suggestions if they do not divide.

    training.batch_size = ranks x accumulation steps x micro-batch
                     96 =    16 x 1                  x  6             with training.max_micro_batch_size 12
                     96 =     8 x 1                  x 12
                     96 =     1 x 8                  x 12
                     96       7: does not divide; 91 and 98 clips do, and 6 and 8 ranks do

Only this module derives the number of accumulation steps from a recipe and a number of ranks. The clips of a step do
not depend on it (`streaming/order.py`).
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, TrainingRecipe


@dataclass(frozen=True)
class BatchDivision:
    """A rank's share of an optimizer step: `accumulation` forward passes of `micro_batch_size` clips each."""

    num_ranks: int
    accumulation: int
    micro_batch_size: int
    warning: str = ""
    """Suggestion for a better setting; empty if none is needed."""

    def __str__(self) -> str:
        """Return the arithmetic: `96 = 8 ranks x 1 pass x 12 clips`."""
        sizes = {"rank": self.num_ranks, "pass": self.accumulation, "clip": self.micro_batch_size}
        words = [f"{num} {name}{'' if num == 1 else 'es' if name == 'pass' else 's'}" for name, num in sizes.items()]
        return f"{math.prod(sizes.values())} = {' x '.join(words)}"


@dataclass(frozen=True)
class Nearest:
    """The nearest divisible alternatives to a batch that does not divide: one below and one above, if they exist."""

    batch_sizes: list[int]
    """Batch sizes (clips per optimizer step) for the same number of ranks."""
    num_ranks: list[int]
    """Numbers of ranks for the same batch size."""


def divide_batch(recipe: Recipe, num_ranks: int, before: str = "") -> BatchDivision:
    """Divide a recipe's batch over a number of ranks.

    The accumulation is `training.accumulation` if set, else the smallest number that divides a rank's clips into equal
    passes of at most `training.max_micro_batch_size` clips, or 1 without that limit.

    Args:
        recipe: the run's recipe.
        num_ranks: number of ranks.
        before: words of the error message before the suggested option.

    Raises:
        UserError: the batch does not divide; see `indivisible`.
    """
    training = recipe.training
    given = training.accumulation or 1
    if training.batch_size % (num_ranks * given):
        raise UserError(indivisible(training.batch_size, num_ranks, given, recipe.data.order.lanes, before))
    rank_clips = training.batch_size // num_ranks
    accumulation = training.accumulation or smallest_accumulation(rank_clips, training.max_micro_batch_size)
    size = rank_clips // accumulation
    return BatchDivision(num_ranks, accumulation, size, _warning(training, accumulation, size))


def smallest_accumulation(rank_clips: int, limit: int | None) -> int:
    """Return the smallest number of equal passes of at most `limit` clips (None: no limit) for a rank's clips."""
    least = 1 if limit is None else math.ceil(rank_clips / limit)
    return next(passes for passes in range(least, rank_clips + 1) if rank_clips % passes == 0)


def check_batches(chain: Sequence[Recipe], num_ranks: int, done: Container[str] = ()) -> list[BatchDivision]:
    """Divide the batch of each recipe of a chain over the ranks that train the recipes one after the other.

    Args:
        chain: recipes; the last is the requested recipe, the only one to which overrides apply.
        num_ranks: number of ranks.
        done: names of recipes to skip because they will not be trained.

    Raises:
        UserError: a batch does not divide; the message names the recipe and an option that helps.
    """
    divisions = []
    for recipe in chain:
        if recipe.name in done:
            continue
        try:
            before = "" if recipe is chain[-1] else "train it first, with "
            divisions.append(divide_batch(recipe, num_ranks, before))
        except UserError as error:
            raise UserError(f"{recipe.name}: {error}") from None
    return divisions


def nearest_divisible(batch_size: int, num_ranks: int, accumulation: int = 1, lanes: int = 0) -> Nearest:
    """Return the nearest batch sizes and numbers of ranks that divide, at most one below and one above each.

    Args:
        batch_size: clips per optimizer step.
        num_ranks: number of ranks.
        accumulation: forward passes per optimizer step and rank.
        lanes: `data.order.lanes`, which must also divide the batch size; 0: no lanes.
    """
    unit = math.lcm(num_ranks * accumulation, lanes or 1)
    below = (batch_size - 1) // unit * unit
    sizes = [size for size in (below, batch_size // unit * unit + unit) if size > 0]
    fewer = (ranks for ranks in range(num_ranks - 1, 0, -1) if batch_size % (ranks * accumulation) == 0)
    more = (
        ranks for ranks in range(num_ranks + 1, batch_size // accumulation + 1)
        if batch_size % (ranks * accumulation) == 0
    )  # fmt: skip
    return Nearest(sizes, [ranks for ranks in (next(fewer, None), next(more, None)) if ranks is not None])


def indivisible(batch_size: int, num_ranks: int, accumulation: int = 1, lanes: int = 0, before: str = "") -> str:
    """Return an error message for a batch that does not divide: the arithmetic, the nearest alternatives, an option.

    Args:
        batch_size: clips per optimizer step.
        num_ranks: number of ranks.
        accumulation: forward passes per optimizer step and rank.
        lanes: see `nearest_divisible`.
        before: words before the suggested option.
    """
    nearest = nearest_divisible(batch_size, num_ranks, accumulation, lanes)
    parts = num_ranks * accumulation
    steps = f" x {accumulation} accumulation steps" if accumulation > 1 else ""
    best = min(nearest.batch_sizes, key=lambda size: abs(size - batch_size))
    ranks = " or ".join(map(str, nearest.num_ranks)) or f"none with {accumulation} accumulation steps"
    return (
        f"training.batch_size {batch_size} does not divide over {num_ranks} rank{'s' * (num_ranks > 1)}{steps} "
        f"({batch_size} = {batch_size // parts} x {parts} + {batch_size % parts}); the nearest batch sizes that do: "
        f"{' or '.join(map(str, nearest.batch_sizes))} ({before}--set training.batch_size={best}), "
        f"the nearest numbers of ranks: {ranks}"
    )


def _warning(training: TrainingRecipe, accumulation: int, size: int) -> str:
    """Return a warning if passes exceed the limit, or are much smaller than it; empty: no warning."""
    limit = training.max_micro_batch_size
    if limit is None:
        return ""
    if size > limit:
        return f"training.accumulation {accumulation} makes passes of {size} clips, max_micro_batch_size is {limit}"
    if training.accumulation is None and accumulation >= 2 * math.ceil(size * accumulation / limit):
        return (
            f"a rank's {size * accumulation} clips need {accumulation} passes of {size}, although "
            f"{limit} clips fit in one: another training.batch_size is faster"
        )
    return ""
