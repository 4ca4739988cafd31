"""LitData: chunks written by `optimize`, decoded in `__getitem__` of a `StreamingDataset`.

After its README ("Custom data transforms": subclass and override `__getitem__`; "Pause, resume data streaming":
`StreamingDataLoader.state_dict`). An absent modality is an empty value: all samples have the same structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from litdata import StreamingDataLoader, StreamingDataset, optimize

from karmma_dist.streaming.batch import Batch, Sample
from loaders.work import StoredClip, Work, collate_clips, decode_clip

PACKAGE = "litdata"
CAN_RESUME = True


class _Clips(StreamingDataset):  # type: ignore[misc]
    def __init__(self, work: Work, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.work = work

    def __getitem__(self, index: Any) -> Sample:
        row = super().__getitem__(index)
        return decode_clip(self.work, row["key"], bytes(row["json"]), row)  # it hands out memory views


def convert(clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:  # noqa: ARG001
    """Write chunks of as many clips as a tar has."""
    modalities = sorted({m for clip in clips for m in clip.members})
    optimize(
        fn=partial(_row, clips, modalities),
        inputs=list(range(len(clips))),
        output_dir=str(out),
        chunk_size=clips_per_file,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def open_loader(folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
    """Its workers live on between epochs."""
    clips = _Clips(work, input_dir=str(folder), shuffle=True, seed=work.seed)
    loader: Any = StreamingDataLoader(
        clips,
        batch_size=work.batch_size,
        num_workers=work.num_workers,
        persistent_workers=work.num_workers > 0,
        collate_fn=partial(collate_clips, work),
    )
    if position is not None:
        loader.load_state_dict(position)
    iterable: Iterable[Batch] = loader
    return iterable


def position(loader: Any) -> Any:
    """`StreamingDataLoader.state_dict`."""
    return loader.state_dict()


def _row(clips: Sequence[StoredClip], modalities: Sequence[str], number: int) -> dict[str, Any]:
    clip = clips[number]
    return {"key": clip.key, "json": clip.metadata, **{m: clip.members.get(m, b"") for m in modalities}}
