"""The facts that decide what a frozen model says of training views, for the headers of memories."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import cv2

import karmma_dist
from karmma_dist.distributed.collectives import gather, on_main, raise_on_all
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.memory.header import MemoryHeader, open_header
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import Shards


def view_facts(recipe: Recipe, folder: Shards, modalities: Collection[str]) -> dict[str, Any]:
    """Return what decides the arrays of a clip's views: the clips, the draws, the sizes and the decoders.

    Args:
        recipe: The run's recipe.
        folder: The opened shards.
        modalities: Modalities that the frozen model sees.
    """
    (shards,) = folder.folders  # a mixture has no memory
    return {
        "shards (sha256 of their manifest)": shards.sha256,
        "split": recipe.data.train_split,
        "seed of the views": recipe.seed,
        "frames, crop and jitter": recipe.inputs.video.model_dump(mode="json"),
        "inputs": {name: recipe.inputs.section(name).model_dump(mode="json") for name in modalities},
        "decoders": decoder_versions(),
    }


def clips_per_shard(recipe: Recipe, folder: Shards) -> dict[str, int]:
    """Return the number of training clips by shard."""
    (shards,) = folder.folders  # a mixture has no memory
    return {shard.name: shard.num_clips for shard in shards.manifest.splits[recipe.data.train_split].shards}


def open_on_all(field: str, path: Path, make: Callable[[], MemoryHeader], world: World) -> MemoryHeader:
    """Return the header of a memory, which is made where it does not exist. Every rank must call this.

    The ranks may have different disks: then each node has its own part of the memory.

    Args:
        field: Recipe field that names the memory, for messages.
        path: Folder of the memory.
        make: Makes the header that the recipe needs, on the main rank.
        world: This rank.

    Raises:
        UserError: the memory is of something else, or cannot be written.
    """

    def make_and_open() -> MemoryHeader:
        with _naming(field, path):
            header = make()
            open_header(path, header)
        return header

    (header,) = gather([made] if (made := on_main(make_and_open, world)) else [])
    problem = None
    try:
        if not world.is_main:
            with _naming(field, path):
                open_header(path, header)
    except UserError as error:
        problem = str(error)
    raise_on_all(problem)
    return header


def decoder_versions() -> dict[str, str]:
    """Return the versions of everything that decodes and converts clips, of this package without the patch release."""
    libraries = {name: ".".join(map(str, av.library_versions[name])) for name in ("libavcodec", "libswscale")}
    own = ".".join(karmma_dist.__version__.split(".")[:2])
    return {"karmma-dist": own, "av": av.__version__, "opencv": cv2.__version__, **libraries}


@contextmanager
def _naming(field: str, path: Path) -> Iterator[None]:
    """Name the field of the recipe in errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except OSError as error:
        raise UserError(f"{field}: {error.filename or path}: {error.strerror or error}: name another folder") from None
