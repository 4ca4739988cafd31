"""The table of readers of raw datasets, open to other packages (entry points `karmma_dist.readers`)."""

from __future__ import annotations

import functools

from karmma_dist.errors import nearest, quoted
from karmma_dist.packing.readers.csv_table import PLAIN
from karmma_dist.packing.readers.epic_kitchens import EPIC_KITCHENS
from karmma_dist.packing.readers.epic_sounds import EPIC_SOUNDS
from karmma_dist.packing.readers.reader import Reader
from karmma_dist.packing.readers.something_something import SOMETHING_SOMETHING
from karmma_dist.plugins import with_plugins

__all__ = ["Reader", "find_reader", "readers"]


@functools.cache
def readers() -> dict[str, Reader]:
    """Return all readers by name."""
    built_in = {
        "epic_kitchens": EPIC_KITCHENS, "epic_sounds": EPIC_SOUNDS, "something_something": SOMETHING_SOMETHING,
        "plain": PLAIN,
    }  # fmt: skip
    return with_plugins(built_in, "karmma_dist.readers", Reader)


def find_reader(name: str) -> Reader:
    """Return a reader by its name.

    Raises:
        ValueError: no reader has this name.
    """
    if name not in readers():
        raise ValueError(f"no reader {quoted(name)}{nearest(name, list(readers()))}; there are {', '.join(readers())}")
    return readers()[name]
