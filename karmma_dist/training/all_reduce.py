"""One all-reduce over the ranks of a job, as training makes them, checked and timed; and the store they meet in."""

from __future__ import annotations

import datetime
import time

import torch
import torch.distributed as dist

from karmma_dist.errors import UserError
from karmma_dist.training.device import device_of
from karmma_dist.training.rendezvous import World

ALL_REDUCE_BYTES = 64 * 2**20


def connect(world: World, timeout_s: float, *, keep: bool) -> dist.Store:
    """A connection of its own to the job's store, at the address where training will meet; `keep`: it is kept here."""
    store = dist.TCPStore(
        world.address, world.port, is_master=keep, wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout_s),
    )  # fmt: skip
    return dist.PrefixStore("karmma_dist/preflight", store)


def time_all_reduce(world: World, limit_s: float) -> float | None:
    """Sum 64 MB over the ranks as training would; returns the bus bandwidth in GB/s, None for a single rank.

    Raises:
        UserError: a sum is wrong.
        RuntimeError: the backend failed.
    """
    device = device_of(world)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    store = dist.PrefixStore("group", connect(world, limit_s, keep=False))  # waits in it must not block the others
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=world.rank, world_size=world.size,
        timeout=datetime.timedelta(seconds=10 * limit_s),  # torch's own limit ends the process: ours comes first
    )  # fmt: skip
    values = torch.empty(ALL_REDUCE_BYTES // 4, device=device)
    fastest_s = float("inf")
    for _ in range(3):  # the first one also connects
        values.fill_(world.rank + 1)
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        fastest_s = min(fastest_s, time.perf_counter() - began)
        expected = world.size * (world.size + 1) / 2
        wrong = int((values != expected).sum())
        if wrong:
            raise UserError(f"all-reduce: {wrong} of {values.numel()} sums are wrong: check the node's network and GPU")
    share = 2 * (world.size - 1) / world.size
    return share * ALL_REDUCE_BYTES / fastest_s / 1e9 if world.size > 1 else None
