"""How the clips of an optimizer step divide over ranks and forward passes, and what would divide where they do not.

    training.batch_size = ranks x accumulation steps x micro-batch
                     96 =    16 x 1                  x  6             with training.max_micro_batch_size 12
                     96 =     8 x 1                  x 12
                     96 =     1 x 8                  x 12
                     96       7: does not; 91 and 98 clips would, and 6 and 8 ranks

The one place where a recipe and a number of ranks become an accumulation. Which clips meet in a step does not depend on
it (`streaming/order.py`).
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, TrainingRecipe


@dataclass(frozen=True)
class BatchDivision:
    """Each rank's share of an optimizer step: `accumulation` forward passes of `micro_batch_size` clips."""

    num_ranks: int
    accumulation: int
    micro_batch_size: int
    warning: str = ""
    """A clause on what a person may want to change; empty: nothing."""

    def __str__(self) -> str:
        """Return the arithmetic: `96 = 8 ranks x 1 pass x 12 clips`."""
        sizes = {"rank": self.num_ranks, "pass": self.accumulation, "clip": self.micro_batch_size}
        words = [f"{num} {name}{'' if num == 1 else 'es' if name == 'pass' else 's'}" for name, num in sizes.items()]
        return f"{math.prod(sizes.values())} = {' x '.join(words)}"


@dataclass(frozen=True)
class Nearest:
    """The numbers nearest to those of a batch that does not divide: one below and one above, where they exist."""

    batch_sizes: list[int]
    """Clips per optimizer step, for the same number of ranks."""
    num_ranks: list[int]
    """Ranks, for the same batch."""


def divide_batch(recipe: Recipe, num_ranks: int, before: str = "") -> BatchDivision:
    """Return how a recipe's batch divides over a number of ranks.

    `training.accumulation` holds where it is a number. Else the accumulation is the smallest that divides a rank's
    clips into passes of `training.max_micro_batch_size` or fewer, and 1 without such a limit.

    Args:
        recipe: the run.
        num_ranks: ranks.
        before: words of the error before what to type.

    Raises:
        UserError: it does not divide; see `indivisible`.
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
    """Return the fewest equal passes of at most `limit` clips (None: any number) that a rank's clips divide into."""
    least = 1 if limit is None else math.ceil(rank_clips / limit)
    return next(passes for passes in range(least, rank_clips + 1) if rank_clips % passes == 0)


def check_batches(chain: Sequence[Recipe], num_ranks: int, done: Container[str] = ()) -> list[BatchDivision]:
    """Return how the batch of each recipe of a chain divides over the ranks that train them one after the other.

    Args:
        chain: recipes, the last the one asked for: overrides hold for it alone.
        num_ranks: ranks.
        done: names of recipes that will not be trained, which are left out.

    Raises:
        UserError: one that does not divide, with the recipe's name, and what to type.
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
    """Return the batch sizes and the numbers of ranks next to these that divide, at most one below and one above each.

    Args:
        batch_size: clips per optimizer step.
        num_ranks: ranks.
        accumulation: forward passes per optimizer step and rank.
        lanes: `data.order.lanes`, which must divide the batch size as well; 0: none.
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
    """Return the line on a batch that does not divide: the arithmetic, the nearest that do, and what to type.

    Args:
        batch_size: clips per optimizer step.
        num_ranks: ranks.
        accumulation: forward passes per optimizer step and rank.
        lanes: see `nearest_divisible`.
        before: words before what to type.
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
    """Say where a given accumulation makes passes larger than the limit, or a limit makes them much smaller than it."""
    limit = training.max_micro_batch_size
    if limit is None:
        return ""
    if size > limit:
        return f"training.accumulation {accumulation} makes passes of {size} clips, max_micro_batch_size {limit} or not"
    if training.accumulation is None and accumulation >= 2 * math.ceil(size * accumulation / limit):
        return (
            f"a rank's {size * accumulation} clips divide into no fewer than {accumulation} passes of {size}, though "
            f"{limit} fit in one: another training.batch_size is faster"
        )
    return ""
