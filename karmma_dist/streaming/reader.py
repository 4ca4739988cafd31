"""One clip of a shards folder -> one decoded `Sample`, or `DamageError`. Never a sample with fewer modalities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import av
import numpy as np

from karmma_dist.recipe import InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, DamageError, member_name
from karmma_dist.streaming.batch import Sample
from karmma_dist.streaming.decode import (
    ClipSound,
    cut_flow_views,
    cut_video_views,
    decode_all_boxes,
    decode_every_frame,
    decode_flow_views,
    decode_sound,
    decode_video_views,
    sample_boxes,
)
from karmma_dist.streaming.decoded import DecodedClips
from karmma_dist.streaming.views import View
from karmma_dist.streaming.worker_status import Activity


def num_stored_frames(metadata: dict[str, Any]) -> int:
    """Frames stored for a clip: the video's, else the flow's, else 0."""
    for modality in ("video", "flow"):
        if metadata["modalities"].get(modality):
            return int(metadata["modalities"][modality]["num_frames"])
    return 0


def is_wide(metadata: dict[str, Any]) -> bool:
    """Whether the clip's picture is at least as wide as high: the video's, else the flow's."""
    for modality in ("video", "flow"):
        if described := metadata["modalities"].get(modality):
            return bool(described["width"] >= described["height"])
    return True


def length_s(metadata: dict[str, Any]) -> float:
    """Seconds that a view's moments are fractions of: the video's length, else the flow's, else the sound's, else 0.

    One length for all modalities: they may be stored at different rates, and one may end before another.
    """
    for modality in ("video", "flow"):
        if described := metadata["modalities"].get(modality):
            return float(described["num_frames"] / described["fps"])
    if described := metadata["modalities"].get("audio"):
        return float(described["num_samples"] / described["sample_rate"])
    return 0.0


def read_sample(
    folder: ShardFolder, clip: Clip, metadata: dict[str, Any], wanted: Iterable[str], inputs: InputRecipe, view: View,
    activity: Activity | None = None, *, keeps_sound: bool = False,
) -> Sample:
    """Read, check and decode the `wanted` modalities of a clip (all of which it must declare).

    What is being done, and for how long, is said to `activity`. `keeps_sound` adds the whole sound to the sample.

    Raises:
        DamageError: a member is unreadable, not the bytes that were written, or does not decode.
    """
    return read_samples(folder, clip, metadata, wanted, inputs, [view], activity, keeps_sound=keeps_sound)[0]


def read_samples(
    folder: ShardFolder, clip: Clip, metadata: dict[str, Any], wanted: Iterable[str], inputs: InputRecipe,
    views: Sequence[View], activity: Activity | None = None, *, keeps_sound: bool = False,
    decoded: DecodedClips | None = None,
) -> list[Sample]:
    """The same for several views, one sample each; every member is read and decoded once.

    What `decoded` holds is neither read nor decoded again, and what is decoded is offered to it: same samples.

    Raises:
        DamageError: as `read_sample`.
    """
    activity = activity or Activity()
    kept = decoded or DecodedClips(0)
    arrays: dict[str, np.ndarray] = {}
    sounds: list[ClipSound] = []
    for modality in wanted:
        whole, data = kept.get(clip, modality), b""
        if whole is None:
            with activity.reading(clip, modality):
                data = folder.read(clip, modality)
        try:
            with activity.decoding(clip, modality):
                if whole is None and (modality == "audio" or kept.takes_more):
                    whole = _decode_whole(modality, data, metadata, inputs)
                    kept.keep(clip, modality, whole)
                if modality == "audio":
                    assert whole is not None
                    sounds = _sounds(whole, metadata, views)
                    arrays[modality] = np.stack([sound.windows(inputs.audio) for sound in sounds])
                else:
                    arrays[modality] = _look(modality, data, whole, metadata, inputs, views)
        except (ValueError, KeyError, IndexError, ArithmeticError, av.error.FFmpegError) as error:
            what = f"does not decode: {error}"
            raise DamageError(clip.shard, clip.key, member_name(clip.key, modality), what) from None
    return [
        Sample(
            clip.key,
            clip.labels,
            {name: of_views[number] for name, of_views in arrays.items()},
            view.jitter_3,
            sounds[number] if keeps_sound and sounds else None,
        )
        for number, view in enumerate(views)
    ]


def _sounds(samples: np.ndarray, metadata: dict[str, Any], views: Sequence[View]) -> list[ClipSound]:
    """One per view, all of the same samples."""
    seconds = length_s(metadata)
    return [ClipSound(samples, view.times_F * seconds) for view in views]


def _decode_whole(modality: str, data: bytes, metadata: dict[str, Any], inputs: InputRecipe) -> np.ndarray:
    """Everything that a view may ask for."""
    described = metadata["modalities"][modality]
    if modality == "audio":
        return decode_sound(data, described)
    if modality == "detections":
        return decode_all_boxes(data, inputs.detections)
    return decode_every_frame(modality, data, described, inputs.video)


def _look(
    modality: str, data: bytes, whole: np.ndarray | None, metadata: dict[str, Any], inputs: InputRecipe,
    views: Sequence[View],
) -> np.ndarray:  # fmt: skip
    """Pictures or boxes, one array per view, stacked: cut from what was kept, or decoded for these views alone."""
    if modality == "detections":
        boxes = decode_all_boxes(data, inputs.detections) if whole is None else whole
        return np.stack([sample_boxes(boxes, inputs.detections, view) for view in views])
    described = metadata["modalities"][modality]
    moments_s_VF = np.stack([view.times_F for view in views]) * length_s(metadata)
    if whole is not None:
        cut = cut_video_views if modality == "video" else cut_flow_views
        return cut(whole, described, moments_s_VF, inputs.video, views)
    decode = decode_video_views if modality == "video" else decode_flow_views
    return decode(data, described, moments_s_VF, inputs.video, views)
