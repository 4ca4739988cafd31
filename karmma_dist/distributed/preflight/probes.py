"""Probes of a job before training: a folder shared by all nodes, one all-reduce, the planned node of each rank."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from karmma_dist.distributed.job_store import open_store
from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import naming
from karmma_dist.io.files import create


class SharedFolderProbe:
    """A temporary folder that shows whether all ranks see the same parent folder.

    Rank 0 creates and removes it, with any parents that it had to create; the other ranks write into it and read it.

    Args:
        parent: Folder to probe; it need not exist yet.
        token: Token of this preflight, equal on all ranks.
    """

    def __init__(self, parent: Path, token: str) -> None:
        self.parent = parent.absolute()
        self._token = token
        self._folder = self.parent / f".preflight-{token}"
        self._created: list[Path] = []

    def create(self) -> None:
        """Create the folder, with rank 0's file in it.

        Raises:
            UserError: the folder cannot be written.
        """
        self._created = [path for path in (self.parent, *self.parent.parents) if not path.exists()]
        try:
            with naming(self._folder):
                self._folder.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self.write(0)

    def write(self, rank: int) -> None:
        """Write a rank's file and flush it to the disk.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            with (
                naming(self._folder / str(rank)),
                open(create(self._folder / str(rank)), "w", encoding="utf-8") as file,
            ):
                file.write(f"{self._token} {rank}")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None

    def sees(self, rank: int) -> bool:
        """Return True if a rank's file exists with this preflight's token."""
        try:
            return (self._folder / str(rank)).read_text("utf-8", "replace") == f"{self._token} {rank}"
        except OSError:
            return False

    def join(self, rank: int) -> bool:
        """Check rank 0's file and write this rank's file; always return True.

        Raises:
            UserError: rank 0's file is not visible here, or this rank's file cannot be written.
        """
        if not self.sees(0):
            raise UserError(
                f"{self.parent}: the file that rank 0 wrote is not visible here, so this is not the same folder on all "
                "nodes: set runs_dir to a folder on a shared file system"
            )
        if rank:
            self.write(rank)
        return True

    def remove(self) -> None:
        """Remove the folder and the parents that this probe created, unless others have put files into them."""
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in self._created:
            try:
                path.rmdir()
            except OSError:
                return

    def _unwritable(self, error: OSError) -> UserError:
        if isinstance(error, UserError):  # a full or failing disk
            return error
        return UserError(f"{self.parent}: cannot be written ({error.strerror}): change its permissions or set runs_dir")


ALL_REDUCE_BYTES = 64 * 2**20
"""Size of the probed all-reduce."""


def connect(world: World, timeout_s: float, *, keep: bool) -> dist.Store:
    """Connect to a preflight store at the address that training will use.

    Args:
        world: World of this rank.
        timeout_s: Seconds after which a connection or a wait fails.
        keep: True if this process hosts the store.

    Raises:
        UserError: the store cannot be reached, or its port cannot be opened.
    """
    store = open_store(world, hosts=keep, late_s=timeout_s, hopeless_s=timeout_s)
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    return dist.PrefixStore("karmma_dist/preflight", store)


def time_all_reduce(world: World, limit_s: float) -> float | None:
    """Sum 64 MiB over the ranks as training would; return the bus bandwidth in GB/s, or None for a single rank.

    Raises:
        UserError: a sum is wrong.
        RuntimeError: the backend failed.
    """
    device = device_of(world)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    # A connection of its own: a wait in it must not block the other connections.
    store = dist.PrefixStore("group", connect(world, limit_s, keep=False))
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=world.rank, world_size=world.size,
        timeout=datetime.timedelta(seconds=10 * limit_s),  # torch's limit ends the process: keep it later
    )  # fmt: skip
    values = torch.empty(ALL_REDUCE_BYTES // 4, device=device)
    fastest_s = float("inf")
    for _ in range(3):  # the first all-reduce also connects
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


def planned_hosts(environment: Mapping[str, str], size: int, arrived: Mapping[int, str]) -> dict[int, str]:
    """Return the planned host of each rank, from Slurm's variables or from torchrun's; may be empty.

    Args:
        environment: Environment variables of any rank.
        size: World size.
        arrived: Host by rank, for the ranks that arrived.
    """
    local = environment.get("LOCAL_WORLD_SIZE", "")
    if local.isdigit() and int(local):
        nodes = {rank // int(local): host for rank, host in arrived.items()}
        return {rank: nodes.get(rank // int(local), f"node number {rank // int(local)}") for rank in range(size)}
    names, tasks = _step_hosts(environment), tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if len(names) != len(tasks) or sum(tasks) != size:
        return {}
    if environment.get("SLURM_DISTRIBUTION", "block").startswith("cyclic"):
        order = sorted((turn, node) for node, count in enumerate(tasks) for turn in range(count))
        return {rank: names[node] for rank, (_, node) in enumerate(order)}
    return dict(enumerate(name for name, count in zip(names, tasks, strict=True) for _ in range(count)))


def tasks_per_node(text: str) -> list[int]:
    """Parse the format of SLURM_STEP_TASKS_PER_NODE: `2(x3),1` gives [2, 2, 2, 1]."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in groups for _ in range(int(times or 1))]


def _step_hosts(environment: Mapping[str, str]) -> list[str]:
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        hostnames = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return hostnames.stdout.split()
