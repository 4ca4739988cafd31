"""A raw recording: where its media lie, the clips to cut from it, and what becomes of those that cannot be read."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    entries: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Per modality whose file has an entry for each clip: first byte and length of this clip's; none: it has none."""


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file, or a folder or tar of numbered frames, of one modality of a recording."""

    path: Path
    rate: int = 1
    """What its modality has to know of its clock: samples per second, or numbered frames per frame of it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One untrimmed recording: where its media lie (None: no such file) and the clips to cut from it."""

    name: str
    participant: str
    clips: tuple[ClipRecord, ...]
    video_file: Path | None = None
    """Container file with video, audio or both."""
    frames: Path | None = None
    """Tar or folder of frame_0000000001.jpg, ...; used where the video file has no video."""
    media: Mapping[str, MediaFile] = field(default_factory=dict)
    """Files of single modalities, by name."""
    nominal_fps: int = 60
    """Frame rate of numbered frames and of the clips' frame numbers."""


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


CUT_TOLERANCE_S = 0.5
"""A stream that ends this much before the end its container declares is cut."""


@dataclass(slots=True)
class Stretches:
    """Stretches of time that could not be decoded."""

    spans: list[tuple[float, float, str]] = field(default_factory=list)
    """Start, stop, why."""
    open: tuple[float, str] | None = None
    """Start of a stretch that has not ended yet."""

    def start(self, time_s: float, why: str) -> None:
        """Damage from here on."""
        if self.open is None:
            self.open = (time_s, why)

    def stop(self, time_s: float) -> None:
        """Whole again."""
        if self.open is not None and time_s > self.open[0]:
            self.spans.append((self.open[0], time_s, self.open[1]))
            self.open = None

    def check(self, modality: str, start_s: float, stop_s: float) -> None:
        """Raise MediaError when [start_s, stop_s] meets a stretch."""
        spans = [*self.spans, (self.open[0], math.inf, self.open[1])] if self.open else self.spans
        for start, stop, why in spans:
            if start <= stop_s and start_s < stop:
                raise MediaError(modality, "decode", f"damaged at {start:.2f} s: {why}")
