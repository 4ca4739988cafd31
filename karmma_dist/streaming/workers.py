"""Worker processes that make batches, on webdataset's `DataPipeline` and `WebLoader`, and what becomes of them.

A worker that stalls, is killed or fails ends the iteration with an error that names the clip it held. No process is
left behind, and nothing here waits without a bound.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol

import torch
import torch.utils.data
import webdataset as wds

from karmma_dist.errors import UserError
from karmma_dist.processes import end_with_parent
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.order import Slice
from karmma_dist.streaming.worker_status import Activity, Board, Doing

_POLL_S = 5.0
"""How often a waiting trainer looks whether its workers live."""
_JOIN_S = 30.0
"""How long killed workers may take to be gone."""

_abandoned: list[Any] = []
"""Torch's iterators whose workers were killed. Were they collected, torch would shut the workers down in good order,
through locks that a killed worker may hold for ever."""

_HINTS = {
    signal.SIGKILL: "mostly the machine or job ran out of memory: lower data.num_workers or training.batch_size, "
    "or ask for more memory",
    signal.SIGBUS: "mostly shared memory is full: make /dev/shm larger, or lower data.num_workers",
    signal.SIGSEGV: "the decoder crashed: check the clip with karmma-dist inspect",
}


class BatchMaker(Protocol):
    """Turns a slice of places into a batch, saying what it does."""

    def batch(self, part: Slice, activity: Activity) -> Batch:
        """Read, decode and put together one slice."""


class Batches(Iterator[Batch]):
    """The batches of one rank, made by worker processes (or, with `num_workers` 0, in this one).

    Worker w of W makes every W-th batch, so the stream is the same for any W. Use it as a context manager wherever
    something else can fail between two batches: leaving the block ends the workers, and a worker's death that torch
    reports in the middle of other work becomes the same one line as in `next`.

    Args:
        maker: makes the batches; it is copied into every worker.
        slices: gives the slices, from the first on, each time it is called.
        num_workers: processes.
        stall_s: seconds after which a batch that does not come is an error; 0: never.
        rank: this process's, for messages.
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
        self._board = Board(max(num_workers, 1))
        self._num_taken = 0
        pipeline = wds.DataPipeline(_Source(slices), wds.map(_Work(maker, self._board, rank)))
        loader = wds.WebLoader(
            pipeline,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=2 if num_workers else None,
            timeout=min(stall_s or _POLL_S, _POLL_S) if num_workers else 0,
            worker_init_fn=_start_worker,
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[Batch | Exception] | None = iter(loader.stage(0))  # torch's: its workers start here
        self._processes: list[BaseProcess] = list(set(multiprocessing.active_children()) - before)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [process.pid for process in self._processes if process.pid is not None]

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            UserError: a worker stalled or was killed, or met an error of the user's.
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
            if threading.current_thread() is threading.main_thread():  # elsewhere it is for the block's owner to do
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
        """End the workers: in good order, or by SIGKILL where they may no longer listen."""
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            return
        if kill and self._processes:
            _abandoned.append(iterator)
            self._kill()
            _forget_workers(iterator)
        else:
            del iterator  # the last reference: torch tells its workers to end, waits for them, and ends those left
            if any(process.is_alive() for process in self._processes):
                self._kill()

    def _wait(self, iterator: Iterator[Batch | Exception]) -> Batch | Exception:
        asked = time.monotonic()
        while True:
            try:
                return next(iterator)
            except RuntimeError as error:
                if not _is_of_loader(error):
                    raise
                death = self._death()
                if death is not None:
                    raise death from None
                if "timed out" not in str(error):
                    raise
                waited = time.monotonic() - asked
                if self._stall_s and waited >= self._stall_s:
                    raise self._stall(waited) from None

    def _stall(self, waited: float) -> UserError:
        worker = self._num_taken % self._num_workers
        doing = self._board.read(worker)
        lasts = f"{time.monotonic() - doing.since:.0f} s" if doing.pid else "ever"
        hint = "see whether the disk or network that holds the shards answers"
        if doing.stage == "handing over":
            hint = "see whether /dev/shm is full"
        return UserError(
            f"rank {self._rank}: no batch for {waited:.0f} s: loader worker {worker} (pid {doing.pid or '?'}) has been "
            f"{doing} for {lasts}: {hint}, or raise data.stall_s (now {self._stall_s:g} s, 0 waits for ever)"
        )

    def _death(self) -> UserError | None:
        """The error of a worker that did not end by itself, if there is one."""
        for process in self._processes:
            process.join(0)
            if process.exitcode:
                return self._epitaph(process.pid, process.exitcode)
        return None

    def _epitaph(self, pid: int | None, code: int) -> UserError:
        known: dict[int, tuple[int, Doing]] = {}
        for slot in range(self._board.num_slots):
            doing = self._board.read(slot)
            known[doing.pid] = (slot, doing)
        number, was = known.get(pid or -1, ("?", "starting"))
        how, hint = f"ended with exit code {code}", "its own output says why"
        if code < 0:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            hint = _HINTS.get(signal.Signals(-code), "see who sent it")
        return UserError(f"rank {self._rank}: loader worker {number} (pid {pid}) {how} while {was}: {hint}")

    def _kill(self) -> None:
        with _unnoticed_by_torch():
            for process in self._processes:
                process.kill()
            until = time.monotonic() + _JOIN_S
            for process in self._processes:
                process.join(max(until - time.monotonic(), 0))


def _start_worker(worker: int) -> None:  # noqa: ARG001
    """Leave signals to the whole job, and Ctrl-C, to the trainer, which has yet to save, and end with it.

    Torch's own look at the trainer is not enough: a batch that is larger than a pipe and that nobody takes any more
    would hold the worker for good.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


class _Source:
    """First stage of the pipeline: every W-th slice, from the worker's number on, made as they are needed."""

    def __init__(self, slices: Callable[[], Iterator[Slice]]) -> None:
        self._slices = slices

    def __call__(self) -> Iterator[Slice]:
        worker = torch.utils.data.get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return itertools.islice(self._slices(), first, None, stride)


class _Work:
    """Second stage: a slice becomes a batch, or the error that it met.

    An error is handed over as an item: raised in a worker it would arrive as a traceback's text. One that is nobody's
    input but a mistake in the program keeps its type, and a note says which clip it met and where it was raised.
    """

    def __init__(self, maker: BatchMaker, board: Board, rank: int) -> None:
        self._maker, self._board, self._rank = maker, board, rank
        self._activity: Activity | None = None

    def __call__(self, part: Slice) -> Batch | Exception:
        worker = torch.utils.data.get_worker_info()
        if self._activity is None:
            self._activity = Activity(self._board, 0 if worker is None else worker.id, os.getpid())
        try:
            return self._maker.batch(part, self._activity)
        except UserError as error:
            return error
        except Exception as error:
            raised = traceback.format_exc()
            where = "" if worker is None else f", loader worker {worker.id}"
            error.add_note(f"rank {self._rank}{where}, while {self._activity.doing}")
            if worker is None:
                return error
            error.add_note(raised)
            return _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot be sent to another process whole a `RuntimeError` that says the same."""
    try:
        sent = pickle.loads(pickle.dumps(error))
        if type(sent) is type(error) and str(sent) == str(error) and sent.__notes__ == error.__notes__:
            return error
    except Exception as why:  # whatever its own __reduce__ and __init__ raise
        error.add_note(f"(it cannot be pickled: {why})")
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.__notes__ = list(error.__notes__)
    return told


def _forget_workers(iterator: Any) -> None:
    """Take killed workers from those that torch's handler of SIGCHLD watches, as torch does once it has ended them.

    One that takes long to be gone would else be an error at whatever line the main thread has come to.
    """
    if getattr(iterator, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def _is_of_loader(error: BaseException | None) -> bool:
    """Whether torch's loader said this: that a worker died, or that nothing came."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader")


@contextmanager
def _unnoticed_by_torch() -> Iterator[None]:
    """While workers are killed on purpose: torch's handler of SIGCHLD would raise at any line of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
