"""The contract for packing a modality: raw recordings become members of shards, without torch.

    Storage        part of a modality that packs
      Source       open file of the modality, from which members are cut
      PictureSink  consumer of a clip's pictures, for members that are made from pictures

A recording's pictures are decoded once and handed to every clip that shows them (`pictures.py`). A modality is
stored from a file of its own, from the pictures, or not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.settings import Settings

if TYPE_CHECKING:
    from av.video.reformatter import Colorspace

    from karmma_dist.modalities.pictures import CutPictures
    from karmma_dist.modalities.video_file import VideoFile

Stored = tuple[bytes, dict[str, Any]]
"""A member's bytes, and its entry in KEY.json without bytes and crc32."""

Sections = Mapping[str, Any]
"""Sections of the packing specification, by modality."""


class MediaStream(Enum):
    """A stream of a media file, by its common name."""

    PICTURES = "video"
    SOUND = "audio"


class PictureSink(ABC):
    """The maker of one clip's member from its pictures."""

    @abstractmethod
    def add(self, picture: np.ndarray) -> None:
        """Append a stored picture, uint8 (3H/2, W) I420."""

    @abstractmethod
    def finish(self) -> Stored:
        """Return the member; call it after the last picture."""


SinkMaker = Callable[[int, int, Fraction, "Colorspace"], PictureSink]
"""Function from width, height, rate and colour space of a clip's pictures to the clip's sink."""


class Source(ABC):
    """An open file of one modality of a recording."""

    @property
    def end_s(self) -> float | None:
        """End of the file in seconds from the start of the recording; None if the file does not tell."""
        return None

    @property
    def reach_s(self) -> float | None:
        """Seconds from the start of the recording after which the file has nothing; None if the file does not tell."""
        return self.end_s

    @abstractmethod
    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored | None:
        """Cut a clip's member; return None if the file holds nothing for the clip.

        Args:
            clip: The clip to cut.
            stop_s: End of the clip in seconds, if known.
            pictures: The clip's pictures, as the pass over the recording found them.

        Raises:
            MediaError: the file holds the clip, but that part cannot be read.
        """


class Storage(ABC):
    """The part that packs one modality. A subclass provides a source, a sink, or one of them by its settings.

    It is used only if `source` of its section is not `none`.
    """

    needs_pictures: ClassVar[bool] = False
    """True if cutting members from a source needs facts about the clip's pictures, for example their size, unless
    `reads_pictures` says otherwise of the settings."""
    media_stream: ClassVar[MediaStream | None] = None
    """Stream of a media file from which members can be made; None if the modality needs a separate file."""
    media_source: ClassVar[str] = "auto"
    """Value of `source` that makes members from that stream."""
    has_clip_length: ClassVar[bool] = False
    """True if a clip's moments are counted in this member, so that it is stored even if no model uses it."""
    entry_field: ClassVar[str] = ""
    """Name of a clip's entry (`ClipRecord.entries`) in the identity of a plan; empty if files have no entries."""

    def reads_pictures(self, settings: Any) -> bool:
        """Return True if cutting members from a source by these settings needs facts about the clip's pictures."""
        return self.needs_pictures

    @property
    @abstractmethod
    def settings(self) -> type[Settings]:
        """Section of the packing specification, with a field `source` that may be `none`."""

    def check_settings(self, settings: Any) -> None:  # noqa: B027 - most modalities need no optional package
        """Refuse settings that this machine cannot serve, before any worker starts.

        Raises:
            UserError: a package that the settings need is not installed.
        """

    def files(self, settings: Any) -> Sequence[str]:
        """Return the files that a recording has by the settings, for any reader, as paths inside the raw folder.

        `{participant}` and `{recording}` stand for the names. A recording that lacks one of them lacks the modality.
        """
        return ()

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> Source | None:
        """Open the recording's file of this modality.

        Args:
            recording: The recording and the paths of its media.
            sections: Sections of the specification.
            files: Stack that closes the opened files.
            video_file: The recording's video file, already open.

        Returns:
            The source; None if the recording has no such file, or if members are made from the pictures.

        Raises:
            MediaError: the file exists but cannot be read.
        """
        return None

    def sink_maker(self, source: Source | None, sections: Sections) -> SinkMaker | None:
        """Return the maker of sinks; None if members are not made from pictures.

        Args:
            source: Result of `open`.
            sections: Sections of the specification.
        """
        return None
