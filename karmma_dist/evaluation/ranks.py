"""The ranks of one evaluation: each sees its share of the clips, and all come to the same results.

Torch's process group is joined only where there is more than one rank.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.training import presence
from karmma_dist.training.rendezvous import World, find_world

_APART_S = 3600.0
"""How long ranks may wait at the end for the slowest: they do not meet before."""


@contextmanager
def joined_ranks() -> Iterator[World]:
    """Join the ranks that torchrun's or Slurm's variables describe. Every rank must call this.

    Raises:
        UserError: the variables do not fit together.
        Stopped: another rank died, hangs or left because of an error.
    """
    world = find_world(os.environ)
    if world.size == 1:
        yield world
        return
    from karmma_dist.training.engine import process_group  # DeepSpeed takes seconds to import

    if not world.is_main:
        logging.getLogger("karmma_dist").setLevel(logging.ERROR)  # rank 0 says it
    with process_group(world):
        yield world


def note_progress(doing: str) -> None:
    """Show the other ranks that this one moves. Every rank must call this equally often."""
    presence.mark(doing, presence.START_S)


def check_same(what: str, world: World) -> None:
    """Refuse to put results together that are not of the same evaluation. Every rank must call this.

    Args:
        what: this rank evaluates, in words.
        world: this rank.

    Raises:
        UserError: another rank evaluates something else.
    """
    if world.size == 1:
        return
    from karmma_dist.training.collectives import gather

    found = gather([what])
    odd = next((rank for rank, of in enumerate(found) if of != found[0]), None)
    if odd is not None:
        raise UserError(
            f"the ranks of this job share one evaluation, but rank {odd} was given {found[odd]} and rank 0 "
            f"{found[0]}: start one job step per evaluation (srun --ntasks=1)"
        )


def gather_when_done(items: list[Any]) -> list[Any]:
    """The lists of all ranks, in rank order. Every rank must call this, the slowest up to an hour after the first."""
    from karmma_dist.training.collectives import barrier, gather

    barrier(_APART_S)
    presence.mark("gathering results", presence.START_S)
    return gather(items)
