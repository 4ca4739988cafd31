"""Which node a rank should be on, as the launcher planned it: to name the node of a rank that never came."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping


def planned_hosts(environment: Mapping[str, str], size: int, arrived: Mapping[int, str]) -> dict[int, str]:
    """Host by rank, from Slurm's variables, or from torchrun's and the ranks that are there; may be empty.

    Args:
        environment: of any rank.
        size: number of ranks.
        arrived: hosts of the ranks that came.
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
    """`2(x3),1` -> [2, 2, 2, 1]: how SLURM_STEP_TASKS_PER_NODE is written."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _step_hosts(environment: Mapping[str, str]) -> list[str]:
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        return []
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
