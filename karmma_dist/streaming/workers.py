"""The worker processes that make batches, on webdataset's `DataPipeline` and `WebLoader`, and their failures.

A worker that stalls, is killed or fails ends the iteration with an error that names its current clip. No process is
left behind, and every wait is bounded.
"""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.utils.data
import webdataset as wds

from karmma_dist.errors import UserError
from karmma_dist.processes import end_with_parent
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.handover import check_handover, described, is_of_handover, report_unsent
from karmma_dist.streaming.order import Slice
from karmma_dist.streaming.worker_status import Activity, StatusBoard, WorkerStatus

_POLL_S = 5.0
"""Seconds between a waiting trainer's checks that its workers are alive."""
_JOIN_S = 30.0
"""Seconds that killed workers may take to end."""
_DEATH_S = 2.0
"""Seconds in which a worker whose batch breaks off is seen to have ended."""

_abandoned: list[Any] = []
"""Torch's iterators whose workers were killed. They are never collected: torch would then shut the workers down
gracefully, through locks that a killed worker may hold forever."""

_HINTS = {
    signal.SIGKILL: "usually the machine or job ran out of memory: lower data.num_workers or training.batch_size, "
    "or request more memory",
    signal.SIGBUS: "usually shared memory is full: make /dev/shm larger, or lower data.num_workers",
    signal.SIGSEGV: "the decoder crashed: check the clip with karmma-dist inspect",
}


class BatchMaker(Protocol):
    """An object that turns a slice of places into a batch and records its stage."""

    def batch(self, part: Slice, activity: Activity) -> Batch:
        """Read, decode and collate one slice."""


class Batches(Iterator[Batch]):
    """The batches of one rank, made by worker processes (or, with `num_workers` 0, in this process).

    Worker w of W makes every W-th batch, so the stream is the same for any W. Use it as a context manager if other
    code can fail between two batches: leaving the block ends the workers, and the death of a worker, which torch
    reports in the middle of other work, becomes the same one-line error as in `next`.

    Args:
        maker: Maker of the batches; it is copied to every worker.
        slices: Function that returns an iterator over all slices.
        num_workers: Number of processes.
        stall_s: Seconds after which a missing batch is an error; 0 for no limit.
        rank: Rank of this process, for messages.
    """

    def __init__(
        self,
        maker: BatchMaker,
        slices: Callable[[], Iterator[Slice]],
        num_workers: int,
        stall_s: float = 0.0,
        rank: int = 0,
    ) -> None:
        self._num_workers, self._stall_s, self._rank = num_workers, stall_s, rank
        self._board = StatusBoard(max(num_workers, 1))
        self._num_taken = 0
        pipeline = wds.DataPipeline(_Source(slices), wds.map(_Work(maker, self._board, rank)))
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            timeout=min(stall_s or _POLL_S, _POLL_S) if num_workers else 0,
            worker_init_fn=partial(_start_worker, self._board),
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[Batch | Exception] | None = self._started(loader.stage(0), before)
        self._processes: list[BaseProcess] = list(set(multiprocessing.active_children()) - before)

    def _started(self, loader: Any, others: set[BaseProcess]) -> Iterator[Batch | Exception]:
        """Start the workers; return torch's iterator over their batches.

        Raises:
            UserError: the machine does not allow it; no worker is left behind.
        """
        if not self._num_workers:
            return iter(loader)
        check_handover()
        try:
            return iter(loader)
        except (OSError, RuntimeError) as error:
            is_of_loader = isinstance(error, RuntimeError) and _is_of_loader(error)
            if isinstance(error, RuntimeError) and not is_of_loader and "start new thread" not in str(error):
                raise
            self._processes = list(set(multiprocessing.active_children()) - others)
            death = self._death(_DEATH_S) if is_of_loader else None  # a worker that ended before all had started
            num_started = len(self._processes)
            self._kill()
            _abandoned.extend(frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
            raise death or UserError(
                f"rank {self._rank}: only {num_started} of {self._num_workers} loader workers can be started: "
                f"{described(error)}"
            ) from None

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [process.pid for process in self._processes if process.pid is not None]

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            UserError: a worker stalled, was killed, or met a user's error.
        """
        if self._iterator is None:
            raise StopIteration
        depth = max(self._board.num_made() - self._num_taken, 0) if self._num_workers else 0
        try:
            item = self._wait(self._iterator)
            if isinstance(item, Exception):
                raise item
        except StopIteration:
            self.close()
            raise
        except BaseException:
            if threading.current_thread() is threading.main_thread():  # in other threads the block's owner does it
                self.close(kill=True)
            raise
        self._num_taken += 1
        item.stats.queue_depth = depth
        return item

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        death = self._death() if _is_of_loader(error) else None
        self.close(kill=error is not None)
        if death is not None:
            raise death from None

    def close(self, *, kill: bool = False) -> None:
        """End the workers gracefully, or by SIGKILL if they may no longer respond."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        if kill and self._processes:
            _abandoned.append(iterator)
            self._kill()
            _forget_workers(iterator)
        else:
            del iterator  # the last reference: torch tells its workers to end, waits, and terminates the rest
            if any(process.is_alive() for process in self._processes):
                self._kill()

    def _wait(self, iterator: Iterator[Batch | Exception]) -> Batch | Exception:
        asked = time.monotonic()
        while True:
            try:
                return next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_of_loader(error):
                    raise self._unreceived(error) from None
                death = self._death()
                if death is not None:
                    raise death from None
                if "timed out" not in str(error):
                    raise
                waited = time.monotonic() - asked
                if self._stall_s and waited >= self._stall_s:
                    raise self._stall(waited) from None

    def _unreceived(self, error: Exception) -> Exception:
        """Return what ends the iteration if a batch cannot be received; the error itself if it is another one."""
        if not self._num_workers or not is_of_handover(error):
            return error
        death = self._death(_DEATH_S)
        if death is not None:
            return death
        worker = self._num_taken % self._num_workers
        return UserError(f"rank {self._rank}: no batch can be received from loader worker {worker}: {described(error)}")

    def _stall(self, waited: float) -> UserError:
        worker = self._num_taken % self._num_workers
        status = self._board.read(worker)
        duration = f"{time.monotonic() - status.since:.0f} s" if status.pid else "the whole time"
        hint = "check that the disk or network with the shards responds"
        if status.stage == "handing over":
            hint = "check that this machine has free memory and CPU time"
        return UserError(
            f"rank {self._rank}: no batch for {waited:.0f} s: loader worker {worker} (pid {status.pid or '?'}) has "
            f"been {status} for {duration}: {hint}, or raise data.stall_s (now {self._stall_s:g} s, 0 waits forever)"
        )

    def _death(self, wait_s: float = 0.0) -> UserError | None:
        """Return the error of a worker that was killed or failed, or None.

        Args:
            wait_s: Seconds to wait for one to end.
        """
        if wait_s:
            multiprocessing.connection.wait([process.sentinel for process in self._processes], wait_s)
        for process in self._processes:
            process.join(0)
            if process.exitcode:
                return self._death_error(process.pid, process.exitcode)
        return None

    def _death_error(self, pid: int | None, code: int) -> UserError:
        by_pid: dict[int, tuple[int, WorkerStatus]] = {}
        for slot in range(self._board.num_slots):
            status = self._board.read(slot)
            by_pid[status.pid] = (slot, status)
        number, last_status = by_pid.get(pid or -1, ("?", WorkerStatus(0, 0, 0.0, "starting", "", "", "")))
        if last_status.error:
            return UserError(
                f"rank {self._rank}: loader worker {number} (pid {pid}) failed while {last_status}: {last_status.error}"
            )
        end, hint = f"ended with exit code {code}", "see its output for the reason"
        if code < 0:
            end = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            hint = _HINTS.get(signal.Signals(-code), "find out who sent it")
        return UserError(f"rank {self._rank}: loader worker {number} (pid {pid}) {end} while {last_status}: {hint}")

    def _kill(self) -> None:
        with _unnoticed_by_torch():
            for process in self._processes:
                process.kill()
            until = time.monotonic() + _JOIN_S
            for process in self._processes:
                process.join(max(until - time.monotonic(), 0))


def _start_worker(board: StatusBoard, worker: int) -> None:
    """Ignore signals to the whole job, and Ctrl-C, end together with the trainer, and say what ends this worker.

    The trainer handles these signals: it still has to save. Torch's own check of the trainer is not enough: a batch
    that is larger than a pipe and that no process takes any more would block the worker forever.
    """

    def fail(error: BaseException) -> None:
        board.fail(worker, os.getpid(), described(error))
        os._exit(1)

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    report_unsent(fail)
    try:
        end_with_parent()
    except RuntimeError as error:  # no thread can be started
        fail(error)


class _Source:
    """The first stage of the pipeline: every W-th slice, from the worker's number on, generated lazily."""

    def __init__(self, slices: Callable[[], Iterator[Slice]]) -> None:
        self._slices = slices

    def __call__(self) -> Iterator[Slice]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return itertools.islice(self._slices(), first, None, stride)


class _Work:
    """The second stage: a slice becomes a batch, or the exception that was raised.

    An exception is handed over as an item: raised in a worker it would arrive as a traceback's text. A bug keeps its
    type, and a note names the clip and the place where it was raised.
    """

    def __init__(self, maker: BatchMaker, board: StatusBoard, rank: int) -> None:
        self._maker: BatchMaker | bytes = maker
        self._board, self._rank = board, rank
        self._activity: Activity | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with the maker as bytes: what fails to load it in a worker is then an item, too."""
        maker = self._maker if isinstance(self._maker, bytes) else pickle.dumps(self._maker)
        return {**self.__dict__, "_maker": maker}

    def __call__(self, part: Slice) -> Batch | Exception:
        worker = torch.utils.data.get_worker_info()
        if self._activity is None:
            self._activity = Activity(self._board, 0 if worker is None else worker.id, os.getpid())
        process = "" if worker is None else f", loader worker {worker.id}"
        try:
            maker: BatchMaker = pickle.loads(self._maker) if isinstance(self._maker, bytes) else self._maker
            self._maker = maker
            return maker.batch(part, self._activity)
        except UserError as error:
            return error
        except (ImportError, MemoryError) as error:
            return UserError(f"rank {self._rank}{process}, while {self._activity.status}: {described(error)}")
        except Exception as error:
            trace = traceback.format_exc()
            error.add_note(f"rank {self._rank}{process}, while {self._activity.status}")
            if worker is None:
                return error
            error.add_note(trace)
            return _portable(error)


def _portable(error: Exception) -> Exception:
    """Return the error, or a `RuntimeError` with the same text if pickling would not preserve it."""
    try:
        sent = pickle.loads(pickle.dumps(error))
        if type(sent) is type(error) and str(sent) == str(error) and sent.__notes__ == error.__notes__:
            return error
    except Exception as problem:  # its __reduce__ and __init__ may raise any exception
        error.add_note(f"(it cannot be pickled: {problem})")
    replacement = RuntimeError(f"{type(error).__name__}: {error}")
    replacement.__notes__ = list(error.__notes__)
    return replacement


def _forget_workers(iterator: Any) -> None:
    """Remove killed workers from those that torch's SIGCHLD handler watches, as torch does after it has ended them.

    Otherwise one that takes long to end would raise an error at an arbitrary line of the main thread.
    """
    if getattr(iterator, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def _is_of_loader(error: BaseException | None) -> bool:
    """Return True if torch's loader raised the error: a worker died or a batch timed out."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader")


@contextmanager
def _unnoticed_by_torch() -> Iterator[None]:
    """Disable torch's SIGCHLD handler while workers are killed: it would raise at any line of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
