"""One clip read to its last byte: checksums, metadata against index, and media that decode to what is declared."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av

from karmma_dist.errors import one_line
from karmma_dist.packing.verify.problems import Finding
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, DamageError

TOLERANCE_S = 0.05
"""Beyond one frame, by which lengths of a clip's members may differ."""

_STRICT = {"err_detect": "crccheck+explode"}
"""Without it FFmpeg's decoders paint over what they cannot read, and say nothing."""

_BOX_VALUES = 6


class _WrongMedia(Exception):
    """A member does not hold what its description says; the first argument is the kind of finding."""


@dataclass(frozen=True, slots=True)
class Shown:
    """From when to when a clip's stored pictures last, on its recording's clock."""

    shard: str
    key: str
    modality: str
    recording: str
    end_s: float
    stop_s: float
    """End of the clip."""
    frame_s: float
    """Length of a stored frame."""


def check_clip(folder: ShardFolder, clip: Clip, split: str) -> Iterator[Finding | Shown]:
    """Yield what is wrong with a clip, and how long its pictures last."""
    contents: dict[str, bytes] = {}
    for name, member in clip.members.items():
        if member is None:
            continue
        try:
            contents[name] = folder.read(clip, name)
        except DamageError as error:
            kind = "crc32" if error.what.startswith("crc32") else "unreadable"
            yield Finding(clip.shard, clip.key, name, kind, error.what)
    if "json" not in contents:
        return
    try:
        metadata = json.loads(contents.pop("json"))
        problems = list(_metadata_problems(metadata, clip, split))
        _expect_times(metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        yield Finding(clip.shard, clip.key, "json", "metadata", f"not a clip's metadata: {error!r}")
        return
    yield from (Finding(clip.shard, clip.key, "json", "metadata", problem) for problem in problems)
    for modality, data in contents.items():
        declared = metadata["modalities"].get(modality)
        if declared is None:
            continue
        try:
            _CHECKS[modality](data, declared)
            yield from _length(clip, modality, metadata)
        except _WrongMedia as error:
            yield Finding(clip.shard, clip.key, modality, *error.args)
        except (av.error.FFmpegError, ValueError, LookupError, TypeError, ArithmeticError) as error:
            yield Finding(clip.shard, clip.key, modality, "decode", one_line(f"does not decode: {error!r}"))


def _metadata_problems(metadata: dict[str, Any], clip: Clip, split: str) -> Iterator[str]:
    for name, value in (("key", clip.key), ("split", split), ("labels", clip.labels)):
        if metadata[name] != value:
            yield f"{name} is {metadata[name]!r}, elsewhere {value!r}"
    modalities = metadata["modalities"]
    for name in sorted({*modalities, *clip.members} - {"json"}):
        declared, member = modalities.get(name), clip.members.get(name)
        here = "absent" if declared is None else _described(declared["bytes"], declared["crc32"])
        there = "absent" if member is None else _described(member.size, member.crc32)
        if here != there:
            yield f"{name} is declared {here}, in the index {there}"


def _described(size: int, crc32: int) -> str:
    return f"with {size} bytes and crc32 {crc32}"


def _expect_times(metadata: dict[str, Any]) -> None:
    if not isinstance(metadata["recording"], str):
        raise ValueError("no name of a recording")
    for name in ("start_s", "stop_s"):
        if metadata[name] is not None and not isinstance(metadata[name], float | int):
            raise ValueError(f"{name} is {metadata[name]!r}")


def _length(clip: Clip, modality: str, metadata: dict[str, Any]) -> Iterator[Finding | Shown]:
    """Compare a member's length with the clip's: sound fills it, pictures may end with their recording."""
    declared = metadata["modalities"][modality]
    if metadata["stop_s"] is None or modality == "detections":
        return
    span_s = metadata["stop_s"] - metadata["start_s"]
    if modality == "audio":
        length_s, frame_s = declared["num_samples"] / declared["sample_rate"], 0.0
    else:
        length_s, frame_s = declared["num_frames"] / declared["fps"], 1 / declared["fps"]
    long, short = length_s > span_s + frame_s + TOLERANCE_S, length_s < span_s - frame_s - TOLERANCE_S
    if long or (short and modality == "audio"):
        yield Finding(clip.shard, clip.key, modality, "length", f"lasts {length_s:.3f} s, the clip {span_s:.3f} s")
    video = metadata["modalities"].get("video")
    computed = modality == "flow" and declared["source"] == "computed"
    if computed and video and declared["num_frames"] != video["num_frames"]:
        num = f"{declared['num_frames']} frames of flow computed from {video['num_frames']} of video"
        yield Finding(clip.shard, clip.key, modality, "length", num)
    if modality != "audio":
        end_s = metadata["start_s"] + length_s
        yield Shown(clip.shard, clip.key, modality, metadata["recording"], end_s, metadata["stop_s"], frame_s)


def early_ends(shown: list[Shown]) -> Iterator[Finding]:
    """Yield clips whose pictures end before the clip although their recording goes on: another clip shows more."""
    reach: dict[tuple[str, str], float] = {}
    for each in shown:
        place = (each.recording, each.modality)
        reach[place] = max(reach.get(place, 0.0), each.end_s)
    for each in shown:
        slack = each.frame_s + TOLERANCE_S
        if each.end_s < each.stop_s - slack and each.end_s < reach[each.recording, each.modality] - slack:
            what = f"ends {each.stop_s - each.end_s:.3f} s before the clip, but its recording goes on"
            yield Finding(each.shard, each.key, each.modality, "length", what)


def _check_video(data: bytes, declared: dict[str, Any], stacked: int = 1) -> None:
    """Decode the first frame and the last group of pictures; count the rest without decoding."""
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count = 1
        context.options = _STRICT
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) != declared["num_frames"]:
            raise _WrongMedia("length", f"{len(packets)} frames, declared {declared['num_frames']}")
        last_key = max(number for number, packet in enumerate(packets) if packet.is_keyframe)
        for part in (packets[:1], packets[last_key:]):
            frames = [frame for packet in [*part, None] for frame in context.decode(packet)]
            context.flush_buffers()
            if len(frames) != len(part) or any(frame.is_corrupt for frame in frames):
                raise _WrongMedia("decode", f"{len(frames)} of {len(part)} frames decode")
            size = (frames[-1].width, frames[-1].height)
            if size != (declared["width"], stacked * declared["height"]):
                raise _WrongMedia("decode", f"frames of {size[0]}x{size[1]} pixels, not the declared size")


def _check_flow(data: bytes, declared: dict[str, Any]) -> None:
    _check_video(data, declared, stacked=2)


def _check_audio(data: bytes, declared: dict[str, Any]) -> None:
    with av.open(io.BytesIO(data), "r") as container:
        stream = container.streams.audio[0]
        stream.codec_context.options = _STRICT
        if (stream.sample_rate, stream.channels) != (declared["sample_rate"], 1):
            raise _WrongMedia("decode", f"{stream.channels} channels at {stream.sample_rate} Hz")
        num = sum(frame.samples for frame in container.decode(stream))
    if num != declared["num_samples"]:
        raise _WrongMedia("length", f"{num} samples, declared {declared['num_samples']}")


def _check_detections(data: bytes, declared: dict[str, Any]) -> None:
    frames = json.loads(data)["frames"]
    boxes = [box for frame in frames for box in frame]
    if (len(frames), len(boxes)) != (declared["num_frames"], declared["num_boxes"]):
        raise _WrongMedia("length", f"{len(boxes)} boxes in {len(frames)} frames, declared otherwise")
    for box in boxes:
        if len(box) != _BOX_VALUES or not all(0 <= value <= 1 for value in box[:4]):
            raise _WrongMedia("decode", f"not a box of four places in [0, 1], category, score: {box}")


_CHECKS = {"video": _check_video, "flow": _check_flow, "audio": _check_audio, "detections": _check_detections}
