"""Bytes of one member -> uint8/int16/float32 arrays: the wanted moments, resized and cropped, by PyAV on one thread.

Every function raises `ValueError` (or PyAV's own error) on bytes it cannot decode; `reader.py` turns that into damage.
`moments_s` are the view's moments in seconds from the clip's start, `described` is the member's entry in `KEY.json`.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from karmma_dist.recipe import AudioInput, DetectionsInput, VideoInput
from karmma_dist.streaming.frames import chosen_frames
from karmma_dist.streaming.views import View

SAMPLE_RATE = 16_000
"""Of every stored audio member, Hz."""

_ON_THE_EDGE = 1e-4
"""A moment this little before a frame, in frames, means that frame: metadata round rates to a millionth."""

_reformatters = threading.local()
"""One reformatter per thread and pixel format: one per frame leaks, and one for two threads crashes."""


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
        _cut_views(_rgb(frame, video.short_side), video.crop, views, shown_VF, pictures)
    return pictures


def decode_every_frame(modality: str, data: bytes, described: dict[str, Any], video: VideoInput) -> np.ndarray:
    """Decode and resize every frame of a video or a flow, for `cut_video_views` or `cut_flow_views`.

    Returns:
        uint8 (frames, height, width, C): RGB of a video, displacements of a flow.
    """
    resize = _rgb if modality == "video" else _displacements
    every = np.arange(described["num_frames"])
    return np.stack([resize(frame, video.short_side) for frame in chosen_frames(data, every, len(every))])


def cut_video_views(
    whole: np.ndarray, described: dict[str, Any], moments_s_VF: np.ndarray, video: VideoInput, views: Sequence[View]
) -> np.ndarray:
    """Return what `decode_video_views` would, bit for bit, from what `decode_every_frame` made."""
    numbers_VF = frame_numbers(moments_s_VF, described)
    return np.stack([_cut(whole[numbers], video.crop, view) for numbers, view in zip(numbers_VF, views, strict=True)])


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
        _cut_views(_displacements(frame, video.short_side), video.crop, views, shown_VF, flow)
    return _turn_mirrored(flow, views)


def cut_flow_views(
    whole: np.ndarray, described: dict[str, Any], moments_s_VF: np.ndarray, video: VideoInput, views: Sequence[View]
) -> np.ndarray:
    """Return what `decode_flow_views` would, bit for bit, from what `decode_every_frame` made."""
    return _turn_mirrored(cut_video_views(whole, described, moments_s_VF, video, views), views)


def _turn_mirrored(flow: np.ndarray, views: Sequence[View]) -> np.ndarray:
    """Turn the horizontal motion of mirrored views (V, F, H, W, 2), in place."""
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
    return sample_boxes(decode_all_boxes(data, detections), detections, view)


def decode_all_boxes(data: bytes, detections: DetectionsInput) -> np.ndarray:
    """Read the best boxes of every frame. Returns float32 (frames, boxes, 6), for `sample_boxes`."""
    frames = json.loads(data)["frames"]
    boxes = np.zeros((len(frames), detections.max_boxes, 6), dtype=np.float32)
    for number, found in enumerate(frames):
        best = sorted(found, key=lambda box: -box[5])[: detections.max_boxes]
        if best:
            boxes[number, : len(best)] = best
    return boxes


def sample_boxes(frames: np.ndarray, detections: DetectionsInput, view: View) -> np.ndarray:
    """Return the boxes of `decode_all_boxes` at a view's moments, float32 (F, boxes, 6)."""
    times = view.times_F
    if len(times) != detections.num_frames:
        times = (np.arange(detections.num_frames) + 0.5) / detections.num_frames
    boxes: np.ndarray = frames[_floor(times * len(frames), len(frames))]
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
    mine: dict[str, VideoReformatter] = _reformatters.__dict__  # this thread's
    if pixels not in mine:
        mine[pixels] = VideoReformatter()
    reformatted = mine[pixels].reformat(frame, *size, format=pixels, interpolation="BILINEAR", threads=1)
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


def _rgb(frame: av.VideoFrame, short_side: int) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return _reformat(frame, _resized(frame.width, frame.height, short_side), "rgb24")


def _displacements(frame: av.VideoFrame, short_side: int) -> np.ndarray:
    """uint8 (H, W, 2): a frame of stored flow, u above v, side by side as channels: resizing must not mix its rows."""
    stacked = _reformat(frame, (frame.width, frame.height), "gray")
    half = frame.height // 2
    size = _resized(frame.width, half, short_side)
    return _resize_flow(np.dstack((stacked[:half], stacked[half:])), size)


def _cut(pictures: np.ndarray, size: int, view: View) -> np.ndarray:
    """(..., H, W, channels) -> the view's square crop of `size` pixels a side, mirrored if it says so."""
    height, width = pictures.shape[-3:-1]
    top, left = int(view.top * (height - size + 1)), int(view.left * (width - size + 1))
    crop = pictures[..., top : top + size, left : left + size, :]
    return crop[..., ::-1, :] if view.flip else crop
