"""Tests that the examples of property tests are the same in every process and on every machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONSTANT = 987_654_321

DRAW = """
import runpy, sys
runpy.run_path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
for name in sys.argv[3:]:
    __import__(name)
from hypothesis import given, settings, strategies as st
drawn = []
@settings(max_examples=300)
@given(st.integers(0, 2**40), st.floats(0, 1), st.text())
def draw(number, share, text):
    drawn.append((number, share, text))
draw()
print(drawn)
"""


def test_examples_do_not_depend_on_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check it with a module of ours and with one that has a constant that Hypothesis would use."""
    monkeypatch.delenv("HYPOTHESIS_PROFILE", raising=False)
    (tmp_path / "constants.py").write_text(f"SIZE, SHARE, NAME = {CONSTANT}, 0.7071, 'a shard'\n")
    (tmp_path / "draw.py").write_text(DRAW)
    conftest = Path(__file__).parents[1] / "conftest.py"
    modules: tuple[tuple[str, ...], ...] = ((), ("constants",), ("karmma_dist.shards.format", "constants"))
    shown = set()
    for imported in modules:
        words = [sys.executable, "draw.py", str(conftest), str(tmp_path), *imported]
        shown.add(subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    (drawn,) = shown
    assert drawn.count("(") > 100
    assert str(CONSTANT) not in drawn
