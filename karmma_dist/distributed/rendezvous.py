"""The rendezvous of a job's ranks: they connect to the store of rank 0 and wait until all of them are there.

    store = rendezvous(world)        on every rank, before its process group

A rank that is merely late is waited for, and a line names it every minute. What can never succeed ends within a minute,
with one line on every rank: a store that cannot be reached (`job_store.py`), a RANK that two processes have, ranks with
different WORLD_SIZE, a rank that died while it waited.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

import torch.distributed as dist

from karmma_dist.distributed.endpoint import hosts_store
from karmma_dist.distributed.job_store import ANOTHER_JOB, HOPELESS_S, LATE_S, WaitingLines, open_store
from karmma_dist.distributed.world import World
from karmma_dist.errors import LostRank, UserError
from karmma_dist.runs.process import node_name

_TELL_S = 3.0
"""Seconds for which the process of the store stays after an error, so that the others can read it."""
_POLL_S, _SLOWEST_POLL_S = 0.02, 0.5
_EXIT_CODE = 2
_SHOWN = 8


def rendezvous(
    world: World, environment: Mapping[str, str] = os.environ, late_s: float = LATE_S, hopeless_s: float = HOPELESS_S
) -> dist.Store:
    """Meet the other ranks; return the job's key-value store. Every rank must call this.

    Args:
        world: World of this rank.
        environment: Environment variables of the launcher.
        late_s: Seconds to wait for ranks that are merely late.
        hopeless_s: Seconds to wait for what can hardly succeed any more.

    Raises:
        UserError: rank 0 cannot be reached, a rank does not come, or the ranks do not fit together.
        LostRank: rank 0 ended before all ranks had met.
    """
    if world.size == 1:  # nobody else needs its address
        return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    hosts = hosts_store(world, environment)
    store = open_store(world, hosts=hosts, late_s=late_s, hopeless_s=hopeless_s)
    meeting = _Meeting(world, store, hosts, _job_id(environment))
    with _naming_a_lost_store(world):
        meeting.arrive(late_s)
        meeting.wait(late_s, hopeless_s)
    return store


@contextlib.contextmanager
def _naming_a_lost_store(world: World) -> Iterator[None]:
    try:
        yield
    except dist.DistError:
        raise LostRank(f"error: rank 0 at {world.endpoint} ended before all ranks had met", _EXIT_CODE) from None


class _Meeting:
    """The part of one rank in the rendezvous.

    Args:
        world: World of this rank.
        store: Store of the job.
        hosts: True if this process hosts the store.
        job_id: Text that tells this job from others; empty if the launcher gives none.
    """

    def __init__(self, world: World, store: dist.Store, hosts: bool, job_id: str) -> None:
        self.world, self._hosts, self._job_id = world, hosts, job_id
        self._keys = dist.PrefixStore("rendezvous", store)
        self._has_arrived = False

    def arrive(self, late_s: float) -> None:
        """Take this rank's place in the job that rank 0 has opened.

        Raises:
            UserError: another job meets here, another process has this rank, or rank 0 did not come.
        """
        world, me = self.world, f"{node_name()} pid {os.getpid()}"
        if world.is_main:
            self._keys.compare_set("job", "", json.dumps([self._job_id, world.size]))
        self._wait_for("job", late_s, "rank", "did not come", "see its output", range(1))
        job_id, size = json.loads(self._keys.get("job"))
        if job_id != self._job_id:
            raise UserError(f"cannot join at {world.endpoint}: {ANOTHER_JOB.reason}: {ANOTHER_JOB.advice}")
        if size != world.size:
            self._fail(
                f"WORLD_SIZE={world.size} on rank {world.rank} ({me}), but {size} on rank 0 at "
                f"{world.endpoint}: give all ranks the same",
                is_newcomer=True,
            )
        holder = self._keys.compare_set(f"rank/{world.rank}", "", me).decode()
        if self._keys.add(f"claims/{world.rank}", 1) > 1:
            self._fail(
                f"two processes are rank {world.rank} of {world.size} at {world.endpoint} ({holder}, {me}): give every "
                f"process its own RANK, and every job its own MASTER_PORT{self._absent()}",
                is_newcomer=True,
            )
        self._has_arrived = True
        if self._keys.add("num_arrived", 1) == world.size:
            self._keys.set("complete", "")

    def wait(self, late_s: float, hopeless_s: float) -> None:
        """Wait until all ranks have arrived, and then until all of them know it.

        Raises:
            UserError: a rank did not come, or ended while it waited.
        """
        self._wait_for("complete", late_s, "rank", "did not come", "see their output, and that they started")
        self._keys.set(f"ready/{self.world.rank}", "")
        if self._keys.add("num_ready", 1) == self.world.size:
            self._keys.set("ready", "")
        fault = "came, and ended while the others were waited for"
        self._wait_for("ready", hopeless_s, "ready", fault, "see its output")

    def _wait_for(
        self, key: str, limit_s: float, name: str, fault: str, advice: str, ranks: range | None = None
    ) -> None:
        """Wait until `key` is there; afterwards those of `ranks` (default: all) are at fault that lack `name`."""
        began, lines, pause_s = time.monotonic(), WaitingLines(), _POLL_S
        while not self._keys.check([key]):
            if self._keys.check(["problem"]):
                self._leave(self._keys.get("problem").decode())
            waited_s = time.monotonic() - began
            if waited_s >= limit_s:
                missing = self._missing(name, ranks)
                self._fail(
                    f"{_names(missing)} of {self.world.size} {fault} at {self.world.endpoint} within {waited_s:.0f} s: "
                    f"{advice}"
                )
            if lines.is_due:
                self._print_missing(lines, ranks)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _SLOWEST_POLL_S)

    def _print_missing(self, lines: WaitingLines, ranks: range | None) -> None:
        """Print which ranks are waited for, on the lowest rank that is there."""
        missing = self._missing("rank", ranks)
        if missing and min(set(range(self.world.size)) - set(missing)) == self.world.rank:
            lines.show(
                f"waiting for {_names(missing)} at {self.world.endpoint} "
                f"({self.world.size - len(missing)} of {self.world.size} ranks are there)"
            )

    def _missing(self, name: str, ranks: range | None = None) -> list[int]:
        return [rank for rank in ranks or range(self.world.size) if not self._keys.check([f"{name}/{rank}"])]

    def _absent(self) -> str:
        missing = self._missing("rank")
        return f"; {_names(missing)} did not come" if missing else ""

    def _fail(self, problem: str, *, is_newcomer: bool = False) -> NoReturn:
        """End the rendezvous on every rank; a newcomer to ranks that have all met only ends itself.

        Raises:
            UserError: always.
        """
        if not (is_newcomer and self._keys.check(["complete"])):
            problem = self._keys.compare_set("problem", "", problem).decode()
        self._leave(problem)

    def _leave(self, problem: str) -> NoReturn:
        """Leave with the problem; the process of the store stays until the others have read it.

        Raises:
            UserError: always.
        """
        num_told = self._keys.add("num_told", 1 if self._has_arrived else 0)
        until = time.monotonic() + _TELL_S
        while self._hosts and num_told < self._keys.add("num_arrived", 0) and time.monotonic() < until:
            time.sleep(_POLL_S)
            num_told = self._keys.add("num_told", 0)
        raise UserError(problem)


def _job_id(environment: Mapping[str, str]) -> str:
    """Return what tells this job from others that may use the same address; empty if the launcher does not say."""
    if "SLURM_STEP_NUM_TASKS" in environment and "RANK" not in environment:  # else each node may have its own step
        return f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    return environment.get("TORCHELASTIC_RUN_ID", "")


def _names(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:_SHOWN]))}{more}"
