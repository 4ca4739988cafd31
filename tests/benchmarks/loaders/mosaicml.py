"""MosaicML Streaming: MDS files with one bytes column per modality, decoded in `__getitem__` of a `StreamingDataset`.

After its user guide ("Dataset conversion", "Main concepts": subclass and override `__getitem__`) and its page on
resumption (`StreamingDataLoader.state_dict`). An absent modality is an empty value: the columns of MDS are fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

from karmma_dist.streaming.batch import Batch, Sample
from loaders.work import StoredClip, Work, collate_clips, decode_clip

PACKAGE = "mosaicml-streaming"
CAN_RESUME = True


class _Clips(StreamingDataset):  # type: ignore[misc]
    def __init__(self, work: Work, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.work = work

    def __getitem__(self, at: int) -> Sample:
        row = super().__getitem__(at)
        return decode_clip(self.work, row["key"], row["json"], row)


class _Loader:
    """`StreamingDataLoader` counts what it yields by the length of a dictionary's first value: hence the keys."""

    def __init__(self, loader: StreamingDataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for item in self.loader:
            yield item["batch"]


def convert(clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:  # noqa: ARG001
    """Write MDS, uncompressed as the media are, in files of about the tars' size."""
    modalities = sorted({m for clip in clips for m in clip.members})
    columns = {"key": "str", "json": "bytes", **dict.fromkeys(modalities, "bytes")}
    clip_bytes = sum(len(data) for clip in clips for data in clip.members.values()) / len(clips)
    with MDSWriter(out=str(out), columns=columns, size_limit=round(clips_per_file * clip_bytes)) as writer:
        for clip in clips:
            members = {m: clip.members.get(m, b"") for m in modalities}
            writer.write({"key": clip.key, "json": clip.metadata, **members})


def open_loader(folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
    """Its workers live on between epochs."""
    clean_stale_shared_memory()  # each arm is a process of its own, and the last one may have left its names behind
    clips = _Clips(work, local=str(folder), shuffle=True, shuffle_seed=work.seed, batch_size=work.batch_size)
    loader = StreamingDataLoader(
        clips,
        batch_size=work.batch_size,
        num_workers=work.num_workers,
        persistent_workers=work.num_workers > 0,
        collate_fn=partial(_collate, work),
    )
    if position is not None:
        loader.load_state_dict(position)
    return _Loader(loader)


def position(loader: Iterable[Batch]) -> Any:
    """`StreamingDataLoader.state_dict`."""
    assert isinstance(loader, _Loader)
    return loader.loader.state_dict()


def _collate(work: Work, samples: Sequence[Sample]) -> dict[str, Any]:
    batch = collate_clips(work, samples)
    return {"keys": batch.keys, "batch": batch}
