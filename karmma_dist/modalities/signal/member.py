"""The stored signal of a clip: tracks of channels, each with the moments of its own clock, in one binary member.

Everything is little-endian, without padding; texts are a byte of length and UTF-8.

    magic            4 bytes    "KSIG"
    version          u16        1
    tracks           u16        number of tracks, 1 to 16
    start_s, span_s  2 x f64    start of the clip on the recording's clock, and its length, in seconds
    per track:
      channels       u16        number of channels, 1 to 64
      samples        u32        number of samples, at least 1
      tick_s         f64        seconds per unit of the moments
      per channel:   f64, f64   mean, standard deviation (for models); then the texts name, unit, word
      moments        column     of every sample, ascending
      per channel:   column     its samples

    column:  u8 type, u8 decimals, numbers:  0: f64   1: f32   2: i16   3: i32   4: first i64, then increments u32
             numbers of the types 2, 3 and 4 are divided by 10 ** decimals

A column takes the smallest type that gives back every number as it was read, so nothing is lost. Moments and samples
lie as they were given, in the units of the file; samples next to the clip's ends are included, for interpolation.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from karmma_dist.modalities.contract import DecodeError

MAGIC, VERSION = b"KSIG", 1
MOST_TRACKS, MOST_CHANNELS = 16, 64
_MOST_DECIMALS = 9
_EXACT = 2.0**53
_LATEST_S = 1e9
_F64, _F32, _I16, _I32, _INCREMENTS = range(5)
_DTYPES = {_F64: "<f8", _F32: "<f4", _I16: "<i2", _I32: "<i4"}


@dataclass(frozen=True)
class Channel:
    """A channel of a track."""

    name: str
    unit: str
    word: str
    """What it measures."""
    mean: float
    """Mean that is subtracted for models, in the channel's unit."""
    std: float
    """Standard deviation by which models' inputs are divided, above 0."""


@dataclass(frozen=True)
class Track:
    """Channels that share a clock."""

    channels: tuple[Channel, ...]
    tick_s: float
    """Seconds per unit of the moments."""
    times_T: np.ndarray
    """Moments of the samples as they were given, ascending; float64."""
    values_CT: np.ndarray
    """Samples in the units of their channels; float64."""


@dataclass(frozen=True)
class SignalMember:
    """A clip's signal."""

    start_s: float
    """Start of the clip on the recording's clock."""
    span_s: float
    """Length of the clip."""
    tracks: tuple[Track, ...]

    @property
    def channels(self) -> list[Channel]:
        """Channels of all tracks, in order."""
        return [channel for track in self.tracks for channel in track.channels]

    @property
    def num_samples(self) -> int:
        """Samples of the track that has most."""
        return max(len(track.times_T) for track in self.tracks)


def write_member(member: SignalMember) -> bytes:
    """Return the bytes of a signal."""
    parts = [MAGIC, struct.pack("<HHdd", VERSION, len(member.tracks), member.start_s, member.span_s)]
    for track in member.tracks:
        parts.append(struct.pack("<HId", len(track.channels), len(track.times_T), track.tick_s))
        for channel in track.channels:
            parts.append(struct.pack("<dd", channel.mean, channel.std))
            parts += [_text(text) for text in (channel.name, channel.unit, channel.word)]
        parts.append(_moments(track.times_T))
        parts += [_samples(values_T) for values_T in track.values_CT]
    return b"".join(parts)


def read_member(data: bytes) -> SignalMember:
    """Read the bytes of a signal.

    Raises:
        DecodeError: the bytes are not exactly a member of this format.
    """
    reader = _Reader(data)
    if reader.take(4) != MAGIC:
        raise DecodeError("is not a signal: it begins with other bytes than KSIG")
    version, num_tracks = reader.numbers("<HH")
    if version != VERSION:
        raise DecodeError(f"is of version {version}, known is {VERSION}")
    if not 1 <= num_tracks <= MOST_TRACKS:
        raise DecodeError(f"has {num_tracks} tracks, not 1 to {MOST_TRACKS}")
    start_s, span_s = reader.numbers("<dd")
    if not (math.isfinite(start_s) and 0 < span_s < math.inf):
        raise DecodeError(f"starts at {start_s} s and lasts {span_s} s")
    tracks = tuple(_track(reader) for _ in range(num_tracks))
    reader.finish()
    return SignalMember(start_s, span_s, tracks)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<B", len(encoded)) + encoded


def _moments(times_T: np.ndarray) -> bytes:
    """Return a column of ascending numbers."""
    if (decimal := _as_decimal(times_T)) is not None:
        decimals, whole_T = decimal
        increments = np.diff(whole_T)
        if increments.max(initial=0) < 2**32:
            first = struct.pack("<BBq", _INCREMENTS, decimals, int(whole_T[0]))
            return first + increments.astype("<u4").tobytes()
    return struct.pack("<BB", _F64, 0) + times_T.astype("<f8").tobytes()


def _samples(values_T: np.ndarray) -> bytes:
    """Return a column of any numbers, in the smallest type that is exact."""
    if (decimal := _as_decimal(values_T)) is not None:
        decimals, whole_T = decimal
        largest = int(np.abs(whole_T).max())
        for kind, most in ((_I16, 2**15 - 1), (_I32, 2**31 - 1)):
            if largest <= most:
                return struct.pack("<BB", kind, decimals) + whole_T.astype(_DTYPES[kind]).tobytes()
    with np.errstate(over="ignore"):
        is_single = np.array_equal(values_T.astype("<f4").astype("<f8"), values_T)
    kind = _F32 if is_single else _F64
    return struct.pack("<BB", kind, 0) + values_T.astype(_DTYPES[kind]).tobytes()


def _as_decimal(values: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Return the fewest decimals, and whole numbers int64, that make exactly these numbers; None if none do."""
    for decimals in range(_MOST_DECIMALS + 1):
        whole = np.rint(values * 10.0**decimals)
        if np.abs(whole).max() >= _EXACT:
            return None
        if np.array_equal(whole / 10.0**decimals, values):
            return decimals, whole.astype(np.int64)
    return None


def _track(reader: _Reader) -> Track:
    num_channels, num_samples, tick_s = reader.numbers("<HId")
    if not 1 <= num_channels <= MOST_CHANNELS:
        raise DecodeError(f"has {num_channels} channels in a track, not 1 to {MOST_CHANNELS}")
    if num_samples < 1 or not 0 < tick_s < math.inf:
        raise DecodeError(f"has a track of {num_samples} samples whose clock counts {tick_s} s")
    channels = []
    for _ in range(num_channels):
        mean, std = reader.numbers("<dd")
        if not (math.isfinite(mean) and 0 < std < math.inf):
            raise DecodeError(f"has a channel of mean {mean} and standard deviation {std}")
        name, unit, word = (reader.text() for _ in range(3))
        channels.append(Channel(name, unit, word, mean, std))
    times_T = reader.column(num_samples, (_F64, _INCREMENTS))
    if (np.diff(times_T) < 0).any():
        raise DecodeError("has a clock that runs backwards")
    if not np.abs(times_T).max() * tick_s <= _LATEST_S:
        raise DecodeError(f"has a clock that goes beyond {_LATEST_S:g} s")
    values_CT = np.stack([reader.column(num_samples, tuple(_DTYPES)) for _ in range(num_channels)])
    return Track(tuple(channels), tick_s, times_T, values_CT)


class _Reader:
    """A place in the bytes of a member, from which parts are taken one after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def take(self, num: int) -> bytes:
        """Return the next bytes."""
        part = self._data[self._place : self._place + num]
        if len(part) < num:
            raise DecodeError(f"ends at byte {len(self._data)}, {num - len(part)} bytes early")
        self._place += num
        return part

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Return the next numbers."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def text(self) -> str:
        """Return the next text."""
        try:
            text = self.take(self.numbers("<B")[0]).decode()
        except UnicodeDecodeError:
            raise DecodeError("has a text that is not UTF-8") from None
        if not text:
            raise DecodeError("has a channel without name, unit or word")
        return text

    def column(self, num: int, kinds: tuple[int, ...]) -> np.ndarray:
        """Return the next column, float64 (num,), which must have one of these types."""
        kind, decimals = self.numbers("<BB")
        if kind not in kinds or decimals > _MOST_DECIMALS:
            raise DecodeError(f"has a column of type {kind} with {decimals} decimals")
        if kind == _INCREMENTS:
            first = self.numbers("<q")[0]
            increments = np.frombuffer(self.take(4 * (num - 1)), "<u4").astype(np.int64)
            numbers = (first + np.concatenate([[0], np.cumsum(increments)])).astype(np.float64)
        else:
            dtype = np.dtype(_DTYPES[kind])
            numbers = np.frombuffer(self.take(dtype.itemsize * num), dtype).astype(np.float64)
        values: np.ndarray = numbers / 10.0**decimals
        if not np.isfinite(values).all():
            raise DecodeError("has numbers that are not finite")
        return values

    def finish(self) -> None:
        """Check that nothing is left."""
        if self._place != len(self._data):
            raise DecodeError(f"goes on for {len(self._data) - self._place} bytes after its end")
