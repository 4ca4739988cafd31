"""A reader of a raw dataset: from its annotations to the recordings and clips to pack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from karmma_dist.settings import Settings

if TYPE_CHECKING:
    from karmma_dist.packing.records import Plan
    from karmma_dist.packing.spec import PackingSpec


def _accept(_: PackingSpec) -> None:
    """Find nothing wrong."""


@dataclass(frozen=True)
class Reader:
    """One layout of a raw folder."""

    paths: type[Settings]
    """Its section of the specification, of the reader's name: where the dataset keeps things."""
    read: Callable[[PackingSpec], Plan]
    """Reads the annotations and looks which media exist. Raises UserError with file and row."""
    modalities: tuple[str, ...]
    """Modalities that every clip declares; those of other packages are declared where they have a section."""
    takes_participants: bool = True
    """True if recordings name the participant."""
    check: Callable[[PackingSpec], None] = _accept
    """Raises ValueError where the specification asks for what no such dataset has."""
