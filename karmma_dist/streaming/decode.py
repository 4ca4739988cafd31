"""Bytes of one member -> uint8/int16/float32 arrays, only the frames wanted, by PyAV on one thread.

Every function raises `ValueError` (or PyAV's own error) on bytes it cannot decode; `reader.py` turns that into damage.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from karmma_dist.recipe import AudioInput, DetectionsInput, VideoInput
from karmma_dist.streaming.augment import View

SAMPLE_RATE = 16_000
"""Of every stored audio member, Hz."""


def decode_video(data: bytes, num_frames: int, video: VideoInput, view: View) -> np.ndarray:
    """Decode, resize and crop the frames of `view`. Returns uint8 (F, crop, crop, 3), RGB."""
    frames = _decode(data, _frame_numbers(view, num_frames), "rgb24", video.short_side, stacked=1)
    return _flip(_crop(frames, video.crop, view), view)


def decode_flow(data: bytes, num_frames: int, video: VideoInput, view: View) -> np.ndarray:
    """Decode flow stored as one gray video, u above v. Returns uint8 (F, crop, crop, 2); 127.5 is no motion."""
    frames = _decode(data, _frame_numbers(view, num_frames), "gray", video.short_side, stacked=2)
    half = frames.shape[1] // 2
    flow = _flip(_crop(np.stack([frames[:, :half], frames[:, half:]], axis=-1), video.crop, view), view)
    if view.flip:
        flow[..., 0] = 255 - flow[..., 0]
    return flow


def decode_audio(data: bytes, audio: AudioInput, view: View) -> np.ndarray:
    """Cut the windows out of a mono 16-kHz FLAC. Returns int16 (windows, samples), silence beyond the clip's ends.

    With as many windows as frames each is centred on its frame [paper]; otherwise they are spread evenly.
    """
    with av.open(io.BytesIO(data), "r") as container:
        chunks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    if not chunks:
        raise ValueError("no sound in it")
    samples = np.concatenate(chunks)
    if samples.dtype != np.int16:
        raise ValueError(f"samples are {samples.dtype}, not int16")
    num = audio.num_windows
    times = view.times_F if num == len(view.times_F) else (np.arange(num) + 0.5) / num
    size = audio.window_samples
    padded = np.pad(samples, (size, size))
    starts = np.round(times * len(samples)).astype(np.int64) - size // 2 + size
    windows: np.ndarray = np.lib.stride_tricks.sliding_window_view(padded, size)[starts].copy()
    return windows


def decode_detections(data: bytes, detections: DetectionsInput, view: View) -> np.ndarray:
    """Boxes at the view's moments. Returns float32 (F, boxes, 6): x0 y0 x1 y1 in [0, 1], category (0 = none), score."""
    frames = json.loads(data)["frames"]
    times = view.times_F
    if len(times) != detections.num_frames:
        times = (np.arange(detections.num_frames) + 0.5) / detections.num_frames
    boxes = np.zeros((detections.num_frames, detections.max_boxes, 6), dtype=np.float32)
    for place, number in enumerate(np.minimum((times * len(frames)).astype(int), len(frames) - 1)):
        best = sorted(frames[number], key=lambda box: -box[5])[: detections.max_boxes]
        if best:
            boxes[place, : len(best)] = best
    if view.flip:
        there = boxes[..., 4] > 0
        boxes[there, 0], boxes[there, 2] = 1 - boxes[there, 2], 1 - boxes[there, 0]
    return boxes


def _frame_numbers(view: View, num_frames: int) -> np.ndarray:
    return np.minimum((view.times_F * num_frames).astype(np.int64), num_frames - 1)


def _decode(data: bytes, numbers: np.ndarray, pixels: str, short_side: int, stacked: int) -> np.ndarray:
    """The frames `numbers` (ascending, repeats allowed) as uint8, resized to `short_side`.

    `stacked` pictures lie above each other in one frame; the short side is that of one picture.
    """
    wanted = np.unique(numbers)
    pictures = list(_wanted_frames(data, wanted, pixels, short_side, stacked))
    if len(pictures) != len(wanted):
        raise ValueError(f"frame {wanted[len(pictures)]} is not in it")
    return np.stack(pictures)[np.searchsorted(wanted, numbers)]


def _wanted_frames(
    data: bytes, wanted: np.ndarray, pixels: str, short_side: int, stacked: int
) -> Iterator[np.ndarray]:
    reformatter = VideoReformatter()
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        place = 0
        for number, frame in enumerate(container.decode(stream)):
            if number != wanted[place]:
                continue
            height = frame.height // stacked
            scale = short_side / min(height, frame.width)
            size = (round(frame.width * scale), stacked * round(height * scale))
            picture = reformatter.reformat(frame, *size, format=pixels, interpolation="BILINEAR", threads=1)
            yield picture.to_ndarray()
            place += 1
            if place == len(wanted):
                return


def _crop(frames: np.ndarray, size: int, view: View) -> np.ndarray:
    """(F, H, W, C) -> (F, size, size, C) at the view's place."""
    height, width = frames.shape[1:3]
    top, left = round(view.top * (height - size)), round(view.left * (width - size))
    return frames[:, top : top + size, left : left + size]


def _flip(frames: np.ndarray, view: View) -> np.ndarray:
    return np.ascontiguousarray(frames[:, :, ::-1] if view.flip else frames)
