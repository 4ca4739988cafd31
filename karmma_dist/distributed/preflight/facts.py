"""Facts that each rank collects about itself before a run, and their comparison between ranks. See `preflight.py`.

Facts are plain JSON, since they are sent through the job's key-value store:

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
"""Facts of one rank, as shown above."""


def first_facts(world: World) -> Facts:
    """Return the rank, local rank and host of this process, with an empty list of failures."""
    return {"rank": world.rank, "local_rank": world.local_rank, "host": node_name(), "failures": []}


def attempt(facts: Facts, name: str, work: Callable[[], Any], limit_s: float) -> bool:
    """Run `work` and store its result in `facts[name]`, or its error in `facts["failures"]`.

    `work` runs in a thread, since a call to a dead file server or network may never return.

    Returns:
        True if `work` ended within `limit_s` seconds.
    """
    failures: list[str] = []

    def run() -> None:
        try:
            facts[name] = work()
        except UserError as error:
            failures.append(str(error))
        except Exception as error:  # a driver, file system or network may raise anything
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
    """Describe the device that training would use, after a small computation on it.

    Raises:
        UserError: this local rank has no GPU, its GPU computes wrong sums, or torch does not see the job's GPUs.
    """
    if not torch.cuda.is_available():
        gpu_ids = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("SLURM_JOB_GPUS")
        if gpu_ids and gpu_ids not in ("-1", "NoDevFiles"):
            raise UserError(
                f"GPUs {gpu_ids} were given to this rank, but torch sees none: check with nvidia-smi that the driver "
                f"is new enough for CUDA {torch.version.cuda}"
            )
        return {"kind": "cpu", "name": f"CPU, {len(os.sched_getaffinity(0))} cores"}
    device = device_of(world)
    properties = torch.cuda.get_device_properties(device)
    total = float(torch.ones(1024, device=device).sum())
    if total != 1024:
        raise UserError(f"GPU {world.local_rank} ({properties.name}) sums 1024 ones to {total}: exclude its node")
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return {
        "kind": "cuda", "name": properties.name, "id": str(properties.uuid), "memory_bytes": properties.total_memory,
        "free_bytes": free_bytes,
    }  # fmt: skip


def version_facts() -> dict[str, str]:
    """Return the versions that decide what a rank computes, and a hash of this package's own code."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "missing"
    root = Path(karmma_dist.__file__).parent
    code = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        code.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    versions["karmma-dist code"] = code.hexdigest()[:12]
    return versions


def shard_facts(chain: Sequence[Recipe], local_rank: int) -> dict[str, str]:
    """Return the sha256 of the manifest of each shards folder of a chain of recipes, by path or URL.

    The first rank of a host also checks that every tar exists with its full size.

    Raises:
        UserError: a folder is missing, or one of its shards is missing or has another size.
    """
    hashes = {}
    for folder in (folder for recipe in chain for folder in open_shards(recipe.data).folders):
        hashes[folder.where] = folder.sha256
        if local_rank == 0 and type(folder) is ShardFolder:  # other kinds of folder download shards on demand
            _check_tars(folder)
    return hashes


def _check_tars(folder: ShardFolder) -> None:
    for shard in folder.manifest.shards:
        tar = folder.root / shard.name
        size = tar.stat().st_size if tar.is_file() else None
        if size != shard.num_bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{tar}: {found}, the manifest names {shard.num_bytes} bytes: copy the folder again")


def differences(ranks: Sequence[Facts]) -> list[str]:
    """Describe each problem of a job's ranks in one line; equal failures of several ranks share a line."""
    ranks_by_failure: dict[str, list[Facts]] = {}
    for facts in ranks:
        for failure in facts["failures"]:
            ranks_by_failure.setdefault(failure, []).append(facts)
    lines = [f"{rank_names(failed)}: {failure}" for failure, failed in ranks_by_failure.items()]
    lines += _shared_devices(ranks)
    lines += _outliers(ranks, {id(f): f["device"]["kind"] for f in ranks if "device" in f}, "device", "request GPUs")
    for group, prefix, advice in (
        ("versions", "", "install the same version on every node"),
        ("shards", "manifest of ", "copy the folder again, or let all nodes read the same folder"),
    ):
        for name in sorted({name for facts in ranks for name in facts.get(group, {})}):
            values = {id(f): f[group].get(name, "missing")[:20] for f in ranks if group in f}
            lines += _outliers(ranks, values, f"{prefix}{name}", advice)
    return lines


def _shared_devices(ranks: Sequence[Facts]) -> list[str]:
    lines = []
    owners: dict[tuple[str, str], Facts] = {}
    places: dict[tuple[str, int], Facts] = {}
    for facts in ranks:
        first = places.setdefault((facts["host"], facts["local_rank"]), facts)
        if first is not facts:
            lines.append(f"{rank_names([first, facts])}: both are local rank {facts['local_rank']} of their node")
            continue
        device = facts.get("device", {}).get("id")
        owner = facts if device is None else owners.setdefault((facts["host"], device), facts)
        if owner is not facts:
            lines.append(f"{rank_names([owner, facts])}: share one GPU ({device}): give each rank its own")
    return lines


def _outliers(ranks: Sequence[Facts], values: Mapping[int, str], name: str, advice: str) -> list[str]:
    """Describe each value that differs from the most common one in one line; the first rank's value wins ties.

    Args:
        ranks: Facts of all ranks.
        values: Value by the `id` of a rank's facts; ranks without a value are left out.
        name: Name of the compared value.
        advice: What the user should do.
    """
    if len(set(values.values())) < 2:
        return []
    common = Counter(values.values()).most_common(1)[0][0]
    outliers: dict[str, list[Facts]] = {}
    for facts in ranks:
        value = values.get(id(facts), common)
        if value != common:
            outliers.setdefault(value, []).append(facts)
    reference = next(facts for facts in ranks if values.get(id(facts)) == common)
    return [
        f"{rank_names(differing)}: {name} is {value}, but {common} on {rank_names([reference])}: {advice}"
        for value, differing in outliers.items()
    ]


def rank_names(ranks: Sequence[Facts]) -> str:
    """Name ranks: `rank 0 (n1), rank 4 (n2)`, or with more ranks `8 ranks from rank 0 (n1) to rank 7 (n1)`."""
    names = [f"rank {facts['rank']} ({facts['host']})" for facts in ranks]
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} ranks from {names[0]} to {names[-1]}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]
