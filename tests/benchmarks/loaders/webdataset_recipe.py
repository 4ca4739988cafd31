"""Plain WebDataset on our own tars, after its README: shards and samples shuffled, batches made in the workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds

from karmma_dist.streaming.batch import Batch
from loaders.work import StoredClip, Work, collate_clips, decode_webdataset

PACKAGE = "webdataset"
CAN_RESUME = False


def convert(clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:  # noqa: ARG001
    """Link the tars: they are read as they are."""
    out.mkdir()
    for tar in sorted(shards.glob("train-*.tar")):
        (out / tar.name).symlink_to(tar.resolve())


def open_loader(folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
    """Its shuffle buffers hold 100 shards and 1000 clips, as the README has them."""
    assert position is None, "webdataset cannot resume"
    tars = [str(tar) for tar in sorted(folder.glob("*.tar"))]
    dataset = (
        wds.WebDataset(tars, shardshuffle=100, seed=work.seed)
        .shuffle(1000, seed=work.seed)
        .map(partial(decode_webdataset, work))
        .batched(work.batch_size, collation_fn=partial(collate_clips, work))
    )
    loader: Iterable[Batch] = wds.WebLoader(
        dataset, batch_size=None, num_workers=work.num_workers, persistent_workers=work.num_workers > 0
    )
    return loader


def position(loader: Iterable[Batch]) -> Any:
    """There is none to save: a caller that asks has not looked at `CAN_RESUME`."""
    raise AssertionError(f"{loader!r} cannot resume")
