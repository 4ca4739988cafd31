"""One clip of a shards folder -> one decoded `Sample`, or `DamageError`. Never a sample with fewer modalities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import av
import numpy as np

from karmma_dist.recipe import InputRecipe
from karmma_dist.shards import Clip, DamageError, ShardFolder, member_name
from karmma_dist.streaming.augment import View
from karmma_dist.streaming.batch import Sample
from karmma_dist.streaming.decode import (
    ClipSound,
    decode_audio,
    decode_detections,
    decode_flow,
    decode_sound,
    decode_video,
)
from karmma_dist.streaming.watch import Activity


def num_stored_frames(metadata: dict[str, Any]) -> int:
    """Frames stored for a clip: the video's, else the flow's, else 0."""
    for modality in ("video", "flow"):
        if metadata["modalities"].get(modality):
            return int(metadata["modalities"][modality]["num_frames"])
    return 0


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
    activity = activity or Activity()
    arrays: dict[str, np.ndarray] = {}
    sound = None
    for modality in wanted:
        with activity.reading(clip, modality):
            data = folder.read(clip, modality)
        try:
            with activity.decoding(clip, modality):
                if modality == "audio" and keeps_sound:
                    samples = decode_sound(data, metadata["modalities"][modality])
                    sound = ClipSound(samples, view.times_F * length_s(metadata))
                    arrays[modality] = sound.windows(inputs.audio)
                else:
                    arrays[modality] = _decode(modality, data, metadata, inputs, view)
        except (ValueError, KeyError, IndexError, ArithmeticError, av.error.FFmpegError) as error:
            what = f"does not decode: {error}"
            raise DamageError(clip.shard, clip.key, member_name(clip.key, modality), what) from None
    return Sample(clip.key, clip.labels, arrays, view.jitter_3, sound)


def _decode(modality: str, data: bytes, metadata: dict[str, Any], inputs: InputRecipe, view: View) -> np.ndarray:
    if modality == "detections":
        return decode_detections(data, inputs.detections, view)
    described = metadata["modalities"][modality]
    moments_s = view.times_F * length_s(metadata)
    if modality == "audio":
        return decode_audio(data, described, moments_s, inputs.audio)
    decode = decode_video if modality == "video" else decode_flow
    return decode(data, described, moments_s, inputs.video, view)
