"""One clip of a shard -> arrays of its views: the wanted members read, checked and decoded, each once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from karmma_dist.modalities import MODALITIES, DecodeError, View
from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, ClipMetadata, DamageError, member_name
from karmma_dist.streaming.batch import Sample, UncutSignal
from karmma_dist.streaming.decoded import DecodedClips
from karmma_dist.streaming.worker_status import Activity


def read_sample(
    folder: ShardFolder, clip: Clip, metadata: ClipMetadata, wanted: Iterable[str], inputs: InputRecipe, view: View,
    activity: Activity | None = None, *, uncut: Iterable[str] = (),
) -> Sample:  # fmt: skip
    """Read, check and decode the `wanted` modalities of a clip (all of which it must declare).

    Args:
        folder: The clip's shards.
        clip: As the index declares it.
        metadata: Its KEY.json.
        wanted: Modalities.
        inputs: Sizes of the arrays.
        view: How to look at the clip.
        activity: Told what is being done, and for how long.
        uncut: Modalities of which the sample brings also the whole signal.

    Raises:
        DamageError: a member is unreadable, not the bytes that were written, or does not decode.
    """
    return read_samples(folder, clip, metadata, wanted, inputs, [view], activity, uncut=uncut)[0]


def read_samples(
    folder: ShardFolder, clip: Clip, metadata: ClipMetadata, wanted: Iterable[str], inputs: InputRecipe,
    views: Sequence[View], activity: Activity | None = None, *, uncut: Iterable[str] = (),
    decoded: DecodedClips | None = None,
) -> list[Sample]:  # fmt: skip
    """Read one sample per view; every member is read and decoded once.

    What `decoded` holds is neither read nor decoded again, and what is decoded is offered to it: same samples.

    Raises:
        DamageError: as `read_sample`.
    """
    activity, kept, uncut = activity or Activity(), decoded or DecodedClips(0), set(uncut)
    arrays: dict[str, np.ndarray] = {}
    signals: dict[str, list[UncutSignal]] = {}
    for modality in wanted:
        decoder, description = MODALITIES[modality].decoder, metadata.description(modality)
        settings, length_s = inputs.section(modality), metadata.length_s
        everything, data = kept.get(clip, modality), b""
        if everything is None:
            with activity.reading(clip, modality):
                data = folder.read(clip, modality)
        try:
            with activity.decoding(clip, modality):
                if everything is None and (decoder.always_whole or modality in uncut or kept.takes_more):
                    everything = decoder.decode(data, description, settings)
                    kept.keep(clip, modality, everything)
                if everything is None:
                    arrays[modality] = decoder.decode_views(data, description, settings, views, length_s)
                else:
                    arrays[modality] = decoder.cut(everything, description, settings, views, length_s)
        except DecodeError as error:
            raise DamageError(
                clip.shard, clip.key, member_name(clip.key, modality), f"does not decode: {error}"
            ) from None
        if modality in uncut:
            assert everything is not None
            signals[modality] = [UncutSignal(everything, description, view, length_s) for view in views]
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
