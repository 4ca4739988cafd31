"""Collectives for anything except gradients: gathers, means, barriers. Every rank must call each function."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from karmma_dist.distributed import heartbeat
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError

T = TypeVar("T")


def gather(items: list[Any]) -> list[Any]:
    """Return the lists of all ranks, concatenated in rank order, on every rank."""
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def raise_on_all(problem: str | None) -> None:
    """Raise the problem of the first rank that has one as `UserError`, on every rank."""
    problems = gather([problem] if problem else [])
    if problems:
        raise UserError(problems[0])


def on_main(work: Callable[[], T], world: World) -> T | None:
    """Do work on the main rank alone; return its result there, None elsewhere. Every rank must call this.

    A job of one rank needs no process group.

    Raises:
        UserError: the work raised it on the main rank; raised on every rank.
    """
    if world.size == 1:
        return work()
    result, problem = None, None
    try:
        result = work() if world.is_main else None
    except UserError as error:
        problem = str(error)
    raise_on_all(problem)
    return result


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over the ranks."""
    names = sorted(values)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, (packed / dist.get_world_size()).tolist(), strict=True))


def sum_over_ranks(numbers: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks, on its device. Every rank must call this.

    The tensor may be changed.
    """
    if dist.get_world_size() == 1:
        return numbers
    reduced = numbers.cuda() if dist.get_backend() == "nccl" else numbers
    dist.all_reduce(reduced)
    return reduced.to(numbers.device)


def store() -> dist.Store:
    """Return the job's key-value store, which reaches every rank even while a collective blocks."""
    return dist.PrefixStore("karmma_dist", dist.distributed_c10d._get_default_store())


_barriers = itertools.count()
_POLL_S = 0.01


def barrier(limit_s: float = heartbeat.START_S) -> None:
    """Wait for every rank as long as all ranks are alive, without the time limit of a collective.

    Args:
        limit_s: Seconds by which the last rank may arrive later than this one.

    Raises:
        Stopped: a rank died, hangs or left the job.
    """
    if dist.get_world_size() == 1:
        return
    heartbeat.mark("waiting for the other ranks", limit_s)
    name, job_store = f"barrier/{next(_barriers)}", store()
    if job_store.add(name, 1) == dist.get_world_size():
        job_store.set(f"{name}/open", "")
    heartbeat.wait_for(job_store, f"{name}/open")


def leave_job() -> None:
    """Wait at the job's last barrier; rank 0, whose process holds the store, leaves after all others.

    Raises:
        Stopped: a rank died, hangs or left the job.
    """
    barrier()
    if dist.get_world_size() == 1:
        return
    job_store = store()
    num_left = job_store.add("num_left", 1)
    while dist.get_rank() == 0 and num_left < dist.get_world_size():
        heartbeat.raise_if_lost()
        time.sleep(_POLL_S)
        num_left = job_store.add("num_left", 0)


def highest(number: int) -> int:
    """Return the highest of the ranks' numbers, on every rank."""
    if dist.get_world_size() == 1:
        return number
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)
