"""This process and others: which of them run, and child processes that end together with their parent.

A worker of `multiprocessing` watches its parent from a thread (`end_with_parent`). The kernel could kill it instead,
but would do so as soon as the starting thread ends, which need not be the parent's main thread. Another program cannot
run such a thread: there the kernel kills it (`dying_with_parent`), if it was started by the main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


def machine() -> str | None:
    """Return the boot and the pid namespace that pids of this process mean something in; None where nobody can tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None  # not Linux


def started_at(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since boot; None if it is gone.

    Pids are used again, these pairs are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


@contextlib.contextmanager
def worker_pool(num: int) -> Iterator[ProcessPoolExecutor]:
    """Start up to `num` processes for `submit_all`.

    If the block ends by an error or Ctrl-C, the workers are terminated in the middle of their tasks: a task must not
    leave results that count before they are complete.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(num, mp_context=multiprocessing.get_context("spawn"), initializer=_worker_starts)
    try:
        yield pool
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def submit_all(
    pool: ProcessPoolExecutor, task: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]
) -> list[Future[Result]]:
    """Submit `task(*arguments)` for all arguments to the workers."""
    # Ctrl-C reaches every process of a terminal. Workers start here and inherit the mask: it must not end them with a
    # traceback before they ignore it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(task, *task_arguments) for task_arguments in arguments]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_starts() -> None:
    """Ignore Ctrl-C, which the parent handles, and end with the parent; every worker runs this first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, with exit code 1 as soon as its parent has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process that multiprocessing started"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="end with the parent", daemon=True).start()


def dying_with_parent(unmasked: set[int | signal.Signals]) -> Callable[[], None]:
    """Return a `preexec_fn` for children that the kernel kills as soon as this thread ends.

    Args:
        unmasked: Signal mask of the child: the mask of this process before it blocked signals.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(128 + signal.SIGKILL)

    return prepare


def kill_sessions(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the sessions of children that each lead one, and wait until the children have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):  # its session has ended
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def signal_name(number: int) -> str:
    """Return the name of a signal: SIGTERM."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
