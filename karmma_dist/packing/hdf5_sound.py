"""Sound kept apart from the movies: one HDF5 file with a dataset per recording, mono, from the recording's start.

Format: https://github.com/ekazakos/auditory-slow-fast (EPIC-KITCHENS-100_audio.hdf5: 24 kHz, float32 in [-1, 1]).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import av
import numpy as np

from karmma_dist.errors import UserError, one_line
from karmma_dist.packing.records import MediaError, media_error
from karmma_dist.packing.sound import Sound

_CHUNK_S = 10


def recordings_with_sound(path: Path) -> set[str]:
    """Names of the recordings that an HDF5 file has sound of.

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
    """Read a recording's sound and resample it.

    Raises:
        MediaError: it cannot be read, is no mono sound, or lies in another file.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _read(file, recording, rate)
    except (OSError, RuntimeError, KeyError, av.error.FFmpegError) as error:
        raise media_error(error, "audio", "open", _said(path, recording, one_line(error, 200))) from None


def _read(file: Any, recording: str, rate: int) -> Sound:
    import h5py

    path = Path(file.filename)
    samples = file[recording] if isinstance(file.get(recording, getlink=True), h5py.HardLink) else None
    # What lies in other files could be any file of this machine.
    if not isinstance(samples, h5py.Dataset) or samples.external or samples.is_virtual:
        raise _problem(path, recording, "is no dataset of this file")
    if samples.ndim != 1 or not (samples.dtype.kind == "f" or samples.dtype == np.int16):
        raise _problem(path, recording, f"is {samples.dtype} {samples.shape}, not mono float or int16 samples")
    sound = Sound(None)
    for start in range(0, samples.size, _CHUNK_S * rate):
        chunk = samples[start : start + _CHUNK_S * rate]
        if chunk.dtype != np.int16:
            if not np.isfinite(chunk).all():
                raise _problem(path, recording, f"has samples that are no numbers, from {start / rate:.0f} s on")
            chunk = np.rint(np.clip(chunk, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk)[None], format="s16", layout="mono")
        frame.sample_rate = rate
        sound.add(frame, start / rate)
    sound.finish()
    return sound


def _problem(path: Path, recording: str, what: str) -> MediaError:
    return MediaError("audio", "open", _said(path, recording, what))


def _said(path: Path, recording: str, what: str) -> str:
    return f"{path.name}: {recording}: {what}"
