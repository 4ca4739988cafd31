"""A folder has one owner at a time; one that is gone is replaced, and one that was replaced writes nothing more."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.io import locks
from karmma_dist.runs import owner
from karmma_dist.runs.owner import owned
from karmma_dist.runs.process import process_info
from kits.patience import HANGS_S

OWNER = f".owner-{'0' * 16}.json"
ELSEWHERE = {"host": "n7", "pid": 4711, "machine": "another boot", "started": 1, "restarts": "0"}
"""An owner on another machine."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(owner, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(owner, "STALE_S", 1.0)


def leave(folder: Path, silent_s: float = 0.0, **info: Any) -> Path:
    """Leave an owner's file whose heartbeat stopped `silent_s` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / OWNER
    path.write_text(json.dumps({**process_info(), "restarts": "0", "owns": True, **info}))
    os.utime(path, (time.time() - silent_s,) * 2)
    return path


def try_to_own(folder: Path) -> None:
    with owned(folder, "is being trained"):
        (path,) = folder.glob(".owner-*")
        assert json.loads(path.read_text())["owns"]


@pytest.fixture
def beating() -> Iterator[Callable[[Path], None]]:
    """Return a function that renews a file's modification time until the test ends."""
    end = threading.Event()
    threads = []

    def start(path: Path) -> None:
        def beat() -> None:
            while not end.wait(0.1):
                os.utime(path)

        threads.append(threading.Thread(target=beat))
        threads[-1].start()

    yield start
    end.set()
    for thread in threads:
        thread.join()


def test_an_owner_is_named_and_the_folder_free_afterwards(tmp_path: Path) -> None:
    with owned(tmp_path / "run", "is being trained"):
        for _ in range(2):
            with pytest.raises(UserError, match=rf"run: is being trained by process {os.getpid()} on \S+: wait until"):
                try_to_own(tmp_path / "run")
    try_to_own(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_slurm_job_of_an_owner_is_named(tmp_path: Path) -> None:
    leave(tmp_path, job_id="31")
    with pytest.raises(UserError, match=r"job 31: wait until"):
        try_to_own(tmp_path)


def test_what_the_owner_wrote_stays_and_an_error_gives_the_folder_back(tmp_path: Path) -> None:
    def fail() -> None:
        with owned(tmp_path / "run", "is being trained"):
            (tmp_path / "run" / "x").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["x"]


def test_an_owner_whose_process_was_killed_is_replaced_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom karmma_dist.runs.owner import owned\n"
        "with owned(Path(sys.argv[1]), 'is being trained'):\n    print('owns', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"owns\n"
            with pytest.raises(UserError, match=f"process {process.pid} on"):
                try_to_own(tmp_path)
        finally:
            process.kill()
    try_to_own(tmp_path)


def test_a_heartbeat_on_another_machine_keeps_the_folder(tmp_path: Path, beating: Callable[[Path], None]) -> None:
    beating(leave(tmp_path, **ELSEWHERE))
    with pytest.raises(UserError, match="is being trained by process 4711 on n7"):
        try_to_own(tmp_path)


def test_an_owner_on_another_machine_is_gone_once_its_heartbeat_has_stopped(tmp_path: Path) -> None:
    leave(tmp_path, **ELSEWHERE)
    began = time.monotonic()
    try_to_own(tmp_path)
    assert 0.5 < time.monotonic() - began < HANGS_S
    leave(tmp_path, 5.0, **ELSEWHERE)
    began = time.monotonic()
    try_to_own(tmp_path)
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize(
    ("states", "is_free"),
    [({"31": "RUNNING"}, False), ({"31": "COMPLETING"}, False), (None, False), ({}, True), ({"31": "FAILED"}, True)],
)
def test_squeue_tells_whether_the_job_of_an_owner_elsewhere_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: Callable[[Path], None],
    states: dict[str, str] | None, is_free: bool,
) -> None:  # fmt: skip
    beating(leave(tmp_path / "run", **ELSEWHERE, job_id="31"))
    monkeypatch.setattr(owner, "ask_squeue", lambda ids: states if ids == ["31"] else pytest.fail(str(ids)))
    if is_free:
        with owned(tmp_path / "run", "is being trained"):
            return
    with pytest.raises(UserError, match="process 4711 on n7, job 31"):
        try_to_own(tmp_path / "run")


def test_a_requeued_job_takes_over_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beating: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(owner, "ask_squeue", lambda _: {"31": "RUNNING"})
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    path = leave(tmp_path, **ELSEWHERE, job_id="31")
    beating(path)
    with pytest.raises(UserError, match="job 31"):
        try_to_own(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with owned(tmp_path, "is being trained") as ownership:
        assert json.loads(ownership.path.read_text())["restarts"] == "1"
        assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"pid": "x", "machine": 3, "started": []}', b"\xff" * 50, b"[" * 20_000, b"\0" * 30_000,
     b'{"pid": 1, "job_id": "31; rm -rf /"}'],
)  # fmt: skip
def test_a_file_that_names_nobody_counts_as_long_as_it_beats(
    tmp_path: Path, beating: Callable[[Path], None], content: bytes
) -> None:
    path = tmp_path / OWNER
    path.write_bytes(content)
    os.utime(path, (time.time() - 5,) * 2)
    try_to_own(tmp_path)
    path.write_bytes(content)
    beating(path)
    with pytest.raises(UserError, match="is being trained by"):
        try_to_own(tmp_path)


def test_an_owner_that_was_replaced_stops_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    with ExitStack() as later, ExitStack() as earlier:
        first = earlier.enter_context(owned(tmp_path, "is being trained"))
        first.check()
        first.path.unlink()
        with pytest.raises(UserError, match="was removed"):
            first.check()
        second = later.enter_context(owned(tmp_path, "is being trained"))
        assert first.is_lost
        earlier.close()
        second.check()


def _own_and_count(folder: Path, results: Any) -> None:
    try:
        with owned(folder, "is being trained"):
            others = len(list(folder.glob("holds-*")))
            mine = folder / f"holds-{os.getpid()}"
            mine.touch()
            time.sleep(0.05)
            others += len(list(folder.glob("holds-*"))) - 1
            mine.unlink()
            results.put(others)
    except UserError:
        results.put(None)


def test_of_several_that_come_at_once_one_owns_also_where_a_dead_one_was(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(5):
        folder = tmp_path / str(round_)
        leave(folder, 5.0, **ELSEWHERE)
        results = context.Queue()
        processes = [context.Process(target=_own_and_count, args=(folder, results)) for _ in range(6)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=HANGS_S) for _ in processes]
        for process in processes:
            process.join(HANGS_S)
        owners = [outcome for outcome in outcomes if outcome is not None]
        assert owners
        assert not any(owners)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            try_to_own(folder)
