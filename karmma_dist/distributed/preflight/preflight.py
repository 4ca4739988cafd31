"""Before a run, on every rank of it: is everything there, the same everywhere, and do the ranks reach each other?

    srun karmma-dist doctor --distributed RECIPE

Ranks talk through a key-value store on rank 0, whose waits have limits, and not through collectives, which hang when a
rank is missing: so whoever does not come, differs or hangs is named, with its node, within `timeout_s`. Only the last
step is a collective.

    arrival    half of the time      every rank says hello; then one signal starts all, which also shows clock skew
    facts      a quarter             device, versions, shards, and a file in the run folder that the others see
    all-reduce a quarter             64 MB over the backend that training uses, values checked
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
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read at import: torch's own words on what is reported below

import torch.distributed as dist

from karmma_dist.distributed.preflight.facts import (
    Facts,
    attempt,
    device_facts,
    differences,
    first_facts,
    named,
    shard_facts,
    version_facts,
)
from karmma_dist.distributed.preflight.probes import (
    ALL_REDUCE_BYTES,
    MeetingFolder,
    connect,
    planned_hosts,
    time_all_reduce,
)
from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names
from karmma_dist.runs.process import node_name
from karmma_dist.terminal import print_line, print_table

_SKEW_S = 1.0
"""Clocks that differ by more are noted: ages in `karmma-dist runs` and times in logs are wrong by it."""


@dataclass
class Outcome:
    """What came of it; complete on rank 0, the others know whether it went well."""

    failures: list[str] = field(default_factory=list)
    """One line each, naming rank and node."""
    notes: list[str] = field(default_factory=list)
    ranks: list[Facts] = field(default_factory=list)
    bus_gb_per_s: float | None = None
    """Of the slowest rank, as nccl-tests counts it: 2 (n - 1) / n x bytes / time. None for a single rank."""
    heard: bool = False
    """Rank 0 knows what this rank knows."""
    must_exit: bool = False
    """A thread of this process hangs in a driver, file system or network: end it with `os._exit`."""


def preflight_here(chain: Sequence[Recipe], timeout_s: float, as_json: bool = False) -> int:
    """`preflight` of the job that the environment describes, and its report; returns the exit code.

    0: the ranks fit together; 1: something must be fixed; 2: they do not divide a batch, which each of them knows at
    once and rank 0 says.
    """
    world = find_world(os.environ)
    try:
        check_batches(chain, world.size, finished_names(chain))
    except UserError as error:
        report(Outcome([str(error)], heard=True), world, as_json)
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
        chain: the recipes to be trained, the last one's run folder is tried; may be empty.
        world: this rank.
        timeout_s: seconds after which whatever is still missing is a failure.
        environment: of a launcher.
    """
    outcome = Outcome()
    had_group = dist.is_initialized()
    try:
        kept_by_torchrun = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = connect(world, timeout_s / 2, keep=world.rank == 0 and not kept_by_torchrun)
    except (RuntimeError, ValueError) as error:
        outcome.failures = [_unreachable(world, timeout_s / 2, error)]
        return outcome
    try:
        if world.rank == 0:
            _Main(chain, world, timeout_s, store, outcome).run(environment)
        else:
            _Other(chain, world, timeout_s, store, outcome).run()
    except dist.DistError:
        host = node_name()
        outcome.failures.append(f"rank {world.rank} ({host}): rank 0 ({world.address}:{world.port}) stopped answering")
    finally:
        if dist.is_initialized() and not (had_group or outcome.must_exit):
            dist.destroy_process_group()
    return outcome


def _unreachable(world: World, timeout_s: float, error: Exception) -> str:
    host, where = node_name(), f"{world.address}:{world.port}"
    if "EADDRINUSE" in str(error):
        return f"rank {world.rank} ({host}): {where} is in use: set another MASTER_PORT"
    if world.rank == 0:
        return f"rank 0 ({host}): cannot be reached at {where} from its own node: is MASTER_ADDR another node's?"
    return (
        f"rank {world.rank} ({host}): does not reach rank 0 at {where} within {timeout_s:.0f} s: rank 0 did not start, "
        "or a firewall, a wrong MASTER_ADDR or MASTER_PORT is between them"
    )


def report(outcome: Outcome, world: World, as_json: bool = False) -> None:
    """Rank 0 prints a table of nodes, or what is wrong, a line each; the others only what rank 0 cannot know."""
    if world.rank and outcome.heard:
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
        here = [facts for facts in outcome.ranks if facts["host"] == host]
        shards = ", ".join(sha[:12] for sha in here[0]["shards"].values())
        ranks = ", ".join(str(facts["rank"]) for facts in here)
        devices = " and ".join(dict.fromkeys(facts["device"]["name"] for facts in here))
        skew = f"{max((facts['clock_s'] for facts in here), key=abs):+.2f} s"
        rows.append([host, ranks, devices, here[0]["versions"]["torch"], shards or "not looked at", skew])
    speed = "" if outcome.bus_gb_per_s is None else f": {outcome.bus_gb_per_s:.2f} GB/s bus bandwidth"
    reduced = f"all-reduce of {ALL_REDUCE_BYTES / 2**20:.0f} MiB over {world.size} ranks is right{speed}"
    print_table(["node", "ranks", "device", "torch", "shards", "clock"], rows, footer=[reduced])


class _Rank:
    """What every rank does."""

    def __init__(
        self, chain: Sequence[Recipe], world: World, timeout_s: float, store: dist.Store, outcome: Outcome
    ) -> None:
        self.chain, self.world, self.timeout_s, self.store, self.outcome = chain, world, timeout_s, store, outcome
        self.facts = first_facts(world)
        self.limit_s = timeout_s / 5
        """For one stage of this rank: less than rank 0 waits for it, so that the rank itself can say what hangs."""

    def put(self, name: str, value: Any) -> None:
        """Say something under this rank's number."""
        self.store.set(f"{name}/{self.world.rank}", json.dumps(value))

    def attempt(self, facts: Facts, name: str, work: Callable[[], Any], limit_s: float) -> None:
        """`rank_facts.attempt`, keeping in mind whether something hangs."""
        self.outcome.must_exit |= not attempt(facts, name, work, limit_s)

    def look(self, meeting: MeetingFolder | None) -> None:
        """Find out all facts, and tell rank 0."""
        world, ends = self.world, time.monotonic() + self.limit_s
        steps: dict[str, Callable[[], Any]] = {
            "device": lambda: device_facts(world),
            "versions": version_facts,
            "shards": lambda: shard_facts(self.chain, world.local_rank),
        }
        if meeting is not None:
            steps["run folder"] = lambda: meeting.join(world.rank)
        for name, step in steps.items():
            self.attempt(self.facts, name, step, max(1.0, ends - time.monotonic()))
        self.put("facts", self.facts)

    def reduce(self) -> None:
        """All-reduce with the others, and tell rank 0 how it went."""
        done: Facts = {"failures": []}
        self.attempt(done, "all-reduce", lambda: time_all_reduce(self.world, self.limit_s), self.limit_s)
        self.put("reduced", done)


class _Other(_Rank):
    """Ranks 1, 2, ...: they do what rank 0 says and report to it."""

    def run(self) -> None:
        """Until rank 0 says that it is over."""
        self.put("hello", self.facts)
        start = self._hear("start")
        self.put("clock", time.time())
        if start["complete"]:
            self.look(MeetingFolder(self.chain[-1].run_dir, start["token"]) if start["meeting"] else None)
            if self._hear("facts are good"):
                self.reduce()
        if not self._hear("all is good"):
            self.outcome.failures.append("see rank 0's lines")
        self.put("bye", True)
        self.outcome.heard = True

    def _hear(self, name: str) -> Any:
        self.store.wait([name], datetime.timedelta(seconds=self.timeout_s))
        return json.loads(self.store.get(name))


class _Main(_Rank):
    """Rank 0: it waits for the others, compares, and says what is wrong."""

    def run(self, environment: Mapping[str, str]) -> None:
        """From the first rank's arrival until the last one has heard what came of it."""
        self.put("hello", self.facts)
        hello = self._collect("hello", self.timeout_s / 2)
        if len(hello) < self.world.size:
            self._name_missing(hello, environment)
            self._tell("start", {"complete": False})
        else:
            self._check(hello)
        self._tell("all is good", not self.outcome.failures)
        self.put("bye", True)
        self._collect("bye", min(5.0, self.limit_s), hello)

    def _check(self, hello: dict[int, Facts]) -> None:
        token = secrets.token_hex(8)
        meeting = MeetingFolder(self.chain[-1].run_dir, token) if self.chain else None
        if meeting is not None:
            before = len(self.facts["failures"])
            self.attempt(self.facts, "run folder", meeting.make, self.limit_s)
            meeting = meeting if len(self.facts["failures"]) == before else None
        try:
            self._tell("start", {"complete": True, "token": token, "meeting": meeting is not None})
            began = time.time()
            self.put("clock", began)
            self.look(meeting)
            self._compare(hello, meeting)
        finally:
            if meeting is not None:
                meeting.remove()
        self._note_skew(began)
        good = not self.outcome.failures
        self._tell("facts are good", good)
        if good:
            self.reduce()
            self._judge_reduction()

    def _name_missing(self, hello: Mapping[int, Facts], environment: Mapping[str, str]) -> None:
        hosts = planned_hosts(environment, self.world.size, {rank: facts["host"] for rank, facts in hello.items()})
        for rank in sorted(set(range(self.world.size)) - hello.keys()):
            self.outcome.failures.append(
                f"rank {rank} ({hosts.get(rank, 'node unknown')}): did not arrive within {self.timeout_s / 2:.0f} s "
                f"({len(hello)} of {self.world.size} did): see its own lines, and whether its node is up"
            )

    def _compare(self, hello: Mapping[int, Facts], meeting: MeetingFolder | None) -> None:
        facts = self._collect("facts", self.timeout_s / 4)
        for rank in hello.keys() - facts.keys():
            facts[rank] = {**hello[rank], "failures": [f"did not report within {self.timeout_s / 4:.0f} s"]}
        ranks = [facts[rank] for rank in sorted(facts)]
        wrote = [one for one in ranks if meeting is not None and one.get("run folder")]
        if meeting is not None:
            seen: Facts = {"failures": []}
            looked = meeting
            self.attempt(seen, "seen", lambda: [looked.sees(one["rank"]) for one in wrote], self.limit_s)
            for one, there in zip(wrote, seen.get("seen", [False] * len(wrote)), strict=True):
                if not there:
                    one["failures"].append(f"{meeting.parent}: rank 0 does not see there what this rank wrote")
        self.outcome.ranks = ranks
        self.outcome.failures += differences(ranks)

    def _judge_reduction(self) -> None:
        reduced = self._collect("reduced", self.timeout_s / 4)
        for facts in self.outcome.ranks:
            facts["failures"] = reduced.get(facts["rank"], {"failures": ["all-reduce: no word from it"]})["failures"]
        self.outcome.failures += differences(self.outcome.ranks)
        speeds = [done["all-reduce"] for done in reduced.values() if done.get("all-reduce") is not None]
        self.outcome.bus_gb_per_s = min(speeds, default=None)

    def _note_skew(self, began: float) -> None:
        clocks = self._collect("clock", 1.0)
        for facts in self.outcome.ranks:
            ahead = clocks.get(facts["rank"], began) - began
            facts["clock_s"] = ahead
            if abs(ahead) > _SKEW_S:
                way = "ahead of" if ahead > 0 else "behind"
                self.outcome.notes.append(f"{named([facts])}: its clock is {abs(ahead):.1f} s {way} rank 0's: see NTP")

    def _tell(self, name: str, value: Any) -> None:
        self.store.set(name, json.dumps(value))

    def _collect(self, name: str, timeout_s: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What the ranks (default: all) have said under a name, waiting for those that have not yet."""
        keys = {rank: f"{name}/{rank}" for rank in (range(self.world.size) if ranks is None else ranks)}
        with contextlib.suppress(dist.DistStoreError):  # some are missing: the caller names them
            self.store.wait(list(keys.values()), datetime.timedelta(seconds=timeout_s))
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}
