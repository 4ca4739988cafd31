"""Preemption: the reasons to stop a run, the agreement of the ranks, and the exit code."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist import cli
from karmma_dist.errors import Stopped, UserError
from karmma_dist.training.fault_tolerance.preemption import (
    STOP_FILE,
    PreemptionHandler,
    Stop,
    parse_duration,
    refuse_stop_file,
)


@pytest.mark.parametrize(
    ("number", "state", "code"),
    [(signal.SIGUSR2, "preempted", 85), (signal.SIGTERM, "preempted", 85), (signal.SIGINT, "interrupted", 130)],
)
def test_signal_sets_a_flag_and_determines_the_exit_code(
    tmp_path: Path, number: signal.Signals, state: str, code: int
) -> None:
    before = signal.getsignal(number)
    with PreemptionHandler(rank=3) as preemption:
        assert preemption.agree(tmp_path) is None
        os.kill(os.getpid(), number)
        assert preemption.pending
        assert preemption.agree(tmp_path) == preemption.agree(tmp_path) == Stop(number.name, 3)
        os.kill(os.getpid(), number)  # again, as in the middle of saving: nothing is raised
    stop = Stop(number.name, 3)
    assert (stop.state, stop.exit_code) == (state, code)
    assert signal.getsignal(number) == before


@given(st.lists(st.sampled_from([None, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT]), min_size=1, max_size=4))
def test_all_ranks_stop_for_the_reason_of_highest_priority(signals: list[signal.Signals | None]) -> None:
    words: list[int] = []

    def answers(highest: Callable[[int], int]) -> list[Stop | None]:
        stops = []
        for rank, number in enumerate(signals):
            with PreemptionHandler(rank, None, highest) as preemption:
                if number is not None:
                    os.kill(os.getpid(), number)
                stops.append(preemption.agree(Path("nowhere")))
        return stops

    answers(lambda word: words.append(word) or word)  # type: ignore[func-returns-value]
    agreed = answers(lambda word: max(words))  # noqa: ARG005
    strength = {signal.SIGUSR2: 1, signal.SIGTERM: 2, signal.SIGINT: 3}
    heard_by = [(strength[number], rank) for rank, number in enumerate(signals) if number is not None]
    if not heard_by:
        assert agreed == [None] * len(signals)
        return
    rank = max(heard_by)[1]
    number = signals[rank]
    assert number is not None
    assert agreed == [Stop(number.name, rank)] * len(signals)


def test_stop_file_is_read_by_rank_0_and_prevents_starting(tmp_path: Path) -> None:
    refuse_stop_file(tmp_path)
    (tmp_path / STOP_FILE).touch()
    stop = PreemptionHandler(rank=0).agree(tmp_path)
    assert stop == Stop(STOP_FILE, 0)
    assert (stop.state, stop.exit_code) == ("stopped", 1)
    assert PreemptionHandler(rank=1).agree(tmp_path) is None
    with pytest.raises(UserError, match="STOP stops this run"):
        refuse_stop_file(tmp_path)


def test_time_limit_leaves_room_for_the_longest_step_and_save(tmp_path: Path) -> None:
    now = time.monotonic()
    assert PreemptionHandler(0, now - 1).agree(tmp_path) == Stop("time limit", 0)
    preemption = PreemptionHandler(0, now + 10_000)
    preemption.record_durations(step_s=4_000)
    preemption.record_durations(step_s=10, save_s=5_000)
    assert not preemption.pending
    preemption.record_durations(save_s=7_000)
    assert preemption.pending
    stop = preemption.agree(tmp_path)
    assert stop is not None
    assert (stop.reason, stop.exit_code) == ("time limit", 85)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1:30:00", 5400), ("90", 5400), ("90:30", 5430), ("2-0", 172_800), ("1-12:30", 131_400),
        ("1-00:00:01", 86_401), ("45s", 45), ("1.5h", 5400), ("2d", 172_800), ("10m", 600),
    ],
)  # fmt: skip
def test_time_limits_use_the_sbatch_format_or_a_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "x", "1:2:3:4", "1-", "-5", "5w", "h", "1 h", "-1:00"])
def test_invalid_time_limit_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="is not a time limit"):
        parse_duration(text)


def test_command_line_prints_the_reason_and_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**_: object) -> None:
        raise Stopped("student: preempted by SIGUSR2", 85)

    monkeypatch.setattr(cli, "cli", stopped)
    assert cli.main([]) == 85
    assert capsys.readouterr().err == "student: preempted by SIGUSR2\n"
