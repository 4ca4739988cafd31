"""The place of the real media; tests are skipped where they are missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("KARMMA_DIST_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def real(name: str) -> Path:
    """Return a file or folder of the real data, or skip the test."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no real data: {path} is missing (set KARMMA_DIST_REAL_DATA)")
    return path
