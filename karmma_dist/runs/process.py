"""The process that writes a run: its description in state.json, and the check that it is alive for `runs`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from karmma_dist.processes import machine, started_at


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return this machine's name: Slurm's name of the node inside a job step, otherwise the host name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def process_info(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Describe this process: host, pid, number of ranks and, under Slurm, job id and number of nodes.

    `machine` identifies the boot and the pid namespace in which `pid` is valid; `started`, the start time, tells the
    process from later ones with the same pid.
    """
    info: dict[str, Any] = {"host": node_name(environment), "pid": os.getpid(), "ranks": _num_ranks(environment)}
    here, started = machine(), started_at(os.getpid())
    if here and started:
        info |= {"machine": here, "started": started}
    if "SLURM_JOB_ID" in environment:
        info |= {"job_id": environment["SLURM_JOB_ID"], "nodes": _number(environment.get("SLURM_JOB_NUM_NODES"))}
    return info


def is_alive(info: Mapping[str, Any]) -> bool | None:
    """Return True if the process that `process_info` described still runs; None if this machine cannot tell."""
    if "started" not in info or info.get("machine") != machine():
        return None
    return started_at(int(info["pid"])) == info["started"]


def is_this_process(info: Mapping[str, Any]) -> bool:
    """Return True if `process_info` described this process."""
    own = process_info()
    return all(info.get(name) == own.get(name) for name in ("host", "pid", "machine", "started"))


def _num_ranks(environment: Mapping[str, str]) -> int:
    if "RANK" in environment:
        return _number(environment.get("WORLD_SIZE"))
    return _number(environment.get("SLURM_STEP_NUM_TASKS"))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 1
