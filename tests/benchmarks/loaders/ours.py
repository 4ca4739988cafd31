"""The project's own loader, as training runs it. It decides what a clip loses before it reads or decodes anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from karmma_dist.recipe import DataRecipe, ModalityDropout
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule
from loaders.work import DROP_PROB, StoredClip, Work

PACKAGE = "karmma-dist"
CAN_RESUME = True


class EpochLoader:
    """Batches of one rank, counted. Each iteration is an epoch of one stream: workers go on between them."""

    def __init__(self, folder: Path, work: Work, step: int = 0, split: str = "train") -> None:
        data = DataRecipe(
            shards=str(folder),
            train_split=split,
            modalities=list(work.modalities),
            num_workers=work.num_workers,
            modality_dropout=ModalityDropout(probability=0.0 if work.dropout == "none" else DROP_PROB),
        )
        clips = TrainingClips(open_shards(data), data, work.inputs, work.seed, work.batch_size)
        self.schedule = Schedule(len(clips.clips), work.batch_size)
        self.step = step
        self._batches = training_batches(clips, self.schedule, 0, Position(0, step), work.epochs)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.step = batch.step + 1
            yield batch
            if self.step == self.schedule.steps_per_epoch:
                return


def convert(clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:  # noqa: ARG001
    """Link the shards."""
    out.symlink_to(shards.resolve(), target_is_directory=True)


def open_loader(folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
    """The position is a number of steps."""
    assert work.dropout != "after", "our loader drops before decoding"
    return EpochLoader(folder, work, position or 0)


def position(loader: Iterable[Batch]) -> Any:
    """Steps done."""
    assert isinstance(loader, EpochLoader)
    return loader.step
