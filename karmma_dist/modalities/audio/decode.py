"""The audio decoder: FLAC -> int16 samples -> windows around the views' moments."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np

from karmma_dist.modalities.audio import SAMPLE_RATE, AudioDescription, AudioInput
from karmma_dist.modalities.contract import ArrayType, DecodeError, Decoder, StoredError, View


class AudioDecoder(Decoder):
    """A decoder to int16 (V, windows, samples), with silence beyond the clip's ends."""

    always_whole = True

    def decode(self, data: bytes, description: AudioDescription, settings: AudioInput) -> np.ndarray:
        """Decode all samples of a mono 16-kHz FLAC, int16 (samples,)."""
        samples = decode_flac(data)
        if len(samples) != description.num_samples:
            raise DecodeError(f"{len(samples)} samples in it, declared {description.num_samples}")
        return samples

    def cut(
        self, decoded: np.ndarray, description: AudioDescription, settings: AudioInput, views: Sequence[View],
        length_s: float,
    ) -> np.ndarray:  # fmt: skip
        """Cut windows, each centred on its moment if their numbers are equal [paper], else spread evenly."""
        return np.stack([cut_windows(decoded, view.times_F * length_s, settings) for view in views])

    def array(self, settings: AudioInput) -> ArrayType:
        """Return the type of all windows."""
        shape = (settings.num_windows, settings.window_samples)
        return ArrayType(shape, "int16", "windows, samples; mono, full scale 32768", SAMPLE_RATE)

    def check(self, data: bytes, description: AudioDescription) -> None:
        """Decode everything and count the samples."""
        with _decoding(data) as (container, stream):
            num_channels = stream.codec_context.layout.nb_channels
            if (stream.codec_context.sample_rate, num_channels) != (description.sample_rate, 1):
                rate = stream.codec_context.sample_rate
                raise StoredError("decode", f"{num_channels} channels at {rate} Hz")
            num_samples = sum(frame.samples for frame in container.decode(stream))
        if num_samples != description.num_samples:
            raise StoredError("length", f"{num_samples} samples, declared {description.num_samples}")


def decode_flac(data: bytes) -> np.ndarray:
    """Decode all samples of a stored member, int16 (samples,).

    Raises:
        DecodeError: the member cannot be decoded, or is not mono s16 at 16 kHz.
    """
    with _decoding(data) as (container, stream):
        context = stream.codec_context
        stored = (context.format.name, context.layout.nb_channels, context.sample_rate)
        if stored != ("s16", 1, SAMPLE_RATE):
            raise DecodeError(
                f"{stored[1]} channels of {stored[0]} at {stored[2]} Hz, not mono s16 at {SAMPLE_RATE} Hz"
            )
        chunks = [frame.to_ndarray()[0] for frame in container.decode(stream)]
    if not chunks:
        raise DecodeError("no audio in it")
    return np.concatenate(chunks)


def cut_windows(samples: np.ndarray, moments_s: np.ndarray, settings: AudioInput) -> np.ndarray:
    """Cut int16 (windows, samples) out of all samples, with silence beyond their ends."""
    num, size = settings.num_windows, settings.window_samples
    is_centred = num == len(moments_s)
    centres = moments_s * SAMPLE_RATE if is_centred else (np.arange(num) + 0.5) / num * len(samples)
    starts = np.round(centres).astype(np.int64) - size // 2
    windows = np.zeros((num, size), np.int16)
    for window, start in zip(windows, starts.tolist(), strict=True):
        existing = samples[max(start, 0) : max(start + size, 0)]
        offset = max(-start, 0)
        window[offset : offset + len(existing)] = existing
    return windows


@contextmanager
def _decoding(data: bytes) -> Iterator[tuple[Any, Any]]:
    """Open a member in memory with a strict decoder and yield container and stream."""
    try:
        with av.open(io.BytesIO(data), "r") as container:
            if not container.streams.audio:
                raise DecodeError("no audio in it")
            stream = container.streams.audio[0]
            if stream.codec_context is None or stream.codec_context.format is None:
                raise DecodeError("its codec is unknown")
            # By default FFmpeg's decoders silently replace damaged parts by silence.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
            yield container, stream
    except av.error.FFmpegError as error:
        raise DecodeError(str(error)) from None


DECODER = AudioDecoder()
