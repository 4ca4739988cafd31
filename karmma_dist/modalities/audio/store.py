"""The storage of audio: a recording's audio on one clock, gaps filled, resampled to the stored rate, damage recorded.

The audio comes from the recording's video file, or from an HDF5 file with one mono dataset per recording, which starts
with the recording (https://github.com/ekazakos/auditory-slow-fast, EPIC-KITCHENS-100_audio.hdf5: 24 kHz, float32 in
[-1, 1]).
"""

from __future__ import annotations

import importlib.util
import io
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from karmma_dist.errors import UserError, one_line
from karmma_dist.modalities.audio import SAMPLE_RATE, AudioSpec
from karmma_dist.modalities.recording import (
    CUT_TOLERANCE_S,
    GAP_S,
    LONGEST_S,
    ClipRecord,
    MediaError,
    Recording,
    Stretches,
    media_error,
)
from karmma_dist.modalities.storage import MediaStream, Sections, Source, Storage, Stored
from karmma_dist.modalities.video_file import VideoFile, reason

if TYPE_CHECKING:
    from karmma_dist.modalities.pictures import CutPictures


_MUXER = {"fflags": "+bitexact", "metadata_header_padding": "0"}
"""Options of the muxer. By default FFmpeg reserves 8 kB for tags in each file."""


def encode_flac(samples: np.ndarray) -> bytes:
    """Encode samples, int16 (N,), mono at 16 kHz, as FLAC."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac", options=_MUXER) as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


_LONGEST_GAP_S = 3600.0
"""Longest gap in seconds; a longer one is an error of the clock."""

_MOST_MIXED_CHANNELS = 8
"""Largest number of channels that FFmpeg mixes."""


class Sound:
    """A recording's audio as mono int16 at 16 kHz, on the recording's clock.

    Args:
        longest_gap_s: Longest gap in seconds that is filled with silence; a longer one is damage.
    """

    def __init__(self, longest_gap_s: float = CUT_TOLERANCE_S) -> None:
        self.damage = Stretches()
        self._longest_gap_s = longest_gap_s
        self.samples = np.zeros(0, np.int16)
        self._start_s = 0.0
        self._chunks: list[np.ndarray] = []
        self._length = 0
        self._overlap = 0
        self._resampler: av.AudioResampler | None = None
        self._layout: tuple[Any, ...] = ()
        self._expected_s = 0.0
        """Expected start of the next frame, counted in samples: from the last timestamp alone, gaps would add up."""

    def add(self, frame: av.AudioFrame, time_s: float) -> bool:
        """Append a decoded frame that starts at `time_s`.

        Returns:
            False if the frame and all later ones cannot be placed because the clock jumps.
        """
        if not self._is_continued_at(time_s, frame.samples / frame.sample_rate):
            return False
        if frame.layout.nb_channels > _MOST_MIXED_CHANNELS:
            frame = mean_of_channels(frame)
        layout = (frame.format.name, frame.layout.name, frame.sample_rate)
        if layout != self._layout or abs(time_s - self._expected_s) > GAP_S:
            self._flush()
            missing = round(time_s * SAMPLE_RATE) - self._length
            # An encoder's priming samples lie before time 0, and repeated audio overlaps earlier samples.
            self._overlap = max(-missing, 0)
            if missing > 0:
                self._append(np.zeros(missing, np.int16))
            self._layout, self._expected_s = layout, time_s
        if self._resampler is None:
            self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        frame.pts = None
        for part in self._resampler.resample(frame):
            self._append(part.to_ndarray().reshape(-1))
        self._expected_s += frame.samples / frame.sample_rate
        return True

    def _is_continued_at(self, time_s: float, frame_s: float) -> bool:
        """Record a gap or jump before a frame; return False if later frames cannot be placed."""
        if not self._layout:
            self._start_s = time_s
            if time_s <= _LONGEST_GAP_S:
                return True
        late_s = time_s - self._expected_s
        if late_s < -CUT_TOLERANCE_S:
            self.damage.end_all(self._expected_s, f"the clock jumps back to {time_s:.2f} s")
            return False
        if late_s > _LONGEST_GAP_S:
            self.damage.start(self._expected_s, f"the clock jumps to {time_s:.0f} s")
            return False
        packets_s = 0.0 if self._longest_gap_s <= GAP_S else 2 * frame_s  # packets are lost whole
        if late_s > self._longest_gap_s + packets_s:
            self.damage.spans.append((self._expected_s, time_s, f"no sound until {time_s:.2f} s"))
        return True

    def finish(self) -> None:
        """Join the samples after the last frame."""
        self._flush()
        self.samples = np.concatenate(self._chunks) if self._chunks else self.samples
        self._chunks = []

    @property
    def end_s(self) -> float:
        """End of the audio in seconds, valid after `finish`."""
        return len(self.samples) / SAMPLE_RATE

    def cut(self, start_s: float, stop_s: float) -> np.ndarray | None:
        """Cut the samples of [start_s, stop_s), int16, with silence before the first and after the last.

        Returns:
            The samples; None if the audio starts after the clip or ends before it.

        Raises:
            MediaError: a part of the interval could not be decoded.
        """
        self.damage.check("audio", start_s, stop_s)
        if self._start_s >= stop_s:
            return None
        first, num = round(start_s * SAMPLE_RATE), max(round((stop_s - start_s) * SAMPLE_RATE), 1)
        piece = self.samples[first : first + num]
        return np.pad(piece, (0, num - len(piece))) if len(piece) else None

    def _flush(self) -> None:
        if self._resampler is not None:
            for part in self._resampler.resample(None):
                self._append(part.to_ndarray().reshape(-1))
            self._resampler = None

    def _append(self, samples: np.ndarray) -> None:
        dropped = min(self._overlap, len(samples))
        self._overlap -= dropped
        samples = samples[dropped:]
        self._chunks.append(samples)
        self._length += len(samples)


def mean_of_channels(frame: av.AudioFrame) -> av.AudioFrame:
    """Return the mean of all channels of a frame, float32 mono, for layouts that FFmpeg cannot mix."""
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    mean = samples.mean(axis=0, dtype=np.float64)
    if samples.dtype.kind == "u":
        mean = mean / 128 - 1
    elif samples.dtype.kind == "i":
        mean = mean / 2.0 ** (8 * samples.dtype.itemsize - 1)
    mixed = av.AudioFrame.from_ndarray(mean.astype(np.float32)[None], format="flt", layout="mono")
    mixed.sample_rate = frame.sample_rate
    return mixed


_CHUNK_S = 10
_MOST_CHUNK_BYTES = 1 << 28
"""Bytes of a dataset's chunk, which is unpacked as a whole."""


def recordings_with_sound(path: Path) -> set[str]:
    """Return the names of the recordings in an HDF5 file of audio.

    Raises:
        UserError: h5py is not installed, or the file cannot be read.
    """
    if importlib.util.find_spec("h5py") is None:
        raise UserError(
            f"{path}: reading it needs h5py: pip install 'karmma-dist[hdf5]' (or choose audio.source=movie)"
        )
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return set(file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as HDF5: {one_line(error)}") from None


def read_sound(path: Path, recording: str, rate: int) -> Sound:
    """Read a recording's audio from an HDF5 file and resample it.

    Raises:
        MediaError: the dataset cannot be read, is not mono audio, or lies in another file.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _read(file, recording, rate)
    except (OSError, RuntimeError, av.error.FFmpegError) as error:
        raise media_error(error, "audio", "open", _message(path, recording, one_line(error, 200))) from None


def _read(file: Any, recording: str, rate: int) -> Sound:
    import h5py

    path = Path(file.filename)
    try:
        samples = file[recording] if isinstance(file.get(recording, getlink=True), h5py.HardLink) else None
    except KeyError as error:  # of h5py, for an object that it cannot open
        raise _problem(path, recording, one_line(error, 200)) from None
    # A link to another file could point to any file of this machine.
    if not isinstance(samples, h5py.Dataset) or samples.external or samples.is_virtual:
        raise _problem(path, recording, "is not a dataset in this file")
    if samples.ndim != 1 or not (samples.dtype.kind == "f" or samples.dtype == np.int16):
        raise _problem(path, recording, f"is {samples.dtype} {samples.shape}, not mono float or int16 samples")
    if (problem := _missing_samples(samples, rate)) is not None:
        raise _problem(path, recording, problem)
    sound = Sound()
    for start in range(0, samples.size, _CHUNK_S * rate):
        chunk = samples[start : start + _CHUNK_S * rate]
        if chunk.dtype != np.int16:
            if not np.isfinite(chunk).all():
                raise _problem(path, recording, f"has samples that are not finite, from {start / rate:.0f} s on")
            chunk = np.rint(np.clip(chunk, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        sound.add(frame, start / rate)
    sound.finish()
    return sound


def _missing_samples(samples: Any, rate: int) -> str | None:
    """Return the problem of a dataset that declares more samples than it stores; HDF5 would read them as zeros."""
    if samples.size > LONGEST_S * rate:
        return f"declares {samples.size:,} samples, {samples.size / rate / 3600:,.0f} hours"
    if samples.chunks is None:
        stored, declared = samples.id.get_storage_size(), samples.size * samples.dtype.itemsize
        return f"declares {declared:,} bytes and stores {stored:,}" if stored < declared else None
    if samples.chunks[0] * samples.dtype.itemsize > _MOST_CHUNK_BYTES:
        return f"has chunks of {samples.chunks[0]:,} samples"
    stored, declared = samples.id.get_num_chunks(), -(-samples.size // samples.chunks[0])
    return f"declares {declared:,} chunks and stores {stored:,}" if stored < declared else None


def _problem(path: Path, recording: str, problem: str) -> MediaError:
    return MediaError("audio", "open", _message(path, recording, problem))


def _message(path: Path, recording: str, problem: str) -> str:
    return f"{path.name}: {recording}: {problem}"


def sound_of(video_file: VideoFile) -> Sound | None:
    """Decode the best audio stream of a video file and record stretches that do not decode in `damage`.

    Returns:
        The audio; None if the file has no audio stream.

    Raises:
        MediaError: the stream cannot be opened or converted.
    """
    try:
        if not video_file.has_audio:
            return None
        sound = Sound(GAP_S if video_file.numbers_samples else CUT_TOLERANCE_S)
        for frame, time_s, problem in video_file.audio_frames(sound.damage):
            if frame is None:
                sound.damage.start(time_s, problem)
                continue
            if frame.is_corrupt:
                sound.damage.start(time_s, "corrupt frame")
            else:
                sound.damage.stop(time_s)
            if not sound.add(frame, time_s):
                break
        sound.finish()
        return sound
    except (av.error.FFmpegError, ValueError) as error:
        raise media_error(error, "audio", "open", f"{video_file.path.name}: {reason(error)}") from None


class SoundSource(Source):
    """The audio of a recording, from which clips are cut."""

    def __init__(self, sound: Sound) -> None:
        self._sound = sound

    @property
    def end_s(self) -> float:
        """End of the audio in seconds from the start of the recording."""
        return self._sound.end_s

    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored | None:
        """Cut exactly the clip's seconds."""
        samples = None if stop_s is None else self._sound.cut(clip.start_s, stop_s)
        if samples is None:
            return None
        return encode_flac(samples), {"sample_rate": SAMPLE_RATE, "num_samples": len(samples)}


class AudioStorage(Storage):
    """The storage of audio."""

    settings = AudioSpec
    media_stream = MediaStream.SOUND

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> SoundSource | None:
        """Decode the video file's audio, else read the HDF5 file's."""
        source, hdf5_file = sections["audio"].source, recording.media.get("audio")
        if video_file is not None and source != "hdf5" and (sound := sound_of(video_file)) is not None:
            return SoundSource(sound)
        if hdf5_file is not None and source != "movie":
            return SoundSource(read_sound(hdf5_file.path, recording.name, hdf5_file.rate))
        return None


STORAGE = AudioStorage()
