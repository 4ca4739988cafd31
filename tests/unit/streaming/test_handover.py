"""Workers that cannot start, or cannot hand over a batch, end the iteration at once with the true cause in one line."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.errors import UserError
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming import handover, workers
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.handover import described, temporary_folder_problem
from karmma_dist.streaming.order import Slice
from karmma_dist.streaming.worker_status import Activity
from karmma_dist.streaming.workers import Batches
from kits.patience import HANGS_S


def slices() -> Iterator[Slice]:
    return (Slice(0, step, step, step + 1) for step in range(6))


class Maker:
    """A maker of batches of one tensor, which calls a function in the worker before it makes one."""

    def __init__(self, prepare: Callable[[], Any] = lambda: None) -> None:
        self.prepare = prepare

    def batch(self, part: Slice, activity: Activity) -> Batch:  # noqa: ARG002
        activity.start("collating")
        self.prepare()
        activity.start("handing over")
        present = torch.ones(1, dtype=torch.bool)
        return Batch(["x"], present[None], {"sensor": torch.zeros(1, 100_000)}, {}, present, None)  # type: ignore[arg-type]


def failure(prepare: Callable[[], Any] = lambda: None, num_workers: int = 2) -> str:
    """Return the error that the iteration ends with: for the user, in one line, with no process left."""
    before = set(multiprocessing.active_children())
    with pytest.raises(UserError) as caught, Batches(Maker(prepare), slices, num_workers) as batches:
        next(batches)
    assert not set(multiprocessing.active_children()) - before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_long_tmpdir_is_named_before_a_worker_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("a" * (140 - len(str(tmp_path)) - 1))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    message = failure()
    assert f"{folder} has 140 bytes" in message
    assert "TMPDIR" in message


@pytest.mark.parametrize("num_bytes", range(70, 80))
def test_the_longest_tmpdir_is_known_to_the_byte(num_bytes: int) -> None:
    """Compare with what the system says."""
    with tempfile.TemporaryDirectory(dir="/tmp") as root, socket.socket(socket.AF_UNIX) as listener:
        folder = Path(root) / ("é" + "a" * (num_bytes - len(root) - 3))
        path = Path(f"{folder}/pymp-12345678/listener-12345678")
        path.parent.mkdir(parents=True)
        try:
            listener.bind(str(path))
            is_allowed = True
        except OSError:
            is_allowed = False
        assert (temporary_folder_problem(str(folder)) is None) == is_allowed


def test_a_tmpdir_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    message = failure()
    assert "/proc/self/pymp-" in message
    assert "TMPDIR" in message


@pytest.mark.parametrize("text", ["No space left on device", "Read-only file system"])
def test_a_tmpdir_that_takes_no_socket_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = {os.strerror(number): number for number in range(1, 50)}[text]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, text)

    monkeypatch.setattr(handover, "Listener", refuse)
    message = failure()
    assert text in message
    assert "TMPDIR" in message
    assert "/dev/shm" not in message


def test_without_workers_no_folder_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")
    with Batches(Maker(), slices, 0) as batches:
        assert len(list(batches)) == 6


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def test_shared_memory_that_cannot_be_filled_is_named_within_seconds() -> None:
    """A limit on the size of files stands for a full /dev/shm: both keep the worker from storing its batch."""
    began = time.monotonic()
    message = failure(limit(resource.RLIMIT_FSIZE, 1000))
    assert "handing over" in message
    assert "File too large" in message
    assert "/dev/shm has " in message
    assert time.monotonic() - began < HANGS_S / 10  # and not after data.stall_s


def test_too_few_open_files_in_a_worker_are_named() -> None:
    message = failure(lambda: limit(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")))())
    assert "Too many open files" in message
    assert "ulimit -n" in message
    assert "shm" not in message.partition("Too many")[2]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_machine_that_opens_no_more_files_is_not_damage(
    shards: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = ShardFolder(shards)
    clip = folder.clips("train")[0]

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=rf"{clip.shard} cannot be opened: {os.strerror(number)}: "):
        folder.read(clip, "json")


TOO_FEW_FILES = """
import resource, sys
sys.path[:0] = sys.argv[1:]
from unit.streaming.test_handover import Maker, slices
from karmma_dist.errors import UserError
from karmma_dist.streaming.workers import Batches
import itertools
from karmma_dist.streaming.order import Slice
many = lambda: (Slice(0, step, step, step + 1) for step in range(1000))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    with Batches(Maker(), many, 1) as batches:
        kept = list(batches)
except UserError as error:
    print(error)
"""


def test_too_few_open_files_in_the_trainer_are_named() -> None:
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", TOO_FEW_FILES, str(tests)], capture_output=True, text=True, timeout=HANGS_S
    )
    (line,) = done.stdout.splitlines()
    assert "no batch can be received from loader worker 0" in line
    assert "ulimit -n, now 64" in line


def test_a_batch_whose_socket_was_removed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaners of /tmp do so."""

    def refuse(*_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("multiprocessing.connection.Client", refuse)
    message = failure()
    assert "no batch can be received from loader worker 0" in message
    assert "No such file or directory" in message


def test_too_few_processes_are_named_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    fork, num_forks = os.fork, iter(range(9))

    def fork_once() -> int:
        if next(num_forks):
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", fork_once)
    message = failure(num_workers=3)
    assert "only 1 of 3 loader workers can be started" in message
    assert "Resource temporarily unavailable" in message
    assert "ulimit -u" in message


def test_a_worker_without_a_thread_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(workers, "end_with_parent", refuse)
    message = failure()
    assert "failed while starting: can't start new thread" in message
    assert "ulimit -u" in message


def allow_no_further_thread() -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    threading.Thread.start = refuse  # type: ignore[method-assign]  # in the worker


def test_a_worker_whose_sending_thread_cannot_start_is_named() -> None:
    message = failure(allow_no_further_thread)
    assert "failed while handing over: can't start new thread" in message
    assert "ulimit -u" in message


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("No module named 'toy_sensor'"), "No module named 'toy_sensor'"),
        (MemoryError("Unable to allocate 4 GiB"), "Unable to allocate 4 GiB.*request more memory"),
    ],
)
def test_what_a_worker_lacks_is_named(error: Exception, text: str, num_workers: int) -> None:
    def refuse() -> None:
        raise error

    message = failure(refuse, num_workers)
    assert "rank 0" in message
    assert "while collating: " in message
    assert text.partition(".*")[0] in message
    assert text.rpartition(".*")[2] in message


SPAWNED = """
import multiprocessing, sys
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    sys.path[:0] = sys.argv[1:3]
    from unit.streaming.test_handover import slices
    from karmma_dist.errors import UserError
    from karmma_dist.streaming.workers import Batches
    import toy_maker
    if "gone" in sys.argv:
        sys.path.remove(sys.argv[2])  # workers get this process's search path
    try:
        with Batches(toy_maker.maker(), slices, 1) as batches:
            print(len(list(batches)))
    except UserError as error:
        print(error)
"""
TOY_MAKER = """
from unit.streaming.test_handover import Maker
class ToyMaker(Maker):
    def __init__(self):
        pass
    def prepare(self):
        pass
def maker():
    return ToyMaker()
"""


@pytest.mark.parametrize("state", ["there", "gone"])
def test_a_plug_in_that_a_worker_cannot_import_is_named(tmp_path: Path, state: str) -> None:
    """Workers that are not forked import the plug-in themselves."""
    (tmp_path / "main.py").write_text(SPAWNED)
    plug_ins = tmp_path / "plug_ins"
    plug_ins.mkdir()
    (plug_ins / "toy_maker.py").write_text(TOY_MAKER)
    tests = Path(__file__).parents[2]
    command = [sys.executable, str(tmp_path / "main.py"), str(tests), str(plug_ins), state]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    (line,) = done.stdout.splitlines()
    assert line == "6" if state == "there" else "No module named 'toy_maker'" in line


def test_every_description_is_one_line_with_a_remedy() -> None:
    for error in (OSError("a\nb"), EOFError(), ConnectionResetError(104, "Connection reset by peer"), KeyError("k")):
        text = described(error)
        assert "\n" not in text
        assert ": " in text
