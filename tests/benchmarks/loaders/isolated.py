"""Each measurement in a process of its own, forked from one that has everything imported and nothing running.

So no arm inherits another's threads, caches or garbage, and none pays for imports.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

_T = TypeVar("_T")
_FORK = multiprocessing.get_context("fork")
_END_S = 60


@dataclass(frozen=True)
class Cost:
    """What an action cost."""

    cpu_s: float
    """User and system seconds of the process and of the workers it started, until they have ended."""
    wall_s: float


def isolated(action: Callable[[], _T]) -> _T:
    """Run the action in a forked process and return its (picklable) result.

    Raises:
        SystemExit: it failed; its traceback has been printed.
    """
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_child, args=(sender, action))
    process.start()
    sender.close()
    try:
        result: _T = pickle.loads(receiver.recv_bytes())
    except EOFError:
        raise SystemExit("an arm failed: no figures") from None
    finally:
        process.join()
    return result


def timed(action: Callable[[], _T]) -> tuple[Cost, _T]:
    """Run the action, end the workers it leaves behind, and say what both cost."""
    gc.collect()
    gc.freeze()
    cpu_s, started = _cpu_s(), time.perf_counter()
    result = action()
    wall_s = time.perf_counter() - started
    gc.collect()  # a loader in a reference cycle still holds its workers
    end_workers()
    return Cost(_cpu_s() - cpu_s, wall_s), result


def end_workers() -> None:
    """Wait for this process's workers, so that their time is counted."""
    for worker in multiprocessing.active_children():
        worker.join(_END_S)
        if worker.is_alive():
            raise RuntimeError(f"{worker.name} does not end: its CPU seconds would go uncounted")


def in_processes(action: Callable[[int], Any], num: int) -> None:
    """Run `action(0) ... action(num - 1)` in as many processes; with none, run `action(0)` here."""
    if num == 0:
        action(0)
        return
    workers = [_FORK.Process(target=action, args=(number,)) for number in range(num)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"{worker.name} failed")


def pss_mib(pid: int) -> float:
    """Proportional set size of a process in MiB: shared pages count as the process's share."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def worker_pids() -> list[int]:
    """Process ids of this process's workers, in the order they started."""
    return sorted(worker.pid for worker in multiprocessing.active_children() if worker.pid is not None)


def _cpu_s() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _child(sender: Connection, action: Callable[[], Any]) -> None:
    try:
        sender.send_bytes(pickle.dumps(action()))  # by value, also tensors: this process ends before they are read
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        sender.close()
