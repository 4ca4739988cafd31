"""A reader of a raw dataset: from its annotations to the recordings and clips to pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from karmma_dist.settings import Settings, mark

if TYPE_CHECKING:
    from karmma_dist.packing.records import Plan
    from karmma_dist.packing.spec import PackingSpec


RECORDED_IF_CHANGED = mark("recorded_if_changed")
"""Mark of fields that are younger than shards that exist: manifests hold them only if they have not their default."""


def _accept(_: PackingSpec) -> None:
    """Accept any specification."""


@dataclass(frozen=True)
class Reader:
    """One layout of a raw folder."""

    paths: type[Settings]
    """Class of the specification's section of this reader: the sub-paths of the dataset."""
    read: Callable[[PackingSpec], Plan]
    """Function that reads the annotations and checks which media exist. Raises UserError with file and row."""
    modalities: tuple[str, ...]
    """Modalities that every clip declares; those that are no field of the specification are declared if they have a
    section."""
    takes_participants: bool = True
    """True if recordings name the participant."""
    check: Callable[[PackingSpec], None] = _accept
    """Function that raises ValueError if the specification asks for media that such datasets lack."""
    on_request: Mapping[str, str] = field(default_factory=dict)
    """Further modalities, each with the `source` by which a specification asks for it: clips declare it only then."""
