"""The loader: clips of a split -> batches, for training and for evaluation; `workers.py` runs it in processes.

A damaged clip is replaced in training and becomes padding in evaluation, and the batch carries a record of the damage.
The batch never shrinks, and no clip loses a modality.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from karmma_dist.errors import UserError
from karmma_dist.memory.memory import AnswerMemory, Source
from karmma_dist.memory.records import Lookups
from karmma_dist.memory.tokens import TokenMemory
from karmma_dist.recipe import DataRecipe, InputRecipe, ViewsRecipe
from karmma_dist.seeding import fallback_words, hold_out_word
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError
from karmma_dist.shards.mixture import Mixture, open_datasets
from karmma_dist.streaming.batch import Batch, Damage, Sample, collate
from karmma_dist.streaming.decoded import DecodedClips
from karmma_dist.streaming.dropout import keep_patterns, keep_present
from karmma_dist.streaming.order import (
    Choice,
    ClipOrder,
    EpochOrder,
    MixtureOrder,
    Position,
    Schedule,
    Slice,
    evaluation_slices,
)
from karmma_dist.streaming.reader import read_samples
from karmma_dist.streaming.views import View, evaluation_views, num_stored_frames, training_view
from karmma_dist.streaming.worker_status import Activity
from karmma_dist.streaming.workers import Batches

_MAX_REPLACEMENTS = 100
"""Number of clips tried for one place before giving up."""


def open_shards(data: DataRecipe) -> Shards:
    """Open the recipe's shards, or the mixture of them, and check that they declare its modalities.

    Raises:
        UserError: the shards lack a modality of the recipe, or cannot be opened.
    """
    folder = open_datasets(data)
    missing = [m for m in data.modalities if m not in folder.modalities]
    if missing:
        raise UserError(
            f"{folder.where}: the shards declare {', '.join(folder.modalities)}, not '{missing[0]}': "
            "pack them with it or remove it from data.modalities"
        )
    return folder


def check_heads(data: DataRecipe, folder: Shards) -> dict[str, int]:
    """Return the number of classes by head of the shards and check it against the recipe's, if it names any.

    Raises:
        UserError: the recipe names other heads or numbers of classes.
    """
    heads = {head: len(names) for head, names in folder.classes.items()}
    if data.heads and data.heads != heads:
        in_recipe, in_shards = (
            ", ".join(f"{head} {num}" for head, num in classes.items()) for classes in (data.heads, heads)
        )
        raise UserError(
            f"{folder.where}: the shards' classes are {in_shards}; data.heads says {in_recipe}: name other shards with "
            "data.shards, or correct data.heads"
        )
    return heads


class _Clips(ABC):
    """The clips of a split, from which batches are made: find the clip of each place, read it, collate all."""

    uncut: Collection[str] = ()
    """Modalities whose whole signals are also in the batches."""

    def __init__(
        self, folder: Shards, data: DataRecipe, inputs: InputRecipe, split: str, needed: Sequence[str] = (),
        held_out: bool | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.data, self.inputs, self.split = folder, data, inputs, split
        self.needed = list(needed or data.modalities)
        self.clips = usable_clips(folder.clips(split), self.needed)
        self.heads = list(folder.classes)
        self._heads_vary = isinstance(folder, Mixture) and folder.heads_vary
        self._decoded = DecodedClips(data.keep_decoded)
        if not self.clips:
            raise UserError(f"{folder.where}: split '{split}' has no clip with any of {', '.join(self.needed)}")
        if held_out is not None and data.hold_out:
            self.clips = [clip for clip, is_out in self._drawn() if is_out == held_out]
            if not self.clips:
                amount = "nothing" if held_out else "everything"
                raise UserError(
                    f"{folder.where}: data.hold_out {data.hold_out:g} holds out {amount} of split '{split}', which has "
                    "too few recordings: choose another fraction"
                )

    def _drawn(self) -> list[tuple[Clip, bool]]:
        """Return each clip with a flag, True if its recording is held out. It reads every clip's metadata once."""
        try:
            named = [(clip, self.folder.metadata(clip).recording) for clip in self.clips]
        except DamageError as error:
            raise UserError(
                f"{error}: data.hold_out needs the recording of every clip: karmma-dist verify --repair "
                f"{self.folder.where}, or pack it again"
            ) from None
        return [(clip, is_held_out(recording, self.data.hold_out)) for clip, recording in named]

    def batch(self, part: Slice, activity: Activity | None = None) -> Batch:
        """Read one slice, recording the current stage in `activity`.

        Raises:
            UserError: no undamaged clip was found for a place of a training batch.
        """
        activity = activity or Activity()
        activity.begin_batch()
        damage: list[Damage] = []
        samples = self._samples_of(part, damage, activity)
        activity.start("collating")
        batch = collate(samples, self.data.modalities, self.heads, part.epoch, part.step)
        batch.heads_vary, batch.damage, batch.stats = self._heads_vary, damage, activity.end_batch()
        return batch

    @abstractmethod
    def _samples_of(self, part: Slice, damage: list[Damage], activity: Activity) -> list[Sample | None]:
        """Return the samples of a batch, one per view of each clip, or None for padding.

        Damaged members are added to `damage`.
        """

    @abstractmethod
    def _views(self, metadata: ClipMetadata, epoch: int) -> list[View]:
        """Return the views of a clip."""

    def _read(
        self, clip: Clip, wanted: list[str], epoch: int, damage: list[Damage], activity: Activity
    ) -> list[Sample] | None:
        """Read the `wanted` modalities of a clip, one sample per view; return None if any of them is damaged."""
        try:
            metadata = self._metadata(clip, activity)
            views = self._views(metadata, epoch)
            return read_samples(
                self.folder, clip, metadata, wanted, self.inputs, views, activity, uncut=self.uncut,
                decoded=self._decoded,
            )  # fmt: skip
        except DamageError as error:
            damage.append(Damage(error.shard, error.key, error.member, error.what))
            return None

    def _metadata(self, clip: Clip, activity: Activity) -> ClipMetadata:
        metadata = self._decoded.metadata(clip)
        if metadata is None:
            with activity.reading(clip, "json"):
                metadata = self.folder.metadata(clip)
            self._decoded.keep_metadata(clip, metadata)
        return metadata


class _EpochDraw(NamedTuple):
    """The draws of one epoch."""

    epoch: int
    order: EpochOrder
    keep: np.ndarray
    """Pattern of kept modalities of each place."""
    words: np.ndarray
    """Random word of each place, for clips that would lose all modalities."""


class _Drawn(NamedTuple):
    """A clip at its place in an epoch."""

    clip: Clip
    present_M: np.ndarray
    """bool, True = the clip has the modality."""
    kept_M: np.ndarray
    """bool, True = the clip brings the modality."""
    source: Source
    """Place of the clip's view in memories."""


class TrainingClips(_Clips):
    """The training clips: they are ordered, lose modalities by dropout, and are replaced if damaged.

    Clips that `data.hold_out` holds out are excluded. Every clip brings at least one of the `needed` modalities (by
    default all), so that a student with fewer modalities than its teacher always receives one.

    With memories (`remember`), a batch whose teacher's answers are all remembered brings them, and of its clips only
    the needed modalities are read, except those whose tokens are remembered. For a teacher whose answers for all
    subsets of a clip's modalities are to be remembered, other batches bring what dropout takes as well.

    Args:
        folder: Opened shards, or a mixture of them.
        data: Split, modalities, dropout, order and weights.
        inputs: Sizes of the arrays.
        seed: Seed of the run.
        batch_size: Clips per optimizer step, over all ranks.
        needed: Modalities of which every clip brings at least one.
        num_views: Number of different views of a clip, which epochs take in turn; 0: a new one in each epoch.
    """

    def __init__(
        self, folder: Shards, data: DataRecipe, inputs: InputRecipe, seed: int, batch_size: int,
        needed: Sequence[str] = (), num_views: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(folder, data, inputs, data.train_split, needed, held_out=False)
        self._num_views = num_views
        self._needed_M = np.array([m in self.needed for m in data.modalities])
        self.seed = seed
        self._draw: _EpochDraw | None = None
        self._order: ClipOrder | MixtureOrder
        if isinstance(folder, Mixture):
            weights = {name: dataset.weight for name, dataset in data.mixture.items()}
            self._order = MixtureOrder(folder.count(self.clips), weights, batch_size, seed)
        else:
            shards = [clip.shard for clip in self.clips]
            self._order = ClipOrder(shards, batch_size, seed, data.order.lanes, data.order.window)
        self._answers: AnswerMemory | None = None
        self._tokens: dict[str, TokenMemory] = {}
        self._is_taught = False

    @property
    def num_places(self) -> int:
        """Number of places of an epoch, for `Schedule`: that of the clips, of a mixture without those left over."""
        return self._order.num_places

    @property
    def counts(self) -> dict[str, int]:
        """Number of places of an epoch by dataset of a mixture; empty without one."""
        return self._order.counts if isinstance(self._order, MixtureOrder) else {}

    def remember(self, answers: AnswerMemory | None, tokens: Mapping[str, TokenMemory], *, is_taught: bool) -> None:
        """Look answers and tokens up from now on.

        Args:
            answers: Memory of the teacher's answers.
            tokens: Memories of frozen encoders, by modality.
            is_taught: True if a teacher sees the batches, unless all its answers are remembered: it needs the arrays of
                every clip.
        """
        self._answers, self._tokens, self._is_taught = answers, dict(tokens), is_taught

    def batch(self, part: Slice, activity: Activity | None = None) -> Batch:
        """Read one slice; see the base class."""
        batch = super().batch(part, activity)
        if self._answers is not None:
            batch.lookups = self._answers.take_lookups()
        batch.token_lookups = sum((memory.take_lookups() for memory in self._tokens.values()), Lookups())
        return batch

    def _drawn_for(self, epoch: int) -> _EpochDraw:
        """Return the draws of an epoch; streams in other threads may be in other epochs."""
        draw = self._draw
        if draw is None or draw.epoch != epoch:
            num, modalities = self.num_places, len(self.data.modalities)
            keep = keep_patterns(num, modalities, self.data.modality_dropout, self.seed, epoch)
            words = fallback_words(num, self.seed, epoch)
            draw = self._draw = _EpochDraw(epoch, self._order.draw(epoch), keep, words)
        return draw

    def _samples_of(self, part: Slice, damage: list[Damage], activity: Activity) -> list[Sample | None]:
        places = range(part.start, part.stop)
        drawn = [self._drawn_at(place, part.epoch, next(self._choices(place, part.epoch))) for place in places]
        remembered = self._remembered(drawn, activity)
        if remembered is not None:
            return list(remembered)
        tokens = self._find_tokens(drawn, {} if self._is_taught else self._tokens)
        return [
            self._replaced_if_damaged(place, part.epoch, clip, found, damage, activity)
            for place, clip, found in zip(places, drawn, tokens, strict=True)
        ]

    def _remembered(self, drawn: Sequence[_Drawn], activity: Activity) -> list[Sample] | None:
        """Return the samples of a batch with their answers; None if an answer is missing or a clip is damaged.

        A clip that replaces a damaged one has other answers. They are found anew, so that the batch is the one of a run
        without a memory.
        """
        if self._answers is None:
            return None
        answers = []
        for clip in drawn:
            answer_EA = self._answers.find(clip.source, clip.kept_M, clip.present_M)
            if answer_EA is None:
                return None
            answers.append(answer_EA)
        samples = []
        for clip, answer_EA, tokens in zip(drawn, answers, self._find_tokens(drawn, self._tokens), strict=True):
            sample = self._read_training(clip, tokens, [], activity, self._needed_M)
            if sample is None:
                return None
            samples.append(replace(sample, answer_EA=answer_EA))
        return samples

    def _find_tokens(
        self, drawn: Sequence[_Drawn], memories: Mapping[str, TokenMemory]
    ) -> list[dict[str, Tensor]]:
        """Return the remembered tokens of each clip of a batch, packed, by modality.

        With a new view in each epoch, a modality is remembered for all of its clips or for none: the encoder then runs
        on the clips on which it would run without a memory, so that its tokens differ by no rounding error.
        """
        found: list[dict[str, Tensor]] = [{} for _ in drawn]
        for modality, memory in memories.items():
            m = self.data.modalities.index(modality)
            having = [place for place, clip in enumerate(drawn) if clip.kept_M[m]]
            packed = [memory.find(drawn[place].source) for place in having]
            if self._num_views or all(tokens is not None for tokens in packed):
                for place, tokens in zip(having, packed, strict=True):
                    found[place] |= {} if tokens is None else {modality: tokens}
        return found

    def _replaced_if_damaged(
        self, place: int, epoch: int, drawn: _Drawn, tokens: Mapping[str, Tensor], damage: list[Damage],
        activity: Activity,
    ) -> Sample:  # fmt: skip
        """Read the clip at `place`, given as `drawn`; if it is damaged, the first undamaged one of the candidates."""
        tried = 0
        for choice in itertools.islice(self._choices(place, epoch), _MAX_REPLACEMENTS):
            clip = self._drawn_at(place, epoch, choice) if tried else drawn
            sample = self._read_training(clip, {} if tried else tokens, damage, activity)
            if sample is not None:
                return replace(sample, dropped=self._read_dropped(clip, activity))
            tried += 1
        raise UserError(f"{self.folder.where}: {tried} clips in a row are damaged, the last: {damage[-1]}")

    def _read_training(
        self, drawn: _Drawn, tokens: Mapping[str, Tensor], damage: list[Damage], activity: Activity,
        needed_M: np.ndarray | None = None,
    ) -> Sample | None:  # fmt: skip
        """Read the kept modalities of a clip whose tokens are not remembered; return None if any of them is damaged.

        Args:
            drawn: The clip.
            tokens: Its remembered tokens, by modality.
            damage: List to which damaged members are added.
            activity: Record of the current stage.
            needed_M: bool, True = the modality is read. None reads all.
        """
        wanted = self._names(drawn.kept_M if needed_M is None else drawn.kept_M & needed_M)
        unknown = [m for m in wanted if m not in tokens]
        samples = [_blank(drawn.clip)]
        if unknown:
            read = self._read(drawn.clip, unknown, drawn.source.epoch, damage, activity)
            if read is None:
                return None
            samples = read
        kept = tuple(self._names(drawn.kept_M))
        return replace(samples[0], kept=kept, source=drawn.source, tokens=dict(tokens))

    def _read_dropped(self, drawn: _Drawn, activity: Activity) -> Sample | None:
        """Read the modalities that dropout takes from a clip, if its answers for all subsets are to be remembered.

        Return None if they are not, or if a modality is damaged. Such a clip is not replaced: a run without a memory
        does not notice.
        """
        if self._answers is None or not self._answers.has_all_subsets:
            return None
        wanted = self._names(drawn.present_M & ~drawn.kept_M)
        if not wanted:
            return _blank(drawn.clip)
        read = self._read(drawn.clip, wanted, drawn.source.epoch, [], activity)
        return None if read is None else read[0]

    def _choices(self, place: int, epoch: int) -> Iterator[Choice]:
        """Yield the clips that may be used for a place: its own first."""
        return self._order.choices(self._drawn_for(epoch).order, place)

    def _drawn_at(self, place: int, epoch: int, choice: Choice) -> _Drawn:
        """Return a clip with the modalities that it keeps at a place."""
        draw = self._drawn_for(epoch)
        clip = self.clips[choice.clip]
        present_M = np.array([clip.has(m) for m in self.data.modalities])
        kept_M = keep_present(draw.keep[place], present_M, int(draw.words[place]), self._needed_M)
        view = choice.view % self._num_views if self._num_views else choice.view
        return _Drawn(clip, present_M, kept_M, Source(view, clip.shard, clip.row))

    def _names(self, kept_M: np.ndarray) -> list[str]:
        return [m for m, keep in zip(self.data.modalities, kept_M, strict=True) if keep]

    def _views(self, metadata: ClipMetadata, epoch: int) -> list[View]:
        return [training_view(self.inputs.video, num_stored_frames(metadata), self.seed, epoch, metadata.key)]


class EvaluationClips(_Clips):
    """The evaluation clips: every clip with all its modalities, in stored order, padded at the end.

    A damaged clip becomes padding, and the batch carries a record of the damage. With several views every clip takes
    that many consecutive rows, all with its key and labels. With `held_out` these are only the clips that
    `data.hold_out` holds out.
    """

    def __init__(
        self, folder: Shards, data: DataRecipe, inputs: InputRecipe, split: str,
        views: ViewsRecipe | None = None, held_out: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(folder, data, inputs, split, held_out=True if held_out else None)
        self.views = views or ViewsRecipe()

    def _samples_of(self, part: Slice, damage: list[Damage], activity: Activity) -> list[Sample | None]:
        samples: list[Sample | None] = []
        for place in range(part.start, part.stop):
            read = None
            if place < len(self.clips):
                clip = self.clips[place]
                wanted = [m for m in self.data.modalities if clip.has(m)]
                read = self._read(clip, wanted, part.epoch, damage, activity)
            samples += [None] * self.views.num if read is None else read
        return samples

    def _views(self, metadata: ClipMetadata, epoch: int) -> list[View]:  # noqa: ARG002
        return evaluation_views(
            self.inputs.video, num_stored_frames(metadata), self.views, is_wide=is_wide(metadata)
        )


def _blank(clip: Clip) -> Sample:
    """Return a sample without arrays."""
    return Sample(clip.key, clip.labels, {}, np.ones(3, dtype=np.float32))


def is_wide(metadata: ClipMetadata) -> bool:
    """Return True if the clip's pictures are at least as wide as high, or if it has none."""
    return metadata.pictures is None or metadata.pictures.width >= metadata.pictures.height


def is_held_out(recording: str, fraction: float) -> bool:
    """Return True if `data.hold_out` of this fraction holds the recording out.

    A larger fraction holds out all recordings that a smaller one does.
    """
    return hold_out_word(recording, "training") < fraction * 2**64


def usable_clips(clips: list[Clip], modalities: list[str]) -> list[Clip]:
    """Return the clips that have at least one of the modalities: a model cannot use the others."""
    return [clip for clip in clips if any(clip.has(m) for m in modalities)]


def training_batches(clips: TrainingClips, schedule: Schedule, rank: int, start: Position, epochs: int) -> Batches:
    """Return this rank's batches from `start` to the end of the last epoch, one per forward pass.

    All remaining epochs are one stream: workers do not restart between them.
    """
    slices = partial(schedule.slices, rank, start, epochs)
    return Batches(clips, slices, clips.data.num_workers, clips.data.stall_s, rank)


def evaluation_batches(clips: EvaluationClips, batch_size: int, rank: int = 0, world_size: int = 1) -> Batches:
    """Return this rank's batches of one pass over an evaluation split: the same number on every rank."""
    slices = partial(evaluation_slices, len(clips.clips), batch_size, rank, world_size)
    num_batches = -(-len(clips.clips) // (batch_size * world_size))
    return Batches(clips, slices, min(clips.data.num_workers, num_batches), clips.data.stall_s, rank)
