"""Worker processes that end with the one that started them, whatever ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def worker_pool(num: int) -> Iterator[ProcessPoolExecutor]:
    """Start up to `num` processes for `submit_all`.

    When the block ends by an error or Ctrl-C, the workers are stopped in the middle of what they do: a task must leave
    nothing behind that counts before it is complete.
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
    """Give `task(*arguments)` for all arguments to the workers."""
    # Ctrl-C reaches every process of a terminal. Workers inherit the mask when they start, here: until they have
    # learned to ignore it, it must not end them with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return [pool.submit(task, *some) for some in arguments]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker_starts() -> None:
    """In each worker: leave Ctrl-C to the parent, and end with it even when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
