"""Transfers of one file from a server, which can neither send more than it should nor keep the transfer going.

A transfer ends with an error as soon as a byte more arrives than the file has, or may have (`Content.most_bytes`),
whatever length the server declares, and once it falls below a lowest rate: `LEAST_BYTES` in each `WINDOW_S` seconds,
from the request on, so that headers without an end count as well.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync
from fsspec.callbacks import Callback

from karmma_dist.io.cache import Content, FetchError
from karmma_dist.io.disk_errors import DiskError, free_bytes

WINDOW_S = 60.0
"""Seconds in which a transfer moves at least `LEAST_BYTES`, or ends."""
LEAST_BYTES = 60_000
"""Bytes of a window: 1 kB/s is less than any line that could be used for data sets."""
BLOCK_WINDOW_S = 600.0
"""The window for protocols other than HTTP, whose libraries pass on blocks of some megabytes."""
_BLOCK_BYTES = 1 << 22
_POLL_S = 0.5


@dataclass
class Sink:
    """The receiver of one transfer."""

    write: Callable[[bytes], object]
    """Function that stores bytes."""
    content: Content
    """Expected content, by which the number of bytes is limited."""
    path: Path | None = None
    """File to write; None if the bytes stay in memory."""
    moved: Callable[[int, int], None] | None = None
    """Callback that receives the bytes so far and the total (0: unknown)."""
    done: int = 0
    """Bytes so far."""
    total: int = 0
    """Bytes that the server declares; 0 if it does not."""
    is_given_up: bool = False
    """True if nobody waits for the bytes any more."""

    def expect(self, total: int | None) -> None:
        """Take note of the length that the server declares, before the first byte.

        Raises:
            FetchError: it is not the file's, or is more than such a file may have.
            DiskError: the disk has no room for it.
        """
        self.total = total or 0
        if total is not None and self.content.size is not None and total != self.content.size:
            raise FetchError(f"{total} bytes instead of {self.content.size}", damaged=True, passing=True)
        self._check(self.total)
        if self.path is not None and (free := free_bytes(self.path.parent)) is not None and self.total > free:
            raise DiskError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._report()

    def take(self, data: bytes) -> None:
        """Store bytes, unless they are more than the file may have.

        Raises:
            FetchError: they are.
            DiskError: the disk does not take them.
        """
        self.count(len(data))
        self.write(data)

    def count(self, num_bytes: int) -> None:
        """Count bytes that are about to be stored, or that a library has stored."""
        if self.is_given_up:
            raise FetchError("given up", damaged=False)
        self._check(self.done + num_bytes)
        self.done += num_bytes
        self._report()

    def _check(self, num_bytes: int) -> None:
        size, most = self.content.size, self.content.most_bytes
        if size is not None and num_bytes > size:
            raise FetchError(f"more than the {size} bytes that it should have", damaged=True, passing=True)
        if num_bytes > most:
            raise FetchError(f"more than {most} bytes, which no such file has", damaged=True)

    def _report(self) -> None:
        if self.moved:
            self.moved(self.done, self.total)


def receive(system: Any, url: str, sink: Sink) -> None:
    """Transfer a file.

    Args:
        system: File system of fsspec.
        url: URL of the file.
        sink: Receiver.

    Raises:
        FetchError: the file is too long, or the transfer too slow.
        DiskError: the disk does not take it.
        Exception: whatever `system` raises.
    """
    if urlsplit(url).scheme in ("http", "https"):
        sync(system.loop, _receive_http, system, url, sink)
    else:
        _watch(lambda: _receive_blocks(system, url, sink), sink)


async def _receive_http(system: Any, url: str, sink: Sink) -> None:
    options = dict(system.kwargs)
    # As it is: a few compressed bytes could be gigabytes, and a compressed length says nothing.
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    session = await system.set_session()
    response = None
    try:
        while True:
            before = sink.done
            try:
                async with asyncio.timeout(WINDOW_S) as window:
                    if response is None:
                        response = await session.get(system.encode_url(url), headers=headers, **options)
                        response.raise_for_status()
                        sink.expect(None if "Content-Encoding" in response.headers else response.content_length)
                    if await _fill_window(response, sink, window):
                        return
            except TimeoutError:
                if not window.expired():
                    raise
                raise _too_slow(sink.done - before, WINDOW_S) from None
    finally:
        if response is not None:
            response.close()


async def _fill_window(response: Any, sink: Sink, window: asyncio.Timeout) -> bool:
    """Transfer `LEAST_BYTES` or a little more; return True at the end of the file."""
    start = sink.done
    while sink.done - start < LEAST_BYTES:
        data = await response.content.readany()
        if not data:
            return True
        began = time.monotonic()
        sink.take(data)
        deadline = window.when()
        if deadline is not None:  # the server is not to blame for a slow disk
            window.reschedule(deadline + time.monotonic() - began)
    return False


def _receive_blocks(system: Any, url: str, sink: Sink) -> None:
    if getattr(system, "async_impl", False) and sink.path is not None:
        system.get_file(url, str(sink.path), callback=_Counted(sink))  # streams; `open` would ask for each block
        return
    with system.open(url, "rb") as source:
        size = getattr(source, "size", None)
        sink.expect(size if isinstance(size, int) else None)
        while data := source.read(_BLOCK_BYTES):
            sink.take(data)


class _Counted(Callback):
    """An fsspec callback that tells a sink of the bytes that a file system writes itself."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink

    def set_size(self, size: int | None) -> None:
        """Take note of the declared length."""
        self._sink.expect(size)

    def relative_update(self, inc: int = 1) -> None:
        """Count a block."""
        self._sink.count(inc)

    def absolute_update(self, value: int) -> None:
        """Count the bytes since the last call."""
        self._sink.count(value - self._sink.done)


def _watch(work: Callable[[], None], sink: Sink) -> None:
    """Do blocking work in a thread of its own, and leave the thread to itself where the work is too slow."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="transfer", daemon=True)
    thread.start()
    began, before = time.monotonic(), sink.done
    while thread.is_alive():
        thread.join(min(_POLL_S, BLOCK_WINDOW_S))
        if sink.done - before >= LEAST_BYTES:
            began, before = time.monotonic(), sink.done
        elif thread.is_alive() and time.monotonic() - began > BLOCK_WINDOW_S:
            sink.is_given_up = True
            raise _too_slow(sink.done - before, BLOCK_WINDOW_S)
    if errors:
        raise errors[0]


def _too_slow(num_bytes: int, seconds: float) -> FetchError:
    return FetchError(f"too slow: {num_bytes} bytes in {seconds:g} s", damaged=False, passing=True)
