"""The reader of one clip: it reads, checks and decodes the wanted members, each once, to arrays of the views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from karmma_dist.modalities import MODALITIES, DecodeError, Decoder, Description, View
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError, member_name
from karmma_dist.streaming.decoded import DecodedClips
from karmma_dist.streaming.worker_status import Activity

if TYPE_CHECKING:
    from torch import Tensor

    from karmma_dist.memory.memory import Source


@dataclass(frozen=True)
class UncutSignal:
    """A clip's whole decoded member, from which a view is cut."""

    decoded: np.ndarray
    """The whole decoded member, shared by all views of the clip."""
    description: Description
    view: View
    length_s: float
    """Length of the clip in seconds; the view's times are fractions of it."""

    def cut(self, decoder: Decoder, settings: Any, decoded: np.ndarray | None = None) -> np.ndarray:
        """Cut the view's array with the modality's decoder, from this signal or from `decoded` if given."""
        whole = self.decoded if decoded is None else decoded
        return decoder.cut(whole, self.description, settings, [self.view], self.length_s)[0]


@dataclass
class Sample:
    """One decoded clip: arrays of its modalities in the batch; all other modalities are absent."""

    key: str
    labels: dict[str, int | None]
    arrays: dict[str, np.ndarray]
    jitter_3: np.ndarray
    uncut: dict[str, UncutSignal] = field(default_factory=dict)
    """Whole signals from which arrays are cut, by modality, for the modalities that were requested."""
    kept: tuple[str, ...] | None = None
    """Modalities that the clip brings, if not all of them were read: what models say of the others is remembered."""
    source: Source | None = None
    """The clip's place in memories; None without one."""
    answer_EA: Tensor | None = None
    """The teacher's remembered answer."""
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Remembered tokens of frozen encoders, packed, uint8 (X,), by modality; their arrays are missing."""
    dropped: Sample | None = None
    """The same clip with the modalities that dropout takes from it; None if they were not read or one is damaged."""


def read_sample(
    folder: Shards, clip: Clip, metadata: ClipMetadata, wanted: Iterable[str], inputs: InputRecipe, view: View,
    activity: Activity | None = None, *, uncut: Iterable[str] = (),
) -> Sample:  # fmt: skip
    """Read, check and decode the `wanted` modalities of a clip (all of which it must declare).

    Args:
        folder: The clip's shards.
        clip: The clip as the index declares it.
        metadata: The clip's KEY.json.
        wanted: Modalities to read.
        inputs: Sizes of the arrays.
        view: View of the clip.
        activity: Record of the current stage and its time.
        uncut: Modalities whose whole signal is also in the sample.

    Raises:
        DamageError: a member is unreadable, differs from the bytes that were written, or does not decode.
    """
    return read_samples(folder, clip, metadata, wanted, inputs, [view], activity, uncut=uncut)[0]


def read_samples(
    folder: Shards, clip: Clip, metadata: ClipMetadata, wanted: Iterable[str], inputs: InputRecipe,
    views: Sequence[View], activity: Activity | None = None, *, uncut: Iterable[str] = (),
    decoded: DecodedClips | None = None,
) -> list[Sample]:  # fmt: skip
    """Read one sample per view; every member is read and decoded once.

    Members in `decoded` are neither read nor decoded again, and newly decoded members are added to it. It does not
    change the samples.

    Raises:
        DamageError: a member is unreadable, differs from the bytes that were written, or does not decode.
    """
    activity, kept, uncut = activity or Activity(), decoded or DecodedClips(0), set(uncut)
    arrays: dict[str, np.ndarray] = {}
    signals: dict[str, list[UncutSignal]] = {}
    for modality in wanted:
        decoder, description = MODALITIES[modality].decoder, metadata.description(modality)
        settings, length_s = inputs.section(modality), metadata.length_s
        whole, data = kept.get(clip, modality), b""
        if whole is None:
            with activity.reading(clip, modality):
                data = folder.read(clip, modality)
        try:
            with activity.decoding(clip, modality):
                if whole is None and (decoder.always_whole or modality in uncut or kept.takes_more):
                    whole = decoder.decode(data, description, settings)
                    kept.keep(clip, modality, whole)
                if whole is None:
                    arrays[modality] = decoder.decode_views(data, description, settings, views, length_s)
                else:
                    arrays[modality] = decoder.cut(whole, description, settings, views, length_s)
        except DecodeError as error:
            raise DamageError(
                clip.shard, clip.key, member_name(clip.key, modality), f"does not decode: {error}"
            ) from None
        if modality in uncut:
            assert whole is not None
            signals[modality] = [UncutSignal(whole, description, view, length_s) for view in views]
    return [
        Sample(
            clip.key,
            clip.labels,
            {name: arrays_V[number] for name, arrays_V in arrays.items()},
            view.jitter_3,
            {name: signals_V[number] for name, signals_V in signals.items()},
        )
        for number, view in enumerate(views)
    ]
