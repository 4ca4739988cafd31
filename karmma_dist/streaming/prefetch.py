"""Prefetching to a GPU: the next batch is pinned and copied during the current computation. A CPU needs no prefetching.

    with on_device(training_batches(...), device) as batches:
        for batch in batches: ...

A thread takes batches from the loader, pins them and starts their copies on a separate stream; at most one batch is
on the device ahead of its use. Torch's `pin_memory` thread does not serve here: torch waits for it without a bound if a
worker was killed in the middle of a message.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.workers import Batches

_JOIN_S = 10.0
"""Seconds that the thread may take to end."""

Receive = Callable[[], Batch]
"""Function that returns a sent batch, ready for use on the caller's stream."""


@contextmanager
def on_device(batches: Batches, device: torch.device) -> Iterator[Iterator[Batch]]:
    """Yield the same batches in the same order with their tensors on `device`; the workers end with the block.

    Raises:
        UserError: a worker stalled, was killed, even while the block was busy elsewhere, or met a user's error.
    """
    with batches:
        if device.type != "cuda":
            yield batches
            return
        ahead = Ahead(batches, CudaCopies(device).send)
        try:
            yield ahead
        finally:
            ahead.stop()


class Ahead(Iterator[Batch]):
    """An iterator that takes and sends one batch ahead of the requested one, in a thread."""

    def __init__(self, batches: Iterator[Batch], send: Callable[[Batch], Receive]) -> None:
        self._batches, self._send = batches, send
        self._sent: queue.SimpleQueue[Receive | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            BaseException: the loader raised it in place of this batch.
        """
        received = self._sent.get()
        if isinstance(received, BaseException):
            self._sent.put(received)  # the next call raises it again
            raise received
        self._room.release()
        return received()

    def stop(self) -> None:
        """End the thread once it has the batch that it is waiting for."""
        self._stopped.set()
        self._room.release()
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                batch = next(self._batches)
                self._room.acquire()
                self._sent.put(self._send(batch))
        except BaseException as error:
            self._sent.put(error)


class CudaCopies:
    """The copying of batches to a GPU on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, batch: Batch) -> Receive:
        """Pin a batch and start its copy."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            moved = batch.map(lambda tensor: tensor.pin_memory().to(self._device, non_blocking=True))
            copied = self._stream.record_event()

        def receive() -> Batch:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for tensor in moved.tensors():
                tensor.record_stream(current)  # the copying stream must not reuse its memory before this stream is done
            return moved

        return receive
