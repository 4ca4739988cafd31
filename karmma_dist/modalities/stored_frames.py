"""The decoder of stored video: it decodes only the groups of pictures that hold a chosen frame.

The frames are bit for bit those of a full pass. Packing stores H.264 without reordered frames, in closed groups:
decoding of a group starts at its IDR picture and ends at its last chosen frame. Other video is decoded from its first
frame.
"""

from __future__ import annotations

import io
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from karmma_dist.modalities.contract import ArrayType, DecodeError, Decoder, Pictures, StoredError, View
from karmma_dist.modalities.video import VideoInput

_STRICT = {"err_detect": "explode+aggressive"}
"""Decoder options: by default FFmpeg's decoders silently conceal errors. `aggressive` also reports bytes left over in
a packet whose pictures are complete, often the only sign of overwritten bytes."""

_ON_THE_EDGE = 1e-4
"""Distance in frames up to which a moment before a frame counts as that frame: metadata round rates to a millionth."""

_reformatters = threading.local()
"""One reformatter per thread and pixel format: one per frame leaks memory, and one shared by two threads crashes."""

_IDR, _PARAMETER_SETS = 5, {7, 8}
"""Types of NAL units (ITU-T H.264, table 7-1)."""


@contextmanager
def open_video(data: bytes) -> Iterator[tuple[Any, Any, Any]]:
    """Open a video file in memory and yield container, first video stream and decoder, strict and on one thread.

    Raises:
        DecodeError: the file has no video.
    """
    with av.open(io.BytesIO(data), "r") as container:
        if not container.streams.video:
            raise DecodeError("no video in it")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise DecodeError("its codec is unknown")
        context.thread_count = 1
        context.options = _STRICT
        yield container, stream, context


def chosen_frames(data: bytes, chosen: np.ndarray, num_frames: int) -> Iterator[av.VideoFrame]:
    """Yield the frames numbered `chosen` (ascending, each once) of a video that is declared to have `num_frames`.

    Raises:
        DecodeError: the video has another number of frames, is cut, or lacks a frame needed to decode a chosen one.
        av.error.FFmpegError: a packet needed to decode a chosen frame does not decode, or the file cannot be read.
    """
    with open_video(data) as (container, stream, context):
        packets = [packet for packet in container.demux(stream) if packet.size]
        num_shown = sum(not packet.is_discard for packet in packets)
        if num_shown != num_frames:
            raise DecodeError(f"{num_shown} frames in it, declared {num_frames}")
        if any(packet.is_corrupt for packet in packets):
            raise DecodeError("a packet of it is cut")
        starts = group_starts(context, packets)
        needed = range(len(packets)) if starts is None else _needed(starts, chosen)
        place = 0
        for count, frame in enumerate(_decoded(context, [packets[number] for number in needed])):
            # Without entry points the decoder may reorder and omit frames: the frame's number is the decoder's count.
            number = count if starts is None else needed[count]
            if frame.is_corrupt:
                raise DecodeError(f"frame {number} is corrupt")
            if starts is not None and frame.pts != packets[number].pts:
                raise DecodeError(f"frame {number} is missing")
            if number == chosen[place]:
                yield frame
                place += 1
                if place == len(chosen):
                    return
        raise DecodeError(f"frame {chosen[place]} is missing")


def group_starts(context: Any, packets: list[Any]) -> list[int] | None:
    """Return the numbers of the packets at which decoding may start; None if it may only start at the first packet.

    Decoding may start at an IDR picture, since no later picture refers to one before it, if the video is H.264 in MP4's
    form and all frames are shown in the order of their packets. Parameter sets must come with IDR pictures only: others
    would be lost with a group that is skipped.
    """
    extradata = context.extradata
    if context.name != "h264" or extradata is None or len(extradata) < 5 or extradata[0] != 1:
        return None
    length_bytes = (extradata[4] & 3) + 1
    starts, last = [], None
    for number, packet in enumerate(packets):
        in_order = packet.pts is not None and packet.pts == packet.dts and (last is None or packet.pts > last)
        if not in_order or packet.is_discard:
            return None
        last = packet.pts
        types = set(_nal_types(memoryview(packet), length_bytes))
        if _IDR in types:
            starts.append(number)
        elif number == 0 or types & _PARAMETER_SETS:
            return None
    return starts


def _needed(starts: list[int], chosen: np.ndarray) -> list[int]:
    """Return the numbers of the packets to decode: from the start of every needed group to its last chosen frame."""
    needed: list[int] = []
    bounds = np.searchsorted(chosen, [*starts[1:], np.iinfo(np.int64).max])
    first = 0
    for start, bound in zip(starts, bounds.tolist(), strict=True):
        if bound > first:
            needed += range(start, int(chosen[bound - 1]) + 1)
        first = bound
    return needed


def _nal_types(payload: memoryview, length_bytes: int) -> Iterator[int]:
    """Yield the types of a packet's NAL units, each preceded by its length (ISO/IEC 14496-15)."""
    place = length_bytes
    while place < len(payload):
        yield payload[place] & 31
        place += int.from_bytes(payload[place - length_bytes : place], "big") + length_bytes


def _decoded(context: Any, packets: list[Any]) -> Iterator[av.VideoFrame]:
    for packet in [*packets, None]:
        yield from context.decode(packet)


@contextmanager
def decoding_video() -> Iterator[None]:
    """Turn FFmpeg's errors into `DecodeError`."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise DecodeError(str(error)) from None


def frame_numbers(moments_s: np.ndarray, pictures: Pictures) -> np.ndarray:
    """Return the numbers (int64) of the frames shown at `moments_s`: frame k from k / fps on, then the last frame."""
    return floor_places(moments_s * pictures.fps, pictures.num_frames)


def floor_places(places: np.ndarray, num: int) -> np.ndarray:
    """Round places in a row of `num` down to whole ones, int64 in [0, num)."""
    return np.clip(np.floor(places + _ON_THE_EDGE), 0, num - 1).astype(np.int64)


class FramesDecoder(Decoder):
    """A decoder of video members: the frames at the views' moments, resized and cropped, on one thread.

    Args:
        channels: Values per pixel of an array.
        pixel: Meaning of those values.
        heights: Number of pictures stacked vertically in a stored frame.
    """

    def __init__(self, channels: int, pixel: str, heights: int = 1) -> None:
        self.channels, self.pixel, self.heights = channels, pixel, heights

    @abstractmethod
    def resized(self, frame: av.VideoFrame, short_side: int) -> np.ndarray:
        """Return a frame resized to a short side of `short_side` pixels, uint8 (H, W, channels)."""

    def oriented(self, arrays: np.ndarray, views: Sequence[View]) -> np.ndarray:
        """Adapt the values of crops (V, F, H, W, channels) to their views' orientation, possibly in place."""
        return arrays

    def decode(self, data: bytes, description: Any, settings: VideoInput) -> np.ndarray:
        """Decode and resize every frame: uint8 (frames, height, width, channels)."""
        num_frames = description.pictures.num_frames
        with decoding_video():
            frames = chosen_frames(data, np.arange(num_frames), num_frames)
            return np.stack([self.resized(frame, settings.short_side) for frame in frames])

    def cut(
        self, decoded: np.ndarray, description: Any, settings: VideoInput, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Cut the views: uint8 (V, F, crop, crop, channels)."""
        numbers_VF = frame_numbers(_moments_s(views, length_s), description.pictures)
        crops = [_crop(decoded[numbers], settings.crop, view) for numbers, view in zip(numbers_VF, views, strict=True)]
        return self.oriented(np.stack(crops), views)

    def decode_views(
        self, data: bytes, description: Any, settings: VideoInput, views: Sequence[View], length_s: float
    ) -> np.ndarray:
        """Decode only the frames that the views show, each once: uint8 (V, F, crop, crop, channels)."""
        numbers_VF = frame_numbers(_moments_s(views, length_s), description.pictures)
        crops = np.empty((*numbers_VF.shape, settings.crop, settings.crop, self.channels), np.uint8)
        chosen = np.unique(numbers_VF)
        with decoding_video():
            frames = chosen_frames(data, chosen, description.pictures.num_frames)
            for number, frame in zip(chosen, frames, strict=True):
                picture = self.resized(frame, settings.short_side)
                for view, shown_F, crops_F in zip(views, numbers_VF == number, crops, strict=True):
                    if shown_F.any():
                        crops_F[shown_F] = _crop(picture, settings.crop, view)
        return self.oriented(crops, views)

    def array(self, settings: VideoInput) -> ArrayType:
        """Return the type of F crops."""
        shape = (settings.num_frames, settings.crop, settings.crop, self.channels)
        return ArrayType(shape, "uint8", f"frames, rows, columns, {self.pixel}")

    def check(self, data: bytes, description: Any) -> None:
        """Decode the first frame and the last group of pictures; count the rest without decoding."""
        pictures = description.pictures
        with decoding_video(), open_video(data) as (container, stream, context):
            packets = [packet for packet in container.demux(stream) if packet.size]
            if len(packets) != pictures.num_frames:
                raise StoredError("length", f"{len(packets)} frames, declared {pictures.num_frames}")
            last_key = max((number for number, packet in enumerate(packets) if packet.is_keyframe), default=0)
            for part in (packets[:1], packets[last_key:]):
                frames = [frame for packet in [*part, None] for frame in context.decode(packet)]
                context.flush_buffers()
                if len(frames) != len(part) or any(frame.is_corrupt for frame in frames):
                    raise StoredError("decode", f"{len(frames)} of {len(part)} frames decode")
                size = (frames[-1].width, frames[-1].height)
                if size != (pictures.width, self.heights * pictures.height):
                    raise StoredError("decode", f"frames of {size[0]}x{size[1]} pixels, not the declared size")


def reformat(frame: av.VideoFrame, size: tuple[int, int], pixels: str) -> np.ndarray:
    """Return a frame's pixels in an FFmpeg format (`rgb24`, `gray`), scaled to (width, height): uint8."""
    reformatters: dict[str, VideoReformatter] = _reformatters.__dict__  # this thread's
    if pixels not in reformatters:
        reformatters[pixels] = VideoReformatter()
    reformatted = reformatters[pixels].reformat(frame, *size, format=pixels, interpolation="BILINEAR", threads=1)
    picture: np.ndarray = reformatted.to_ndarray()
    return picture


def resized_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Return width and height of a picture resized to a short side of `short_side` pixels."""
    scale = short_side / min(width, height)
    return round(width * scale), round(height * scale)


def _moments_s(views: Sequence[View], length_s: float) -> np.ndarray:
    return np.stack([view.times_F for view in views]) * length_s


def _crop(pictures: np.ndarray, size: int, view: View) -> np.ndarray:
    """Cut the view's square crop of `size` pixels a side from (..., H, W, channels), mirrored if the view says so."""
    height, width = pictures.shape[-3:-1]
    top, left = int(view.top * (height - size + 1)), int(view.left * (width - size + 1))
    crop = pictures[..., top : top + size, left : left + size, :]
    return crop[..., ::-1, :] if view.flip else crop
