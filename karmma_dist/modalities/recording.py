"""A raw recording: the paths of its media, the clips to cut from it, and the errors of clips that cannot be read."""

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
    """Seconds from the start of the recording; None for the end of the recording."""
    labels: dict[str, int | None]
    """Class by head; None in an unlabelled split."""
    narration: str = ""
    start_frame: int = 1
    """First file number (1-based, at the recording's nominal frame rate) in folders of numbered frames; 0 for the
    first existing file, whatever its number."""
    stop_frame: int | None = None
    """File number after the clip's last frame; None for the end of the existing files."""
    entries: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """First byte and length of this clip's entry, by modality, for files with an entry per clip. A modality is missing
    if its file has no entry for the clip."""


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A file, or a folder or tar of numbered frames, of one modality of a recording."""

    path: Path
    rate: int = 1
    """Rate in the modality's own terms: samples per second, or numbered frames per frame of this modality."""
    others: tuple[Path, ...] = ()
    """Further files that belong to it."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of its files."""
        return (self.path, *self.others)


@dataclass(frozen=True, slots=True)
class Recording:
    """One untrimmed recording: the paths of its media (None if a file does not exist) and the clips to cut from it."""

    name: str
    participant: str
    clips: tuple[ClipRecord, ...]
    video_file: Path | None = None
    """Container file with video, audio or both."""
    frames: Path | None = None
    """Tar or folder of frame_0000000001.jpg, ...; used if the video file has no video."""
    media: Mapping[str, MediaFile] = field(default_factory=dict)
    """Files of single modalities, by modality."""
    nominal_fps: int = 60
    """Frame rate of numbered frames and of the clips' frame numbers."""
    problems: Mapping[Path, str] = field(default_factory=dict)
    """Paths of these media that cannot be used although they exist or may exist, with the reason."""

    def usable(self, path: Path, modality: str) -> Path:
        """Return a path of this recording's media.

        Raises:
            MediaError: the path cannot be used although it exists or may exist.
        """
        if path in self.problems:
            raise MediaError(modality, "open", self.problems[path])
        return path


class MediaError(Exception):
    """Media of a clip that exist but cannot be read in their declared format."""

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
    """Return True if an error comes from the machine, its disks or its network, and not from the file being read.

    A bad sector (EIO) counts as the file's error, so that one bad file does not stop all others.
    """
    return isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def media_error(error: BaseException, modality: str, stage: str, text: str) -> MediaError:
    """Return the `MediaError` of clips whose media could not be read because of `error`.

    Raises:
        OSError: `error` comes from the machine, so no clip is to blame.
    """
    if is_of_the_machine(error):
        assert isinstance(error, OSError)
        raise OSError(error.errno, error.strerror, error.filename) from error
    return MediaError(modality, stage, text)


MOST_PIXELS = 1 << 26
"""Largest number of pixels of a picture, 8192 x 8192; a damaged header could declare any number."""

LONGEST_S = 24 * 3600.0
"""Longest length of a recording in seconds; a damaged header could declare any length."""

GAP_S = 0.015
"""Seconds by which audio may be out of place. It is less than the shortest usual packet (20 ms of Opus), so that lost
packets do not add up, and more than the rounding of containers to milliseconds."""

CUT_TOLERANCE_S = 0.5
"""Seconds by which a stream may end before the end that its container declares; an earlier end counts as cut."""


@dataclass(slots=True)
class Stretches:
    """Stretches of time that could not be decoded."""

    spans: list[tuple[float, float, str]] = field(default_factory=list)
    """Start and stop in seconds, and the problem."""
    open: tuple[float, str] | None = None
    """Start in seconds, and the problem, of a stretch that has not ended yet."""

    def start(self, time_s: float, problem: str) -> None:
        """Start a stretch at `time_s`, unless one is open."""
        if self.open is None:
            self.open = (time_s, problem)

    def end_all(self, time_s: float, problem: str) -> None:
        """Mark everything from `time_s` on as one stretch with this problem, including an open stretch before it."""
        self.open = (time_s if self.open is None else self.open[0], problem)

    def stop(self, time_s: float) -> None:
        """End the open stretch at `time_s`."""
        if self.open is not None and time_s > self.open[0]:
            self.spans.append((self.open[0], time_s, self.open[1]))
            self.open = None

    def check(self, modality: str, start_s: float, stop_s: float) -> None:
        """Check that [start_s, stop_s] overlaps no stretch.

        Raises:
            MediaError: the interval overlaps a stretch.
        """
        spans = [*self.spans, (self.open[0], math.inf, self.open[1])] if self.open else self.spans
        for start, stop, problem in spans:
            if start <= stop_s and start_s < stop:
                raise MediaError(modality, "decode", f"damaged at {start:.2f} s: {problem}")
