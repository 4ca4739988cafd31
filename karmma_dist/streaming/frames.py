"""A movie in memory -> chosen frames, decoding only the groups of pictures that hold one, bit for bit as a whole pass.

What is stored by packing is H.264 whose frames come in the order in which they are coded, in closed groups: a group is
entered at its IDR picture and left at its last chosen frame. Anything else is decoded from its first frame on.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

_STRICT = {"err_detect": "explode+aggressive"}
"""Without it FFmpeg's decoders paint over what they cannot read, and say nothing; `aggressive` also minds what is left
over in a packet whose pictures are complete, often the only sign of overwritten bytes."""

_IDR, _PARAMETER_SETS = 5, {7, 8}
"""Types of NAL units (ITU-T H.264, table 7-1)."""


def chosen_frames(data: bytes, chosen: np.ndarray, num_frames: int) -> Iterator[av.VideoFrame]:
    """Yield the frames numbered `chosen` (ascending, each once) of a movie that is declared to have `num_frames`.

    Raises:
        ValueError: it has another number of frames, is cut, or misses a frame on the way to a chosen one.
        av.error.FFmpegError: a packet on the way to a chosen frame does not decode, or the file cannot be read at all.
    """
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise ValueError("nothing says how it is encoded")
        context.thread_count = 1
        context.options = _STRICT
        packets = [packet for packet in container.demux(stream) if packet.size]
        num_shown = sum(not packet.is_discard for packet in packets)
        if num_shown != num_frames:
            raise ValueError(f"{num_shown} frames in it, declared {num_frames}")
        if any(packet.is_corrupt for packet in packets):
            raise ValueError("a packet of it is cut")
        starts = group_starts(context, packets)
        needed = range(len(packets)) if starts is None else _needed(starts, chosen)
        place = 0
        for count, frame in enumerate(_decoded(context, [packets[number] for number in needed])):
            # Without entry points the decoder may reorder and leave out: its own count is the frame's number.
            number = count if starts is None else needed[count]
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is corrupt")
            if starts is not None and frame.pts != packets[number].pts:
                raise ValueError(f"frame {number} is missing")
            if number == chosen[place]:
                yield frame
                place += 1
                if place == len(chosen):
                    return
        raise ValueError(f"frame {chosen[place]} is missing")


def group_starts(context: Any, packets: list[Any]) -> list[int] | None:
    """Numbers of the packets at which decoding may start; None where only decoding from the first one is sure.

    Sure means: H.264 in MP4's form, frames shown in the order of their packets and all of them, and a group starts
    with an IDR picture, behind which nothing refers back. Parameter sets must come with IDR pictures only: others
    could be lost with a group that is left out.
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
    """Numbers of the packets to decode: of every group that holds a chosen frame, its start to the last chosen one."""
    needed: list[int] = []
    bounds = np.searchsorted(chosen, [*starts[1:], np.iinfo(np.int64).max])
    first = 0
    for start, bound in zip(starts, bounds.tolist(), strict=True):
        if bound > first:
            needed += range(start, int(chosen[bound - 1]) + 1)
        first = bound
    return needed


def _nal_types(payload: memoryview, length_bytes: int) -> Iterator[int]:
    """Types of the NAL units of a packet, each preceded by its length (ISO/IEC 14496-15)."""
    place = length_bytes
    while place < len(payload):
        yield payload[place] & 31
        place += int.from_bytes(payload[place - length_bytes : place], "big") + length_bytes


def _decoded(context: Any, packets: list[Any]) -> Iterator[av.VideoFrame]:
    for packet in [*packets, None]:
        yield from context.decode(packet)
