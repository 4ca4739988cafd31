"""What ranks say to each other beside gradients: lists, means, a wait. Every rank must call each of these."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import torch.distributed as dist

from karmma_dist.distributed import heartbeat


def gather(items: list[Any]) -> list[Any]:
    """The lists of all ranks joined in rank order, on every rank."""
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Mean of each value over the ranks."""
    names = sorted(values)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, (packed / dist.get_world_size()).tolist(), strict=True))


def store() -> dist.Store:
    """The job's key-value store, which reaches every rank also while a collective waits."""
    return dist.PrefixStore("karmma_dist", dist.distributed_c10d._get_default_store())


_barriers = itertools.count()
_POLL_S = 0.01


def barrier(limit_s: float = heartbeat.START_S) -> None:
    """Wait for every rank, for as long as it lives: unlike a collective it may be long about it.

    Args:
        limit_s: how much later than this one the last may come.

    Raises:
        Stopped: a rank died or left.
    """
    if dist.get_world_size() == 1:
        return
    heartbeat.mark("waiting for the other ranks", limit_s)
    name, meeting = f"barrier/{next(_barriers)}", store()
    if meeting.add(name, 1) == dist.get_world_size():
        meeting.set(f"{name}/open", "")
    heartbeat.wait_for(meeting, f"{name}/open")


def part() -> None:
    """The last barrier of a job: rank 0, whose process holds the store, leaves when the others no longer need it.

    Raises:
        Stopped: a rank died or left.
    """
    barrier()
    if dist.get_world_size() == 1:
        return
    meeting = store()
    num_parted = meeting.add("parted", 1)
    while dist.get_rank() == 0 and num_parted < dist.get_world_size():
        heartbeat.raise_if_lost()
        time.sleep(_POLL_S)
        num_parted = meeting.add("parted", 0)


def highest(number: int) -> int:
    """The highest of the ranks' numbers, on every rank."""
    if dist.get_world_size() == 1:
        return number
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)
