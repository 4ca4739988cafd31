"""On a GPU: the next batch is pinned and copied while the current one is computed with. On a CPU: nothing.

    with on_device(training_batches(...), device) as batches:
        for batch in batches: ...

A thread takes batches from the loader, pins them and starts their copies on a stream of its own; at most one batch is
on the device ahead of its use. It is our thread and not torch's `pin_memory`: torch waits for its own without a bound
when a worker was killed in the middle of a message.
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
"""How long the thread may take to end."""

Receive = Callable[[], Batch]
"""Makes a batch that was sent usable on the caller's stream, and returns it."""


@contextmanager
def on_device(batches: Batches, device: torch.device) -> Iterator[Iterator[Batch]]:
    """The batches with their tensors on `device`, the same ones in the same order; the workers end with the block.

    Raises:
        UserError: as `Batches`, also for a worker that dies while the block does something else.
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
    """Takes and sends one batch further than was asked for, in a thread."""

    def __init__(self, batches: Iterator[Batch], send: Callable[[Batch], Receive]) -> None:
        self._batches, self._send = batches, send
        self._sent: queue.SimpleQueue[Receive | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(1)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="batches ahead", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            whatever the batches raise, where they raise it.
        """
        received = self._sent.get()
        if isinstance(received, BaseException):
            self._sent.put(received)  # asked again, it says the same
            raise received
        self._room.release()
        return received()

    def stop(self) -> None:
        """End the thread, after the batch that it may be waiting for."""
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
    """Copies batches to a GPU on a stream of their own."""

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
                tensor.record_stream(current)  # its memory is the copying stream's: not to be reused before this one
            return moved

        return receive
