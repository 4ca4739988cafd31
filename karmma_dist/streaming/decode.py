"""Bytes of one member -> uint8/int16/float32 arrays: the wanted moments, resized and cropped, by PyAV on one thread.

Every function raises `ValueError` (or PyAV's own error) on bytes it cannot decode; `reader.py` turns that into damage.
`moments_s` are the view's moments in seconds from the clip's start, `described` is the member's entry in `KEY.json`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from karmma_dist.recipe import AudioInput, DetectionsInput, VideoInput
from karmma_dist.streaming.augment import View
from karmma_dist.streaming.frames import chosen_frames

SAMPLE_RATE = 16_000
"""Of every stored audio member, Hz."""

_ON_THE_EDGE = 1e-4
"""A moment this little before a frame, in frames, means that frame: metadata round rates to a millionth."""

_REFORMATTERS = {"rgb24": VideoReformatter(), "gray": VideoReformatter()}
"""Shared by all clips of a process, since one per frame leaks; a process decodes on one thread."""


@dataclass(frozen=True)
class ClipSound:
    """The whole sound of a clip, and where its windows are looked for."""

    samples: np.ndarray
    """int16, 16 kHz."""
    moments_s: np.ndarray
    """The view's moments."""

    def windows(self, audio: AudioInput) -> np.ndarray:
        """int16 (windows, samples): see `decode_audio`."""
        return _windows(self.samples, self.moments_s, audio)


def decode_video(
    data: bytes, described: dict[str, Any], moments_s: np.ndarray, video: VideoInput, view: View
) -> np.ndarray:
    """Decode, resize and crop the frames shown at `moments_s`. Returns uint8 (F, crop, crop, 3), RGB."""
    return decode_video_views(data, described, moments_s[None], video, [view])[0]


def decode_video_views(
    data: bytes, described: dict[str, Any], moments_s_VF: np.ndarray, video: VideoInput, views: Sequence[View]
) -> np.ndarray:
    """The same for several views, each frame decoded and resized once. Returns uint8 (V, F, crop, crop, 3), RGB."""
    pictures = np.empty((*moments_s_VF.shape, video.crop, video.crop, 3), np.uint8)
    for shown_VF, frame in _shown_frames(data, described, moments_s_VF):
        picture = _reformat(frame, _resized(frame.width, frame.height, video.short_side), "rgb24")
        _cut_views(picture, video.crop, views, shown_VF, pictures)
    return pictures


def decode_flow(
    data: bytes, described: dict[str, Any], moments_s: np.ndarray, video: VideoInput, view: View
) -> np.ndarray:
    """Decode flow stored as one gray video, u above v. Returns uint8 (F, crop, crop, 2); 127.5 is no motion."""
    return decode_flow_views(data, described, moments_s[None], video, [view])[0]


def decode_flow_views(
    data: bytes, described: dict[str, Any], moments_s_VF: np.ndarray, video: VideoInput, views: Sequence[View]
) -> np.ndarray:
    """The same for several views, each frame decoded and resized once. Returns uint8 (V, F, crop, crop, 2)."""
    flow = np.empty((*moments_s_VF.shape, video.crop, video.crop, 2), np.uint8)
    for shown_VF, frame in _shown_frames(data, described, moments_s_VF):
        stacked = _reformat(frame, (frame.width, frame.height), "gray")
        half = frame.height // 2
        size = _resized(frame.width, half, video.short_side)
        # Side by side as channels, not above each other: resizing must not mix the rows between them.
        both = _resize_flow(np.dstack((stacked[:half], stacked[half:])), size)
        _cut_views(both, video.crop, views, shown_VF, flow)
    for flow_F, view in zip(flow, views, strict=True):
        if view.flip:
            np.subtract(255, flow_F[..., 0], out=flow_F[..., 0])
    return flow


def decode_audio(data: bytes, described: dict[str, Any], moments_s: np.ndarray, audio: AudioInput) -> np.ndarray:
    """Cut windows out of a mono 16-kHz FLAC. Returns int16 (windows, samples), silence beyond the clip's ends.

    With as many windows as moments each is centred on its moment [paper]; otherwise they are spread evenly.
    """
    return ClipSound(decode_sound(data, described), moments_s).windows(audio)


def decode_sound(data: bytes, described: dict[str, Any]) -> np.ndarray:
    """All samples of a mono 16-kHz FLAC, int16."""
    samples = _all_samples(data)
    if len(samples) != described["num_samples"]:
        raise ValueError(f"{len(samples)} samples in it, declared {described['num_samples']}")
    return samples


def _windows(samples: np.ndarray, moments_s: np.ndarray, audio: AudioInput) -> np.ndarray:
    num, size = audio.num_windows, audio.window_samples
    centres = moments_s * SAMPLE_RATE if num == len(moments_s) else (np.arange(num) + 0.5) / num * len(samples)
    starts = np.round(centres).astype(np.int64) - size // 2
    windows = np.zeros((num, size), np.int16)
    for window, start in zip(windows, starts.tolist(), strict=True):
        there = samples[max(start, 0) : max(start + size, 0)]
        offset = max(-start, 0)
        window[offset : offset + len(there)] = there
    return windows


def decode_detections(data: bytes, detections: DetectionsInput, view: View) -> np.ndarray:
    """Boxes at the view's moments. Returns float32 (F, boxes, 6): x0 y0 x1 y1 in [0, 1], category (0 = none), score.

    Boxes carry no rate: moments are fractions of the frames that have an entry.
    """
    frames = json.loads(data)["frames"]
    times = view.times_F
    if len(times) != detections.num_frames:
        times = (np.arange(detections.num_frames) + 0.5) / detections.num_frames
    boxes = np.zeros((detections.num_frames, detections.max_boxes, 6), dtype=np.float32)
    for place, number in enumerate(_floor(times * len(frames), len(frames))):
        best = sorted(frames[number], key=lambda box: -box[5])[: detections.max_boxes]
        if best:
            boxes[place, : len(best)] = best
    if view.flip:
        there = boxes[..., 4] > 0
        boxes[there, 0], boxes[there, 2] = 1 - boxes[there, 2], 1 - boxes[there, 0]
    return boxes


def frame_numbers(moments_s: np.ndarray, described: dict[str, Any]) -> np.ndarray:
    """Numbers of the stored frames shown at `moments_s`: frame k from k / fps on, the last one for ever. int64 (F,)."""
    return _floor(moments_s * described["fps"], described["num_frames"])


def _shown_frames(
    data: bytes, described: dict[str, Any], moments_s: np.ndarray
) -> Iterator[tuple[np.ndarray, av.VideoFrame]]:
    """Yield each frame shown at any of the moments, once, with where (bool, of their shape): at which of them."""
    numbers = frame_numbers(moments_s, described)
    chosen = np.unique(numbers)
    for number, frame in zip(chosen, chosen_frames(data, chosen, described["num_frames"]), strict=True):
        yield numbers == number, frame


def _floor(places: np.ndarray, num: int) -> np.ndarray:
    return np.clip(np.floor(places + _ON_THE_EDGE), 0, num - 1).astype(np.int64)


def _all_samples(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None or context.format is None:
            raise ValueError("nothing says how it is encoded")
        stored = (context.format.name, context.layout.nb_channels, context.sample_rate)
        if stored != ("s16", 1, SAMPLE_RATE):
            raise ValueError(f"{stored[1]} channels of {stored[0]} at {stored[2]} Hz, not mono s16 at {SAMPLE_RATE} Hz")
        context.options = {"err_detect": "crccheck+explode"}
        chunks = [frame.to_ndarray()[0] for frame in container.decode(stream)]
    if not chunks:
        raise ValueError("no sound in it")
    return np.concatenate(chunks)


def _resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of a picture once its short side is `short_side`."""
    scale = short_side / min(width, height)
    return round(width * scale), round(height * scale)


def _reformat(frame: av.VideoFrame, size: tuple[int, int], pixels: str) -> np.ndarray:
    reformatted = _REFORMATTERS[pixels].reformat(frame, *size, format=pixels, interpolation="BILINEAR", threads=1)
    picture: np.ndarray = reformatted.to_ndarray()
    return picture


def _resize_flow(flow: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 2) to `size` (width, height): averaged where it shrinks."""
    if flow.shape[1::-1] == size:
        return flow
    shrinks = size[0] < flow.shape[1]
    return cv2.resize(flow, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _cut_views(
    picture: np.ndarray, size: int, views: Sequence[View], shown_VF: np.ndarray, into: np.ndarray
) -> None:
    """Write a frame's crops where the views show it. `into` is (V, F, size, size, channels)."""
    for view, shown_F, into_F in zip(views, shown_VF, into, strict=True):
        if shown_F.any():
            into_F[shown_F] = _cut(picture, size, view)


def _cut(picture: np.ndarray, size: int, view: View) -> np.ndarray:
    """(H, W) or (H, W, 3) -> the view's square crop of `size` pixels a side, mirrored if it says so."""
    height, width = picture.shape[:2]
    top, left = int(view.top * (height - size + 1)), int(view.left * (width - size + 1))
    crop = picture[top : top + size, left : left + size]
    return cv2.flip(crop, 1) if view.flip else crop
