"""What a rank finds out about itself before a run, and what differs between ranks. See `preflight.py`.

Facts are plain JSON, since they travel through the job's key-value store:

    {"rank", "local_rank", "host", "failures": [text, ...], "device": {...}, "versions": {...}, "shards": {...}, ...}
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import karmma_dist
from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.runs.process import node_name
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.loader import open_shards

_PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "av", "numpy")

Facts = dict[str, Any]


def first_facts(world: World) -> Facts:
    """Who this rank is."""
    return {"rank": world.rank, "local_rank": world.local_rank, "host": node_name(), "failures": []}


def attempt(facts: Facts, name: str, work: Callable[[], Any], limit_s: float) -> bool:
    """Add to `facts` what `work` returns, or in `failures` why it did not; returns whether it ended.

    It runs in a thread, since a dead file server or network answers by never answering.
    """
    failures: list[str] = []

    def run() -> None:
        try:
            facts[name] = work()
        except UserError as error:
            failures.append(str(error))
        except Exception as error:  # whatever a driver, file system or network throws is this rank's failure
            failures.append(f"{name}: {type(error).__name__}: {_first_line(error)}")

    thread = threading.Thread(target=run, name=f"preflight {name}", daemon=True)
    thread.start()
    thread.join(limit_s)
    facts["failures"] += failures
    if thread.is_alive():
        facts["failures"].append(f"{name}: did not end within {limit_s:.0f} s")
        return False
    return True


def device_facts(world: World, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The device that training would take, after a small computation on it.

    Raises:
        UserError: there is none for this local rank.
    """
    if not torch.cuda.is_available():
        given = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("SLURM_JOB_GPUS")
        if given and given not in ("-1", "NoDevFiles"):
            raise UserError(
                f"GPUs {given} were given to this rank, but torch sees none: is the driver too old for CUDA "
                f"{torch.version.cuda} (see nvidia-smi)?"
            )
        return {"kind": "cpu", "name": f"CPU, {len(os.sched_getaffinity(0))} cores"}
    device = device_of(world)
    properties = torch.cuda.get_device_properties(device)
    total = float(torch.ones(1024, device=device).sum())
    if total != 1024:
        raise UserError(f"GPU {world.local_rank} ({properties.name}) adds 1024 ones to {total}: take its node out")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return {
        "kind": "cuda", "name": properties.name, "id": str(properties.uuid), "memory_bytes": properties.total_memory,
        "free_bytes": free_bytes,
    }  # fmt: skip


def version_facts() -> dict[str, str]:
    """Versions of everything that decides what a rank computes, and a hash of this package's own code."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "missing"
    root = Path(karmma_dist.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    found["karmma-dist code"] = code.hexdigest()[:12]
    return found


def shard_facts(chain: Sequence[Recipe], local_rank: int) -> dict[str, str]:
    """sha256 of the manifest of each shards folder of a chain of recipes, by where it is.

    The first rank of a host also looks whether every tar is there in full.

    Raises:
        UserError: a folder or one of its shards is not there.
    """
    found = {}
    for recipe in chain:
        folder = open_shards(recipe.data)
        found[folder.where] = folder.sha256
        if local_rank == 0 and type(folder) is ShardFolder:  # others fetch shards when they are asked for
            _check_tars(folder)
    return found


def _check_tars(folder: ShardFolder) -> None:
    for shard in folder.manifest.shards:
        tar = folder.root / shard.name
        size = tar.stat().st_size if tar.is_file() else None
        if size != shard.num_bytes:
            found = "is not there" if size is None else f"has {size} bytes"
            raise UserError(f"{tar}: {found}, the manifest names {shard.num_bytes} bytes: copy the folder again")


def differences(ranks: Sequence[Facts]) -> list[str]:
    """What is wrong with the ranks of a job, one line each; equal failures of several ranks are one line."""
    found: dict[str, list[Facts]] = {}
    for facts in ranks:
        for text in facts["failures"]:
            found.setdefault(text, []).append(facts)
    lines = [f"{named(those)}: {text}" for text, those in found.items()]
    lines += _shared_devices(ranks)
    lines += _unlike(ranks, {id(f): f["device"]["kind"] for f in ranks if "device" in f}, "trains on", "ask for GPUs")
    for group, what, advice in (
        ("versions", "has", "install the same on every node"),
        ("shards", "has for the manifest of", "copy the folder again, or let all nodes read the same"),
    ):
        for name in sorted({name for facts in ranks for name in facts.get(group, {})}):
            values = {id(f): f[group].get(name, "missing")[:20] for f in ranks if group in f}
            lines += _unlike(ranks, values, f"{what} {name}", advice)
    return lines


def _shared_devices(ranks: Sequence[Facts]) -> list[str]:
    lines = []
    owners: dict[tuple[str, str], Facts] = {}
    places: dict[tuple[str, int], Facts] = {}
    for facts in ranks:
        first = places.setdefault((facts["host"], facts["local_rank"]), facts)
        if first is not facts:
            lines.append(f"{named([first, facts])}: both are local rank {facts['local_rank']} of their node")
            continue
        device = facts.get("device", {}).get("id")
        owner = facts if device is None else owners.setdefault((facts["host"], device), facts)
        if owner is not facts:
            lines.append(f"{named([owner, facts])}: share one GPU ({device}): give each rank its own")
    return lines


def _unlike(ranks: Sequence[Facts], values: Mapping[int, str], what: str, advice: str) -> list[str]:
    """A line for each value that is not the most common one (of equally common ones, the first rank's)."""
    if len(set(values.values())) < 2:
        return []
    usual = Counter(values.values()).most_common(1)[0][0]
    unlike: dict[str, list[Facts]] = {}
    for facts in ranks:
        value = values.get(id(facts), usual)
        if value != usual:
            unlike.setdefault(value, []).append(facts)
    reference = next(facts for facts in ranks if values.get(id(facts)) == usual)
    return [
        f"{named(those)}: {what} {value}, but {named([reference])} {usual}: {advice}"
        for value, those in unlike.items()
    ]


def named(ranks: Sequence[Facts]) -> str:
    """`rank 0 (n1), rank 4 (n2)`, or with more ranks `8 ranks from rank 0 (n1) to rank 7 (n1)`."""
    one = [f"rank {facts['rank']} ({facts['host']})" for facts in ranks]
    return ", ".join(one) if len(one) <= 4 else f"{len(one)} ranks from {one[0]} to {one[-1]}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
