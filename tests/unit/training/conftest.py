"""Fixtures of the tests of training."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, free_port


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A process group of one rank."""
    single = World(0, 0, 1, "127.0.0.1", free_port())
    with process_group(single):
        yield single
