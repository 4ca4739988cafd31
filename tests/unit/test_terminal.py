"""Tests of terminal tables: literal text, a line per row, and a footer line by line."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.terminal import print_table


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
def test_a_row_is_one_line_where_the_output_is_no_terminal(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(["run", "steps"], [[word, "1,234/5,678"] for word in words], right=["steps"], title=" ".join(words))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " ".join(words)
    assert [line.split() for line in lines[3:]] == [[word, "1,234/5,678"] for word in words]
