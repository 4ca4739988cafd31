"""The lost rank is found from beats and marks in the job's store; no threads or clocks run in these tests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from karmma_dist.distributed import collectives, heartbeat
from karmma_dist.distributed.heartbeat import Heartbeat, wait_for
from karmma_dist.errors import Stopped

NEVER_S = 1e9


@pytest.fixture
def job() -> Callable[..., list[Heartbeat]]:
    """Return a function that makes the heartbeats of a job's ranks without starting their threads."""
    server = dist.TCPStore("127.0.0.1", 0, None, True)

    def make(size: int, limit_s: float) -> list[Heartbeat]:
        return [Heartbeat(server, rank, size, limit_s) for rank in range(size)]

    return make


def test_no_rank_is_lost_while_all_beat(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(3, NEVER_S)
    assert [rank._beat() for _ in range(3) for rank in ranks] == [None] * 9


def test_every_rank_names_the_rank_whose_beat_stops(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(3, 0.0)
    ranks[2].mark("in step 8", NEVER_S)
    ranks[2]._write()
    ranks[1].mark("in step 8", NEVER_S)
    assert ranks[1]._beat() is None  # rank 1 reads the only beat of rank 2
    loss = ranks[1]._beat()
    assert loss is not None
    assert loss.startswith("rank 2 (")
    assert loss.endswith("last seen in step 8")
    assert ranks[0]._beat() == loss


def test_a_rank_that_never_beat_is_the_one_that_is_named(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(3, NEVER_S)
    for rank in (0, 1):
        ranks[rank].mark("in step 2", 0.0)
        ranks[rank]._write()
    loss = ranks[0]._beat()
    assert loss is not None
    assert loss.startswith("rank 2 (")


def test_a_rank_beats_before_its_work_begins(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(2, NEVER_S)
    with ranks[1]:
        assert ranks[0]._read(1) is not None


def test_the_rank_with_the_fewest_marks_is_named(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(3, NEVER_S)
    for rank in ranks:
        rank.mark("waiting for a batch of step 2")
        rank._write()
    for rank in (0, 2):
        ranks[rank].mark("in step 2", 0.0)
        ranks[rank]._write()
    assert ranks[1]._beat() is None  # its own limit has not passed
    loss = ranks[0]._beat()
    assert loss is not None
    assert loss.startswith("rank 1 (")
    assert "while it is waiting for a batch of step 2" in loss


def test_ranks_that_hang_at_the_same_mark_are_reported_together(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(2, NEVER_S)
    for rank in ranks:
        rank.mark("in step 2", 0.0)
        rank._write()
    assert str(ranks[0]._beat()).startswith("all ranks have hung for 0 s, in step 2")


def test_a_rank_that_leaves_stops_waiting_ranks_with_its_reason(job: Callable[..., list[Heartbeat]]) -> None:
    ranks = job(2, NEVER_S)
    ranks[1].leave("clip a: the disk is gone")
    loss = ranks[0]._beat()
    assert loss is not None
    assert loss.startswith("rank 1 (")
    assert loss.endswith("stopped: clip a: the disk is gone")
    ranks[0]._lost = loss
    heartbeat.set_current(ranks[0])
    try:
        with pytest.raises(Stopped, match="the disk is gone") as raised:
            wait_for(dist.HashStore(), "never")
    finally:
        heartbeat.set_current(None)
    assert raised.value.exit_code == 1


def test_a_store_that_never_answers_means_rank_0_died() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True)
    rank = Heartbeat(server, 1, 2, NEVER_S)
    assert rank._beat() is None
    del server
    assert rank._beat() == "rank 0 died: its key-value store does not answer"


def test_an_error_of_another_kind_is_not_explained(job: Callable[..., list[Heartbeat]]) -> None:
    assert job(2, NEVER_S)[0].explain(ValueError("Connection closed by peer")) is None


@pytest.mark.parametrize(("rank", "seen"), [(0, [1, 2]), (1, []), (2, [])])
def test_the_rank_that_holds_the_store_leaves_last(
    monkeypatch: pytest.MonkeyPatch, rank: int, seen: list[int]
) -> None:
    """Check that rank 0 waits: the other ranks, which still read its store, would report it as dead."""
    job_store = dist.HashStore()
    counts: list[int] = []

    def another_leaves(_: float) -> None:
        counts.append(job_store.add("num_left", 0))
        job_store.add("num_left", 1)

    monkeypatch.setattr(collectives, "barrier", lambda: None)
    monkeypatch.setattr(collectives, "store", lambda: job_store)
    monkeypatch.setattr(collectives, "time", SimpleNamespace(sleep=another_leaves))
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    collectives.leave_job()
    assert counts == seen
