"""The check of a job's ranks before a run: all arrive, agree in what they need, and reach each other.

    srun karmma-dist doctor --distributed RECIPE

Ranks communicate through a key-value store on rank 0, whose waits have limits, instead of collectives, which hang if a
rank is missing. So a rank that is missing, differs or hangs is named with its node within `timeout_s`. Only the last
stage is a collective.

    arrival    half of the time      every rank reports; then one signal starts all of them, which also shows clock skew
    facts      a quarter             device, versions, shards, and a file in the run folder that the other ranks see
    all-reduce a quarter             64 MiB over the backend that training uses, values checked
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read at import: silences torch's log of errors reported here

import torch.distributed as dist

from karmma_dist.distributed.endpoint import hosts_store
from karmma_dist.distributed.preflight.facts import (
    Facts,
    attempt,
    device_facts,
    differences,
    first_facts,
    rank_names,
    shard_facts,
    version_facts,
)
from karmma_dist.distributed.preflight.probes import (
    ALL_REDUCE_BYTES,
    SharedFolderProbe,
    connect,
    planned_hosts,
    time_all_reduce,
)
from karmma_dist.distributed.world import World, find_world, free_port
from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names
from karmma_dist.runs.process import node_name
from karmma_dist.terminal import print_line, print_table

_TELL_S = 2.0
"""Seconds for which the process of the store stays after an error, so that the others can read it."""
_SKEW_S = 1.0
"""Clock skew above which a note is printed: ages in `karmma-dist runs` and times in logs are wrong by the skew."""


@dataclass
class Outcome:
    """The result of a preflight: complete on rank 0; the other ranks only know whether it succeeded."""

    failures: list[str] = field(default_factory=list)
    """Failures, one line each, naming rank and node."""
    notes: list[str] = field(default_factory=list)
    ranks: list[Facts] = field(default_factory=list)
    bus_gb_per_s: float | None = None
    """Bus bandwidth of the slowest rank as nccl-tests counts it: 2 (n - 1) / n x bytes / time; None for one rank."""
    reported: bool = False
    """True if this rank has reported all that it knows to rank 0."""
    must_exit: bool = False
    """True if a thread of this process hangs in a driver, file system or network: end the process with `os._exit`."""


def preflight_here(chain: Sequence[Recipe], timeout_s: float, as_json: bool = False) -> int:
    """Run `preflight` for the job of this process's environment, print its report, and return the exit code.

    0: no failure; 1: a failure must be fixed; 2: the ranks do not divide a batch, which every rank computes by itself
    and rank 0 prints.
    """
    world = find_world(os.environ)
    try:
        check_batches(chain, world.size, finished_names(chain))
    except UserError as error:
        report(Outcome([str(error)], reported=True), world, as_json)
        return 2
    outcome = preflight(chain, world, timeout_s)
    report(outcome, world, as_json)
    if outcome.must_exit:
        sys.stdout.flush()
        os._exit(1)
    return 1 if outcome.failures else 0


def preflight(
    chain: Sequence[Recipe], world: World, timeout_s: float = 60.0, environment: Mapping[str, str] = os.environ
) -> Outcome:
    """Check the ranks of a job. Every rank must call this, outside any process group.

    Args:
        chain: Recipes to be trained; the last recipe's run folder is probed; may be empty.
        world: World of this rank.
        timeout_s: Seconds after which a missing rank or result is a failure.
        environment: Environment variables of the launcher.
    """
    outcome = Outcome()
    had_group = dist.is_initialized()
    if world.size == 1:  # nobody else needs its address
        world = replace(world, address="127.0.0.1", port=free_port())
    try:
        store = connect(world, timeout_s / 2, keep=world.size == 1 or hosts_store(world, environment))
    except UserError as error:
        outcome.failures = [f"rank {world.rank} ({node_name()}): {error}"]
        return outcome
    try:
        if world.rank == 0:
            _MainRank(chain, world, timeout_s, store, outcome).run(environment)
        else:
            _OtherRank(chain, world, timeout_s, store, outcome).run()
    except UserError as error:
        outcome.failures.append(str(error))
    except dist.DistError:
        host = node_name()
        outcome.failures.append(f"rank {world.rank} ({host}): rank 0 ({world.endpoint}) stopped answering")
    finally:
        if dist.is_initialized() and not (had_group or outcome.must_exit):
            dist.destroy_process_group()
    return outcome


def report(outcome: Outcome, world: World, as_json: bool = False) -> None:
    """Print a table of nodes, or all failures, on rank 0; on the other ranks only failures that rank 0 cannot know."""
    if world.rank and outcome.reported:
        return
    if as_json:
        fields = {"failures": outcome.failures, "notes": outcome.notes, "ranks": outcome.ranks}
        print(json.dumps({**fields, "bus_gb_per_s": outcome.bus_gb_per_s}, indent=1), flush=True)
        return
    for line in outcome.notes:
        print_line(f"note: {line}")
    for line in outcome.failures:
        print_line(f"error: {line}", err=True)
    if outcome.failures:
        return
    rows = []
    for host in dict.fromkeys(facts["host"] for facts in outcome.ranks):
        on_host = [facts for facts in outcome.ranks if facts["host"] == host]
        shards = ", ".join(sha[:12] for sha in on_host[0]["shards"].values())
        ranks = ", ".join(str(facts["rank"]) for facts in on_host)
        devices = " and ".join(dict.fromkeys(facts["device"]["name"] for facts in on_host))
        skew = f"{max((facts['clock_s'] for facts in on_host), key=abs):+.2f} s"
        rows.append([host, ranks, devices, on_host[0]["versions"]["torch"], shards or "not checked", skew])
    speed = "" if outcome.bus_gb_per_s is None else f": {outcome.bus_gb_per_s:.2f} GB/s bus bandwidth"
    reduced = f"all-reduce of {ALL_REDUCE_BYTES / 2**20:.0f} MiB over {world.size} ranks is correct{speed}"
    print_table(["node", "ranks", "device", "torch", "shards", "clock"], rows, footer=[reduced])


class _Rank:
    """The part of the preflight that every rank runs."""

    def __init__(
        self, chain: Sequence[Recipe], world: World, timeout_s: float, store: dist.Store, outcome: Outcome
    ) -> None:
        self.chain, self.world, self.timeout_s, self.store, self.outcome = chain, world, timeout_s, store, outcome
        self.facts = first_facts(world)
        self.limit_s = timeout_s / 5
        """Seconds for one stage of this rank, less than rank 0 waits, so that the rank itself can report what hangs."""

    def arrive(self) -> None:
        """Publish this rank's first facts.

        Raises:
            UserError: another process has this rank, or the first rank has another WORLD_SIZE.
        """
        rank, me = self.world.rank, f"{node_name()} pid {os.getpid()}"
        holder = self.store.compare_set(f"holder/{rank}", "", me).decode()
        size = int(self.store.compare_set("size", "", str(self.world.size)))
        misfit = ""
        if self.store.add(f"claims/{rank}", 1) > 1:
            misfit = f"two processes are rank {rank} ({holder}, {me}): give every process its own RANK"
        elif size != self.world.size:
            misfit = f"WORLD_SIZE={self.world.size} on rank {rank} ({me}), but {size} on the first rank: set it alike"
        if misfit:
            self.store.set("misfit", misfit)
            if hosts_store(self.world):  # the store goes with this process: the others must read it first
                self.store.set("start", json.dumps({"complete": False}))
                self.store.set("all is good", json.dumps(False))
                time.sleep(_TELL_S)
            raise UserError(misfit)
        self.put("hello", self.facts)

    def put(self, name: str, value: Any) -> None:
        """Publish a value under a name and this rank's number."""
        self.store.set(f"{name}/{self.world.rank}", json.dumps(value))

    def attempt(self, facts: Facts, name: str, work: Callable[[], Any], limit_s: float) -> None:
        """Call `facts.attempt`, and record in the outcome if `work` hangs."""
        self.outcome.must_exit |= not attempt(facts, name, work, limit_s)

    def publish_facts(self, probe: SharedFolderProbe | None) -> None:
        """Collect all facts of this rank and publish them."""
        world, ends = self.world, time.monotonic() + self.limit_s
        steps: dict[str, Callable[[], Any]] = {
            "device": lambda: device_facts(world),
            "versions": version_facts,
            "shards": lambda: shard_facts(self.chain, world.local_rank),
        }
        if probe is not None:
            steps["run folder"] = lambda: probe.join(world.rank)
        for name, step in steps.items():
            self.attempt(self.facts, name, step, max(1.0, ends - time.monotonic()))
        self.put("facts", self.facts)

    def reduce(self) -> None:
        """Join the all-reduce and publish its result."""
        result: Facts = {"failures": []}
        self.attempt(result, "all-reduce", lambda: time_all_reduce(self.world, self.limit_s), self.limit_s)
        self.put("reduced", result)


class _OtherRank(_Rank):
    """Any rank except 0: it follows rank 0's signals and reports to it."""

    def run(self) -> None:
        """Run this rank's part until rank 0 publishes the result."""
        self.arrive()
        start = self._receive("start")
        self.put("clock", time.time())
        if start["complete"]:
            self.publish_facts(SharedFolderProbe(self.chain[-1].run_dir, start["token"]) if start["probe"] else None)
            if self._receive("facts are good"):
                self.reduce()
        if not self._receive("all is good"):
            misfit = self.store.get("misfit").decode() if self.store.check(["misfit"]) else None
            self.outcome.failures.append(misfit or "see the errors of rank 0")
        self.put("bye", True)
        self.outcome.reported = True

    def _receive(self, name: str) -> Any:
        self.store.wait([name], datetime.timedelta(seconds=self.timeout_s))
        return json.loads(self.store.get(name))


class _MainRank(_Rank):
    """Rank 0: it waits for the other ranks, compares their facts, and decides what is wrong."""

    def run(self, environment: Mapping[str, str]) -> None:
        """Run the preflight from the arrival of the ranks until all of them have received its result."""
        self.arrive()
        hello = self._collect("hello", self.timeout_s / 2)
        misfit = self.store.get("misfit").decode() if self.store.check(["misfit"]) else None
        if misfit is not None:
            self.outcome.failures.append(misfit)
        if misfit is not None or len(hello) < self.world.size:
            self._name_missing(hello, environment)
            self._broadcast("start", {"complete": False})
        else:
            self._check(hello)
        self._broadcast("all is good", not self.outcome.failures)
        self.put("bye", True)
        self._collect("bye", min(5.0, self.limit_s), hello)

    def _check(self, hello: dict[int, Facts]) -> None:
        token = secrets.token_hex(8)
        probe = SharedFolderProbe(self.chain[-1].run_dir, token) if self.chain else None
        if probe is not None:
            before = len(self.facts["failures"])
            self.attempt(self.facts, "run folder", probe.create, self.limit_s)
            probe = probe if len(self.facts["failures"]) == before else None
        try:
            self._broadcast("start", {"complete": True, "token": token, "probe": probe is not None})
            began = time.time()
            self.put("clock", began)
            self.publish_facts(probe)
            self._compare(hello, probe)
        finally:
            if probe is not None:
                probe.remove()
        self._note_skew(began)
        good = not self.outcome.failures
        self._broadcast("facts are good", good)
        if good:
            self.reduce()
            self._collect_reduction()

    def _name_missing(self, hello: Mapping[int, Facts], environment: Mapping[str, str]) -> None:
        hosts = planned_hosts(environment, self.world.size, {rank: facts["host"] for rank, facts in hello.items()})
        for rank in sorted(set(range(self.world.size)) - hello.keys()):
            self.outcome.failures.append(
                f"rank {rank} ({hosts.get(rank, 'node unknown')}): did not arrive within {self.timeout_s / 2:.0f} s "
                f"({len(hello)} of {self.world.size} did): see its own log, and check that its node is up"
            )

    def _compare(self, hello: Mapping[int, Facts], probe: SharedFolderProbe | None) -> None:
        facts = self._collect("facts", self.timeout_s / 4)
        for rank in hello.keys() - facts.keys():
            facts[rank] = {**hello[rank], "failures": [f"did not report within {self.timeout_s / 4:.0f} s"]}
        ranks = [facts[rank] for rank in sorted(facts)]
        if probe is not None:
            wrote = [rank_facts for rank_facts in ranks if rank_facts.get("run folder")]
            result: Facts = {"failures": []}
            self.attempt(result, "seen", lambda: [probe.sees(writer["rank"]) for writer in wrote], self.limit_s)
            for writer, is_seen in zip(wrote, result.get("seen", [False] * len(wrote)), strict=True):
                if not is_seen:
                    writer["failures"].append(f"{probe.parent}: rank 0 does not see the file that this rank wrote")
        self.outcome.ranks = ranks
        self.outcome.failures += differences(ranks)

    def _collect_reduction(self) -> None:
        reduced = self._collect("reduced", self.timeout_s / 4)
        for facts in self.outcome.ranks:
            facts["failures"] = reduced.get(facts["rank"], {"failures": ["all-reduce: no report"]})["failures"]
        self.outcome.failures += differences(self.outcome.ranks)
        speeds = [result["all-reduce"] for result in reduced.values() if result.get("all-reduce") is not None]
        self.outcome.bus_gb_per_s = min(speeds, default=None)

    def _note_skew(self, began: float) -> None:
        clocks = self._collect("clock", 1.0)
        for facts in self.outcome.ranks:
            ahead = clocks.get(facts["rank"], began) - began
            facts["clock_s"] = ahead
            if abs(ahead) > _SKEW_S:
                side = "ahead of" if ahead > 0 else "behind"
                self.outcome.notes.append(
                    f"{rank_names([facts])}: its clock is {abs(ahead):.1f} s {side} rank 0's: check NTP"
                )

    def _broadcast(self, name: str, value: Any) -> None:
        self.store.set(name, json.dumps(value))

    def _collect(self, name: str, timeout_s: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """Return by rank the values that ranks (default: all) publish under a name within `timeout_s` seconds."""
        keys = {rank: f"{name}/{rank}" for rank in (range(self.world.size) if ranks is None else ranks)}
        with contextlib.suppress(dist.DistStoreError):  # some ranks are missing: the caller names them
            self.store.wait(list(keys.values()), datetime.timedelta(seconds=timeout_s))
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}
