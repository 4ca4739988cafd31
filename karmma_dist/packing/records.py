"""What a reader of a raw dataset hands to the packer: recordings, each with the clips to cut from it.

Nothing here has been decoded: a plan is made from annotation files and the existence of media files alone.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError


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


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is to be packed, in the order of the annotation files."""

    recordings: tuple[Recording, ...]
    classes: dict[str, list[str]]
    """Class names per head, by id."""
    splits: tuple[str, ...]
    """Splits whose annotations are there."""
    notes: tuple[str, ...] = ()
    """What the user should know: splits skipped, settings without effect."""

    def keys(self, split: str) -> list[str]:
        """Keys of a split's planned clips, sorted."""
        return sorted(clip.key for recording in self.recordings for clip in recording.clips if clip.split == split)


@dataclass(frozen=True, slots=True)
class Failure:
    """A clip that has media which cannot be read: it is left out of the shards."""

    key: str
    split: str
    modality: str
    stage: str
    """What was being done: open, decode, cut, parse."""
    error: str


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


@dataclass(slots=True)
class CutClip:
    """A clip's members as they go into the tar, with the description that KEY.json gives of each."""

    record: ClipRecord
    payloads: dict[str, bytes]
    """Bytes per present modality."""
    described: dict[str, dict[str, Any]]
    """Description per present modality, without bytes and crc32."""
    stop_s: float | None
    """Where the clip ends; found in the media when the record does not say."""


def inside(raw: Path, relative: str, where: str) -> Path:
    """Return `raw / relative`, which must not leave `raw`.

    Raises:
        UserError: it does; `where` names the file and row or key to blame.
    """
    path = Path(os.path.normpath(raw / relative))
    if not path.is_relative_to(os.path.normpath(raw)):
        raise UserError(f"{where}: path '{relative}' leaves the raw folder {raw}")
    return path


def raw_file(raw: Path, relative: str, where: str) -> Path | None:
    """The file `relative` inside `raw`, or with `.gz` appended, or None when neither is there."""
    path = inside(raw, relative, where)
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    return None


def frames_of(raw: Path, relative: str, where: str) -> Path | None:
    """The tar (`relative` + .tar) or folder of numbered frames inside `raw`, or None when neither is there."""
    folder = inside(raw, relative, where)
    tar = folder.with_name(f"{folder.name}.tar")
    if tar.is_file():
        return tar
    return folder if folder.is_dir() else None
