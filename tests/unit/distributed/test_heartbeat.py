"""Who is missing is told from beats and marks in the job's store; threads and clocks take no part here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from karmma_dist.distributed import collectives, heartbeat
from karmma_dist.distributed.heartbeat import Presence, wait_for
from karmma_dist.errors import Stopped

FOREVER = 1e9


@pytest.fixture
def job() -> Callable[..., list[Presence]]:
    """Makes the presences of a job's ranks, whose threads are not started."""
    server = dist.TCPStore("127.0.0.1", 0, None, True)

    def make(size: int, limit_s: float) -> list[Presence]:
        return [Presence(server, rank, size, limit_s) for rank in range(size)]

    return make


def test_nobody_is_missing_while_all_beat(job: Callable[..., list[Presence]]) -> None:
    ranks = job(3, FOREVER)
    assert [rank._look() for _ in range(3) for rank in ranks] == [None] * 9


def test_a_rank_whose_beat_stands_still_is_named_by_all(job: Callable[..., list[Presence]]) -> None:
    ranks = job(3, 0.0)
    ranks[2].mark("in step 8", FOREVER)
    ranks[2]._write()
    ranks[1].mark("in step 8", FOREVER)
    assert ranks[1]._look() is None  # sees the one beat of rank 2
    why = ranks[1]._look()
    assert why is not None
    assert why.startswith("rank 2 (")
    assert why.endswith("last seen in step 8")
    assert ranks[0]._look() == why


def test_of_ranks_that_wait_for_each_other_the_one_with_the_fewest_marks_is_named(
    job: Callable[..., list[Presence]],
) -> None:
    ranks = job(3, FOREVER)
    for rank in ranks:
        rank.mark("waiting for a batch of step 2")
        rank._write()
    for rank in (0, 2):
        ranks[rank].mark("in step 2", 0.0)
        ranks[rank]._write()
    assert ranks[1]._look() is None  # it cannot know better than to wait
    why = ranks[0]._look()
    assert why is not None
    assert why.startswith("rank 1 (")
    assert "while it is waiting for a batch of step 2" in why


def test_ranks_that_are_all_at_the_same_mark_are_told_so(job: Callable[..., list[Presence]]) -> None:
    ranks = job(2, FOREVER)
    for rank in ranks:
        rank.mark("in step 2", 0.0)
        rank._write()
    assert str(ranks[0]._look()).startswith("all ranks hang for 0 s, in step 2")


def test_a_rank_that_leaves_says_why_and_a_waiting_one_is_stopped_by_it(job: Callable[..., list[Presence]]) -> None:
    ranks = job(2, FOREVER)
    ranks[1].leave("clip a: the disk is gone")
    why = ranks[0]._look()
    assert why is not None
    assert why.startswith("rank 1 (")
    assert why.endswith("stopped: clip a: the disk is gone")
    ranks[0]._lost = why
    heartbeat.begin(ranks[0])
    try:
        with pytest.raises(Stopped, match="the disk is gone") as raised:
            wait_for(dist.HashStore(), "never")
    finally:
        heartbeat.begin(None)
    assert raised.value.exit_code == 1


def test_a_store_that_does_not_answer_means_that_rank_0_is_gone() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True)
    rank = Presence(server, 1, 2, FOREVER)
    assert rank._look() is None
    del server
    assert rank._look() == "rank 0 died: its key-value store does not answer"


def test_an_error_of_our_own_is_not_explained_away(job: Callable[..., list[Presence]]) -> None:
    assert job(2, FOREVER)[0].explain(ValueError("Connection closed by peer")) is None


@pytest.mark.parametrize(("rank", "seen"), [(0, [1, 2]), (1, []), (2, [])])
def test_the_rank_that_holds_the_store_leaves_after_all_others(
    monkeypatch: pytest.MonkeyPatch, rank: int, seen: list[int]
) -> None:
    """Else the others, who still look into it, would take its end for a death."""
    meeting = dist.HashStore()
    looks: list[int] = []

    def another_leaves(_: float) -> None:
        looks.append(meeting.add("parted", 0))
        meeting.add("parted", 1)

    monkeypatch.setattr(collectives, "barrier", lambda: None)
    monkeypatch.setattr(collectives, "store", lambda: meeting)
    monkeypatch.setattr(collectives, "time", SimpleNamespace(sleep=another_leaves))
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    collectives.part()
    assert looks == seen
