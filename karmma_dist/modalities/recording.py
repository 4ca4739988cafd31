"""A raw recording: where its media lie, the clips to cut from it, and what becomes of those that cannot be read."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One annotated clip of a recording."""

    key: str
    """Name in the shards, unique over all splits."""
    split: str
    start_s: float
    """Seconds from the start of the recording."""
    stop_s: float | None
    """None: to the end of the recording."""
    labels: dict[str, int | None]
    """Class per head; None in an unlabelled split."""
    narration: str = ""
    start_frame: int = 1
    """First file number (1-based, at the recording's nominal frame rate) in folders of numbered frames; 0: the first
    there is, wherever the numbers start."""
    stop_frame: int | None = None
    """File number where the clip ends, not part of it; None: the last one there is."""
    boxes: tuple[int, int] | None = None
    """First byte and length of the clip's entry in the boxes file; None: no boxes."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One untrimmed recording: where its media lie (None: no such file) and the clips to cut from it."""

    name: str
    participant: str
    clips: tuple[ClipRecord, ...]
    movie: Path | None = None
    """Container file with video, sound or both."""
    rgb_frames: Path | None = None
    """Tar or folder of frame_0000000001.jpg, ...; used where the movie has no video."""
    flow_frames: Path | None = None
    """Tar or folder of u/frame_0000000001.jpg, ... and v/..., or another layout of `numbered_frames`."""
    sound_hdf5: Path | None = None
    """HDF5 file with a dataset of this recording's name."""
    sound_hdf5_rate: int = 24_000
    """Samples per second in it."""
    boxes: Path | None = None
    """JSON file of annotated boxes that has the clip's."""
    nominal_fps: int = 60
    """Frame rate of `rgb_frames` and of the clips' frame numbers."""
    rgb_frames_per_flow_frame: int = 1
    """2: flow was computed at half the nominal rate."""


class MediaError(Exception):
    """Existing media of a clip cannot be read as what they are said to be."""

    def __init__(self, modality: str, stage: str, error: str) -> None:
        super().__init__(f"{modality}: {stage}: {error}")
        self.modality, self.stage, self.error = modality, stage, error


_OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS,  # nowhere to write
    errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.ENODEV,
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EREMOTEIO,
}  # fmt: skip


def is_of_the_machine(error: BaseException) -> bool:
    """Return True if an error tells of the machine, its disks or its network, and nothing of the file it came up at.

    A bad sector (EIO) is the file's: one must not stand in the way of all others.
    """
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def media_error(error: BaseException, modality: str, stage: str, text: str) -> MediaError:
    """Return the failure of the clips whose media could not be read for `error`.

    Raises:
        OSError: `error` is of the machine: no clip's failure.
    """
    if is_of_the_machine(error):
        assert isinstance(error, OSError)
        raise OSError(error.errno, error.strerror, error.filename) from error
    return MediaError(modality, stage, text)
