"""Tests of progress on a pipe: plain lines, the first, the last, and few between."""

from __future__ import annotations

import pytest

from karmma_dist.progress import Progress


def test_a_pipe_gets_the_first_and_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as report:
        for done in range(101):
            report("pack", done, 100, "note")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("pack: 0/100")
    assert lines[-1].startswith("pack: 100/100")
    assert len(lines) < 10
    assert all("note" in line for line in lines)
