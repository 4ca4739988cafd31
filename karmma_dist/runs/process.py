"""Which process writes a run, where it is, and whether it still lives: written into state.json, read by `runs`."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from karmma_dist.processes import machine, started_at


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine's name: the one Slurm gave the node, inside a job step, else the host's own."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def whereabouts(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process: host, pid, number of ranks and, under Slurm, job and nodes.

    `machine` names the boot and the pid namespace that `pid` means something in, `started` the process that had it.
    """
    found: dict[str, Any] = {"host": node_name(environment), "pid": os.getpid(), "ranks": _num_ranks(environment)}
    here, started = machine(), started_at(os.getpid())
    if here and started:
        found |= {"machine": here, "started": started}
    if "SLURM_JOB_ID" in environment:
        found |= {"job_id": environment["SLURM_JOB_ID"], "nodes": _number(environment.get("SLURM_JOB_NUM_NODES"))}
    return found


def is_alive(written: Mapping[str, Any]) -> bool | None:
    """Whether the process that `whereabouts` described still runs; None where this machine cannot tell."""
    if "started" not in written or written.get("machine") != machine():
        return None
    return started_at(int(written["pid"])) == written["started"]


def _num_ranks(environment: Mapping[str, str]) -> int:
    if "RANK" in environment:
        return _number(environment.get("WORLD_SIZE"))
    return _number(environment.get("SLURM_STEP_NUM_TASKS"))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 1
