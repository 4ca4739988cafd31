"""Of those that want a lock only those hold it that may, with flock and without it; who is dead holds none."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.io import locks
from karmma_dist.io.cache import Cache, Content, FetchError
from karmma_dist.io.locks import STALE_S, FileLock
from karmma_dist.packing.tars.lock import folder_lock
from kits.patience import HANGS_S

CODES = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, 524]


def refuse(code: int, *_: Any) -> None:
    raise OSError(code, os.strerror(code))


@contextmanager
def without_flock(code: int = errno.ENOSYS) -> Iterator[None]:
    """Let the file system have no flock."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", partial(refuse, code))
        yield


@pytest.fixture(params=[None, *CODES], ids=["flock", *map(str, CODES)])
def _each_file_system(request: pytest.FixtureRequest) -> Iterator[None]:
    """A file system with flock, and one for each way in which it can be missing."""
    if request.param is None:
        yield
    else:
        with without_flock(request.param):
            yield


@pytest.fixture
def _no_flock() -> Iterator[None]:
    with without_flock():
        yield


def holders(folder: Path) -> list[Path]:
    return sorted(folder.glob(".lock.holder-*"))


def can_take(path: Path, *, shared: bool = False) -> bool:
    with FileLock(path) as lock:
        return lock.take(shared=shared, wait=False)


@pytest.mark.usefixtures("_each_file_system")
def test_one_holds_it_alone_or_several_share_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with FileLock(path) as alone:
        assert alone.take(wait=False)
        assert not can_take(path)
        assert not can_take(path, shared=True)
    with FileLock(path) as first, FileLock(path) as second:
        assert first.take(shared=True, wait=False)
        assert second.take(shared=True, wait=False)
        assert not can_take(path)
    assert can_take(path)
    assert [item.name for item in tmp_path.iterdir()] == [".lock"]


@pytest.mark.usefixtures("_each_file_system")
def test_who_waits_gets_it_and_no_two_are_inside_at_once(tmp_path: Path) -> None:
    inside, most, done = [], [], []

    def work(number: int) -> None:
        with FileLock(tmp_path / ".lock") as lock:
            assert lock.take()
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)
            done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS_S)
    assert sorted(done) == list(range(8))
    assert max(most) == 1
    assert holders(tmp_path) == []


@pytest.mark.usefixtures("_each_file_system")
def test_packers_exclude_each_other_and_parts_work_side_by_side(tmp_path: Path) -> None:
    with folder_lock(tmp_path, None), pytest.raises(UserError, match="another packer"), folder_lock(tmp_path, (1, 2)):
        pass
    with folder_lock(tmp_path, (1, 2)) as first, folder_lock(tmp_path, (2, 2)) as second:
        for part in (None, (1, 2)):
            with pytest.raises(UserError, match="another packer"), folder_lock(tmp_path, part):
                pass
        assert second()
        assert not first()
    with folder_lock(tmp_path, None) as alone:
        assert alone()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_no_flock")
def test_it_is_said_once_what_is_used_instead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    locks._warn_once_of_this_process.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert can_take(tmp_path / ".lock")
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"{tmp_path}: this file system has no flock (Function not implemented): ")
    assert "60 s" in said
    assert "\n" not in said


@pytest.mark.usefixtures("_no_flock")
def test_a_holder_says_who_it_is(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock") as lock:
        assert lock.take()
        (path,) = holders(tmp_path)
        about = json.loads(path.read_bytes())
        assert about["host"] == socket.gethostname()
        assert about["pid"] == os.getpid()
        assert about["started"] > 0
        assert about["holds"] is True


HOLDER = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
fcntl.flock = flock
from karmma_dist.io.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("_no_flock")
def test_a_process_killed_on_this_machine_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert not can_take(path)
        os.kill(process.pid, signal.SIGKILL)
    assert len(holders(tmp_path)) == 1
    assert can_take(path)
    assert holders(tmp_path) == []


def leave(folder: Path, age_s: float, **about: Any) -> Path:
    """Leave the file of a holder whose last heartbeat is so old."""
    path = folder / ".lock.holder-left"
    known = {"host": "another", "machine": "another machine", "pid": 1, "started": 1, "shared": False, "holds": True}
    path.write_text(json.dumps(known | about))
    beat = path.stat().st_mtime - age_s
    os.utime(path, (beat, beat))
    return path


@pytest.mark.usefixtures("_no_flock")
def test_a_holder_on_another_machine_counts_until_its_heartbeat_is_old(tmp_path: Path) -> None:
    left = leave(tmp_path, STALE_S / 2)
    assert not can_take(tmp_path / ".lock")
    assert left.exists()
    leave(tmp_path, STALE_S + 5)
    assert can_take(tmp_path / ".lock")
    assert not left.exists()


@pytest.mark.usefixtures("_no_flock")
def test_a_pid_that_another_process_has_by_now_holds_nothing(tmp_path: Path) -> None:
    left = leave(tmp_path, 0, machine=locks.machine(), pid=os.getpid(), started=1)
    assert can_take(tmp_path / ".lock")
    assert not left.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"pid": "x"}', "\x00"])
@pytest.mark.usefixtures("_no_flock")
def test_a_file_that_says_nothing_counts_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(locks, "_PAUSE_S", (0.0, 0.0))
    left = leave(tmp_path, 0)
    left.write_text(text)
    assert not can_take(tmp_path / ".lock")
    beat = left.stat().st_mtime - STALE_S - 5
    os.utime(left, (beat, beat))
    assert can_take(tmp_path / ".lock")


@pytest.mark.usefixtures("_no_flock")
def test_the_heart_beats_while_the_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.0)
    beats, utime = threading.Semaphore(0), os.utime

    def beat(*arguments: Any, **named: Any) -> None:
        utime(*arguments, **named)
        beats.release()

    monkeypatch.setattr(os, "utime", beat)
    with FileLock(tmp_path / ".lock") as lock:
        assert lock.take()
        for _ in range(3):
            assert beats.acquire(timeout=HANGS_S)
    assert holders(tmp_path) == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_is_a_file_of_its_own(tmp_path: Path, kind: str) -> None:
    path, victim = tmp_path / ".lock", tmp_path / "victim"
    victim.write_text("kept")
    path.symlink_to(victim) if kind == "link" else os.mkfifo(path)
    with pytest.raises(UserError, match=r"\.lock: .* cannot be a lock: remove it"):
        FileLock(path)
    assert victim.read_text() == "kept"


def content_of(data: bytes) -> Content:
    return Content(hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.usefixtures("_each_file_system")
@pytest.mark.parametrize("fails", [False, True])
def test_of_several_that_ask_for_an_entry_one_downloads(tmp_path: Path, fails: bool) -> None:
    """Those who wait for a download that fails share its failure."""
    data, asked, num, waiting = b"data", [], 4, threading.Semaphore(0)
    outcomes: list[object] = []
    take = FileLock.take

    def tell(lock: FileLock, **named: Any) -> bool:
        if lock.path.name != ".lock":
            waiting.release()
        return take(lock, **named)

    def fetch(path: Path) -> None:
        asked.append(path)
        if len(asked) == 1:
            for _ in range(num):
                assert waiting.acquire(timeout=HANGS_S)
        if fails:
            raise FetchError("gone", damaged=True)
        path.write_bytes(data)

    def ask() -> None:
        try:
            descriptor = Cache(tmp_path).open(content_of(data), fetch)
            outcomes.append(os.read(descriptor, 100))
            os.close(descriptor)
        except FetchError as error:
            outcomes.append(error.what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileLock, "take", tell)
        threads = [threading.Thread(target=ask) for _ in range(num)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS_S)
    assert outcomes == (["gone"] if fails else [data]) * num
    assert len(asked) == 1
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == (set() if fails else {content_of(data).name})
