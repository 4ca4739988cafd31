"""Batches for training and evaluation, on webdataset's `DataPipeline` and `WebLoader` with our own order as source.

Worker w of W decodes every W-th slice, over all remaining epochs in one stream: nothing restarts between epochs, and
the stream a rank sees is the same for any number of workers. A damaged clip is replaced, and the event travels with
its batch; the batch never shrinks and no clip loses a modality.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch.utils.data
import webdataset as wds

from karmma_dist.errors import UserError
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.shards import Clip, DamageError, ShardFolder
from karmma_dist.streaming.augment import evaluation_view, training_view
from karmma_dist.streaming.batch import Batch, Damage, Sample, collate
from karmma_dist.streaming.dropout import keep_patterns, keep_present
from karmma_dist.streaming.order import Position, Schedule, Slice, epoch_order, evaluation_slices, random_words
from karmma_dist.streaming.reader import num_stored_frames, read_sample
from karmma_dist.streaming.remote import open_folder

_MAX_REPLACEMENTS = 100
"""Clips tried in a damaged one's place before giving up."""


def open_shards(data: DataRecipe) -> ShardFolder:
    """Open the recipe's shards and check that they declare its modalities.

    Raises:
        UserError: they do not, or cannot be opened.
    """
    folder = open_folder(data)
    missing = [m for m in data.modalities if m not in folder.modalities]
    if missing:
        raise UserError(
            f"{folder.where}: the shards declare {', '.join(folder.modalities)}, not '{missing[0]}': "
            "pack them with it or remove it from data.modalities"
        )
    return folder


class TrainingClips:
    """Turns a training slice into a batch: order, modality dropout, views, damage and its replacement."""

    def __init__(self, folder: ShardFolder, data: DataRecipe, inputs: InputRecipe, seed: int) -> None:
        self.folder, self.data, self.inputs, self.seed = folder, data, inputs, seed
        self.clips = usable_clips(folder.clips(data.train_split), data.modalities)
        self.heads = list(folder.classes)
        self._epoch = -1
        if not self.clips:
            raise UserError(f"{folder.where}: split '{data.train_split}' has no clip with any of {data.modalities}")

    def batch(self, part: Slice) -> Batch:
        """Decode one slice.

        Raises:
            UserError: a place of the batch found no whole clip at all.
        """
        started = time.perf_counter()
        self._seek(part.epoch)
        damage: list[Damage] = []
        samples = [self._sample(place, part.epoch, damage) for place in range(part.start, part.stop)]
        batch = collate(samples, self.data.modalities, self.heads, part.epoch, part.step)
        batch.damage, batch.load_s = damage, time.perf_counter() - started
        return batch

    def _seek(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        num, modalities = len(self.clips), len(self.data.modalities)
        self._order = epoch_order(num, self.seed, epoch)
        self._keep = keep_patterns(num, modalities, self.data.modality_dropout, self.seed, epoch)
        self._words = random_words(num, self.seed + 2**63, epoch)
        self._epoch = epoch

    def _sample(self, place: int, epoch: int, damage: list[Damage]) -> Sample:
        """The clip at `place`; when it is damaged, the first whole one from half an epoch further on."""
        num = len(self.clips)
        for attempt in range(min(_MAX_REPLACEMENTS, num)):
            offset = num // 2 + attempt - 1 if attempt else 0
            clip = self.clips[self._order[(place + offset) % num]]
            present = np.array([clip.has(m) for m in self.data.modalities])
            kept = keep_present(self._keep[place], present, int(self._words[place]))
            try:
                metadata = self.folder.metadata(clip)
                view = training_view(self.inputs.video, num_stored_frames(metadata), self.seed, epoch, clip.key)
                wanted = [m for m, keep in zip(self.data.modalities, kept, strict=True) if keep]
                return read_sample(self.folder, clip, metadata, wanted, self.inputs, view)
            except DamageError as error:
                damage.append(Damage(error.shard, error.key, error.member, error.what))
        raise UserError(f"{self.folder.where}: {_MAX_REPLACEMENTS} clips in a row are damaged, the first: {damage[0]}")


class EvaluationClips:
    """Turns an evaluation slice into a batch: every clip with all it has, in stored order, padded at the end.

    A damaged clip becomes padding and its event travels with the batch.
    """

    def __init__(self, folder: ShardFolder, data: DataRecipe, inputs: InputRecipe, split: str) -> None:
        self.folder, self.data, self.inputs = folder, data, inputs
        self.clips = usable_clips(folder.clips(split), data.modalities)
        self.heads = list(folder.classes)
        if not self.clips:
            raise UserError(f"{folder.where}: split '{split}' has no clip to evaluate")

    def batch(self, part: Slice) -> Batch:
        """Decode one slice."""
        started = time.perf_counter()
        damage: list[Damage] = []
        samples = [self._sample(place, damage) for place in range(part.start, part.stop)]
        batch = collate(samples, self.data.modalities, self.heads, part.epoch, part.step)
        batch.damage, batch.load_s = damage, time.perf_counter() - started
        return batch

    def _sample(self, place: int, damage: list[Damage]) -> Sample | None:
        if place >= len(self.clips):
            return None
        clip = self.clips[place]
        try:
            metadata = self.folder.metadata(clip)
            view = evaluation_view(self.inputs.video, num_stored_frames(metadata))
            wanted = [m for m in self.data.modalities if clip.has(m)]
            return read_sample(self.folder, clip, metadata, wanted, self.inputs, view)
        except DamageError as error:
            damage.append(Damage(error.shard, error.key, error.member, error.what))
            return None


def usable_clips(clips: list[Clip], modalities: list[str]) -> list[Clip]:
    """Clips that have at least one of the modalities: the others cannot be shown to the model at all."""
    return [clip for clip in clips if any(clip.has(m) for m in modalities)]


def training_batches(
    clips: TrainingClips, schedule: Schedule, rank: int, start: Position, epochs: int
) -> Iterator[Batch]:
    """This rank's batches from `start` to the end of the last epoch, one per forward pass."""
    slices = list(schedule.slices(rank, start, epochs))
    return _stream(clips, slices, clips.data.num_workers)


def evaluation_batches(clips: EvaluationClips, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """This rank's share of one pass over an evaluation split: the same number of batches on every rank."""
    slices = list(evaluation_slices(len(clips.clips), batch_size, rank, world_size))
    return _stream(clips, slices, min(clips.data.num_workers, len(slices)))


def _stream(clips: TrainingClips | EvaluationClips, slices: list[Slice], num_workers: int) -> Iterator[Batch]:
    pipeline = wds.DataPipeline(partial(_own_slices, slices), wds.map(partial(_batch_or_error, clips)))
    loader = wds.WebLoader(
        pipeline, batch_size=None, num_workers=num_workers, prefetch_factor=2 if num_workers else None
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _own_slices(slices: list[Slice]) -> Iterator[Slice]:
    """Source of the pipeline: every W-th slice, from the worker's number on."""
    worker = torch.utils.data.get_worker_info()
    first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
    yield from slices[first::stride]


def _batch_or_error(clips: TrainingClips | EvaluationClips, part: Slice) -> Batch | UserError:
    """A user's error is handed over as an item: raised in a worker it would arrive as a traceback."""
    try:
        return clips.batch(part)
    except UserError as error:
        return error
