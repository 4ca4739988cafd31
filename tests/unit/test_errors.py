"""Tests that an error is one line and shows no secrets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.cli import main
from karmma_dist.errors import masked, one_line


@given(st.text(), st.integers(0, 50))
def test_an_errors_text_is_one_line_within_its_limit(text: str, limit: int) -> None:
    assert len(one_line(ValueError(text)).splitlines()) <= 1
    assert len(one_line(text, limit)) <= limit


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("  not\n\there ", "not here"),
        ("s3://anna:hush@host/shards: 403", "s3://***@host/shards: 403"),
        ("got 'https://host/a?sig=hush' (404)", "got 'https://host/a (404)"),
        ("twice\nhttp://a:hush@x/y https://z/w?hush", "twice http://***@x/y https://z/w"),
        ("https://[hush", "https://***"),
        ("data/a?b@c: no such file", "data/a?b@c: no such file"),
        ("see https://host/page: it says how", "see https://host/page: it says how"),
    ],
)
def test_urls_in_an_error_are_shown_without_secrets(text: str, shown: str) -> None:
    assert one_line(RuntimeError(text)) == shown
    assert one_line(shown) == shown


def test_an_invalid_url_is_masked_completely() -> None:
    assert masked("https://user:hush@[x/y") == "https://***"


def test_a_command_that_fails_shows_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "https://anna:hush@host/recipe.yaml?sig=hush"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: https://***@host/recipe.yaml")
    assert "hush" not in shown
    assert shown.count("\n") == 1
