"""The loaders that `loader.py` compares: ours and its peers, each used as its own documentation says for clips.

One module per loader, with the functions of `Loader`. Importing a peer's module fails where its package is not
installed; `requirements.txt` lists what they need. The project itself never needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from karmma_dist.streaming.batch import Batch
from loaders.work import StoredClip, Work

OURS = "karmma-dist"
"""Name of our own loader in the tables."""

MODULES = {
    OURS: "ours",
    "webdataset": "webdataset_recipe",
    "MosaicML streaming": "mosaicml",
    "litdata": "litdata_chunks",
    "Megatron-Energon": "energon",
}
"""Name in the tables -> module of this package."""


class Loader(Protocol):
    """What a module of this package offers."""

    PACKAGE: str
    """Name of its distribution."""
    CAN_RESUME: bool
    """Whether it can start in the middle of an epoch without going through what came before."""

    def convert(self, clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:
        """Make the folder `out`: the clips in the loader's own format."""

    def open_loader(self, folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
        """Open a converted folder, shuffled, from `position` (None: the start).

        Each iteration goes on to the end of an epoch, decoded and in batches; at most `work.epochs` iterations.
        """

    def position(self, loader: Iterable[Batch]) -> Any:
        """Where the loader stands, to be handed to `open_loader` in another process."""


def find_loaders() -> tuple[dict[str, Loader], dict[str, str]]:
    """The loaders that are installed, by name; and for each known one what was found."""
    found: dict[str, Loader] = {}
    said = {}
    for name, module in MODULES.items():
        try:
            loader: Any = importlib.import_module(f"loaders.{module}")
        except ImportError as error:
            said[name] = f"not installed ({error})"
            continue
        found[name] = loader
        said[name] = f"{loader.PACKAGE} {version(loader.PACKAGE)}" if name != OURS else "this checkout"
    return found, said
