"""Tests of terminal tables: literal text within the width, and a footer line by line."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.terminal import WIDTH, print_table


def test_a_table_is_title_headings_rows_and_footer(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["train", "67,217", "V+F+A 67,217"], ["validation", "9,668", "V+F 12"]]
    footer = ["a path that can be copied: " + "x" * 100, ""]
    title = "shards/a folder with a long name: packed"
    print_table(["split", "clips", "modalities"], rows, right=["clips"], title=title, footer=footer)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        title,
        "split        clips  modalities",
        "─" * 32,
        "train       67,217  V+F+A 67,217",
        "validation   9,668  V+F 12",
        *footer,
    ]


@pytest.mark.parametrize("text", ["[bold]a[/bold]", "audio:mute:3", "[/]", ":smile:", "a\\[b]"])
def test_user_text_is_shown_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table([text, "other"], [[text, "1"]], title=text, footer=[text])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].rstrip() == lines[-1] == text
    assert lines[1].startswith(f"{text} ")
    assert lines[3].startswith(f"{text} ")


@given(words=st.lists(st.text("abcdefgh/", min_size=1, max_size=150), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_long_cells_are_wrapped_and_never_cut_off(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(["run", "steps"], [[word, "1,234/5,678"] for word in words], right=["steps"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert all(len(line) <= WIDTH for line in lines)
    shown = "".join(line.replace("1,234/5,678", "").replace(" ", "") for line in lines)
    assert shown == "".join(words)
    assert sum("1,234/5,678" in line for line in lines) == len(words)
