"""Tests of workers that stall, die or fail: one error that names the clip, in bounded time, and no process left."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.errors import UserError
from karmma_dist.modalities.stored_frames import FramesDecoder
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.streaming import workers as workers_module
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.prefetch import Ahead, on_device
from karmma_dist.streaming.workers import Batches
from kits.patience import HANGS_S

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "short_side": 32, "crop": 24, "jitter": 0.4},
        "audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16},
    }
)
HELD = r"(video|flow|audio) of clip \w+ \(train-\d+\.tar\)"
"""Pattern of the current clip in an error."""


def make(shards: Path, workers: int, stall_s: float = 0.0, epochs: int = 1, drop: float = 0.0) -> Batches:
    data = DataRecipe.model_validate(
        {"shards": str(shards), "num_workers": workers, "stall_s": stall_s, "modality_dropout": {"probability": drop}}
    )
    clips = TrainingClips(open_shards(data), data, INPUTS, seed=3, batch_size=8)
    schedule = Schedule(len(clips.clips), batch_size=8)
    return training_batches(clips, schedule, 0, Position(0, 0), epochs)


def is_running(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Blocked:
    """A decoder that does not return for a minute, and records the process that called it."""

    def __init__(self) -> None:
        self._entered, self._never = multiprocessing.Event(), multiprocessing.Event()
        self._pid: Synchronized[int] = multiprocessing.Value("q", 0)

    def __call__(self, *_: Any) -> None:
        self._pid.value = os.getpid()
        self._entered.set()
        self._never.wait(60)

    def pid(self) -> int:
        assert self._entered.wait(30)
        return int(self._pid.value)


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Blocked:
    decoder = Blocked()
    monkeypatch.setattr(FramesDecoder, "decode_views", decoder)
    return decoder


def refuse(error: Exception) -> Callable[..., None]:
    def decode(*_: Any) -> None:
        raise error

    return decode


def test_a_worker_killed_while_decoding_is_one_line_with_clip(shards: Path, blocked: Blocked) -> None:
    batches = make(shards, workers=2)
    killer = threading.Thread(target=lambda: os.kill(blocked.pid(), signal.SIGKILL))
    killer.start()
    with pytest.raises(UserError, match=rf"rank 0: loader worker [01] \(pid \d+\) .*SIGKILL\) while decoding {HELD}: "):
        next(batches)
    killer.join()
    assert not any(is_running(pid) for pid in batches.worker_pids)
    assert len(batches.worker_pids) == 2


def test_a_worker_killed_during_training_is_the_same_line(shards: Path, blocked: Blocked) -> None:
    batches = make(shards, workers=1)
    with pytest.raises(UserError, match=rf"SIGKILL\) while decoding {HELD}.*memory") as caught, batches:  # noqa: PT012
        os.kill(blocked.pid(), signal.SIGKILL)
        threading.Event().wait(60)  # in place of a training step: torch interrupts it
    assert "\n" not in str(caught.value)
    assert not any(is_running(pid) for pid in batches.worker_pids)


def test_a_worker_that_exits_is_one_line(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FramesDecoder, "decode_views", lambda *_: os._exit(3))
    with pytest.raises(UserError, match=rf"loader worker 0 \(pid \d+\) ended with exit code 3 while decoding {HELD}"):
        next(make(shards, workers=1))


@pytest.mark.usefixtures("blocked")
def test_a_stalled_worker_is_one_line_with_clip_and_time(shards: Path) -> None:
    batches = make(shards, workers=2, stall_s=0.5)
    expected = rf"rank 0: no batch for \d+ s: loader worker 0 \(pid \d+\) has been decoding {HELD} for \d+ s: .*stall_s"
    with pytest.raises(UserError, match=expected) as caught:
        next(batches)
    assert "\n" not in str(caught.value)
    assert not any(is_running(pid) for pid in batches.worker_pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_keeps_its_type_and_names_the_clip(
    shards: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(FramesDecoder, "decode_views", refuse(AttributeError("no such thing")))
    batches = make(shards, workers)
    with pytest.raises(AttributeError, match="no such thing") as caught:
        next(batches)
    notes = "\n".join(caught.value.__notes__)
    assert "while decoding " in notes
    assert "of clip P" in notes
    assert workers == 0 or "in read_sample" in notes
    assert not any(is_running(pid) for pid in batches.worker_pids)
    with pytest.raises(StopIteration):
        next(batches)


class UnpicklableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def test_an_unpicklable_error_is_replaced_by_a_runtime_error(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FramesDecoder, "decode_views", refuse(UnpicklableError("a", "b")))
    with pytest.raises(RuntimeError, match="UnpicklableError: a b") as caught:
        next(make(shards, workers=1))
    assert "while decoding " in "\n".join(caught.value.__notes__)


def test_leaving_early_ends_the_workers(shards: Path) -> None:
    with make(shards, workers=2, epochs=100) as batches:
        next(batches)
        pids = batches.worker_pids
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)
    assert list(batches) == []


def test_killed_workers_that_end_late_raise_nothing(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that torch's SIGCHLD handler, which would raise in the join below, no longer watches them."""
    monkeypatch.setattr(workers_module, "_JOIN_S", 0.0)
    batches = make(shards, workers=2, epochs=100)
    next(batches)
    batches.close(kill=True)
    for process in batches._processes:
        process.join(HANGS_S)
        assert process.exitcode == -signal.SIGKILL


def test_a_stream_of_a_billion_epochs_starts_at_once(shards: Path) -> None:
    with make(shards, workers=1, epochs=10**9) as batches:
        assert next(batches).step == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_carries_its_cost(shards: Path, workers: int) -> None:
    sizes = {}
    for clip in open_shards(DataRecipe(shards=str(shards))).clips("train"):
        sizes[clip.key] = {name: member.size for name, member in clip.members.items() if member is not None}
    names = ["video", "flow", "audio"]
    for batch in make(shards, workers, drop=0.5):
        stats = batch.stats
        members_read = [
            ["json", *(name for name, is_present in zip(names, row, strict=True) if is_present)]
            for row in batch.present_BM.tolist()
        ]
        assert stats.members_read == sum(map(len, members_read))
        assert stats.bytes_read == sum(
            sizes[key][name] for key, members in zip(batch.keys, members_read, strict=True) for name in members
        )
        assert stats.clips_decoded == {name: len(tensor) for name, tensor in batch.inputs.items()}
        assert set(stats.decode_s) == set(batch.inputs)
        assert 0 < stats.read_s + sum(stats.decode_s.values()) < stats.load_s
        assert 0 <= stats.queue_depth <= 2 * workers


def equal(first: Batch, second: Batch) -> bool:
    flags = [(first.present_BM, second.present_BM), (first.valid_B, second.valid_B)]
    pairs = [*flags, *zip(first.tensors(), second.tensors(), strict=True)]
    return first.keys == second.keys and all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def test_on_a_cpu_batches_pass_unchanged(shards: Path) -> None:
    source = make(shards, workers=0)
    with on_device(source, torch.device("cpu")) as batches:
        assert batches is source
        assert len(list(batches)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_prefetched_to_a_gpu_equal_the_loaders(shards: Path) -> None:
    plain = list(make(shards, workers=1, drop=0.5, epochs=4))
    device = torch.device("cuda")
    with on_device(make(shards, workers=1, drop=0.5, epochs=4), device) as batches:
        for expected, batch in zip(plain, batches, strict=True):
            assert all(tensor.is_cuda for tensor in batch.tensors())
            assert equal(batch, expected)


def test_at_most_one_batch_is_sent_ahead_in_order(shards: Path) -> None:
    plain = list(make(shards, workers=0, epochs=3))
    ahead_by = []
    sent, taken = 0, 0

    def send(batch: Batch) -> Callable[[], Batch]:
        nonlocal sent
        sent += 1
        ahead_by.append(sent - taken)
        return lambda: batch

    ahead = Ahead(iter(plain), send)
    for expected in plain:
        taken += 1
        assert equal(next(ahead), expected)
    with pytest.raises(StopIteration):
        next(ahead)
    assert max(ahead_by) <= 1
    ahead.stop()


def test_an_error_of_the_loader_comes_through_the_thread(shards: Path, blocked: Blocked) -> None:
    loaded = make(shards, workers=1)
    ahead = Ahead(loaded, lambda batch: lambda: batch)
    with pytest.raises(UserError, match=rf"SIGKILL\) while decoding {HELD}"), loaded:  # noqa: PT012
        os.kill(blocked.pid(), signal.SIGKILL)
        next(ahead)
    ahead.stop()
    assert not any(is_running(pid) for pid in loaded.worker_pids)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_workers_ignore_a_signal_to_the_whole_job(shards: Path, number: signal.Signals) -> None:
    """Check that the trainer still gets its batches and can end the workers."""
    with make(shards, workers=1, epochs=3) as batches:
        keys = [next(batches).keys]
        pids = batches.worker_pids
        for pid in pids:
            os.kill(pid, number)
        keys += [batch.keys for batch in batches]
    assert keys == [batch.keys for batch in make(shards, workers=0, epochs=3)]
    assert not any(is_running(pid) for pid in pids)


ABANDONED = """
import os, signal, torch
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.order import Slice
from karmma_dist.streaming.workers import Batches

class Large:
    def batch(self, part, activity):
        present = torch.ones(1, dtype=torch.bool)
        return Batch(["x" * 10_000_000], present[None], {}, {}, present, None)

batches = Batches(Large(), lambda: (Slice(0, step, step, step + 1) for step in range(9)), 2)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_trainer_end() -> None:
    """Check that the output pipe, which every worker holds open, closes in time."""
    done = subprocess.run([sys.executable, "-c", ABANDONED], capture_output=True, timeout=HANGS_S)
    assert done.returncode == -signal.SIGKILL
