"""How a modality of a raw recording becomes members of shards; no torch.

    Storage        the part of a modality that packs
      Source       an open file of its own, from which members are cut
      PictureSink  takes the pictures of a clip as they pass, where a member is made of them

A recording's pictures are decoded once and pass by every clip that shows them (`pictures.py`). A modality is
stored from a file of its own, from the pictures, or not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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
    """A stream of a media file, by the name that people know it by."""

    PICTURES = "video"
    SOUND = "audio"


class PictureSink(ABC):
    """Makes one clip's member of its pictures."""

    @abstractmethod
    def add(self, picture: np.ndarray) -> None:
        """Append a stored picture, uint8 (3H/2, W) I420."""

    @abstractmethod
    def finish(self) -> Stored:
        """Return the member; no more pictures come."""


SinkMaker = Callable[[int, int, Fraction, "Colorspace"], PictureSink]
"""Makes the sink of a clip whose pictures have a width, a height, a rate and a colour space."""


class Source(ABC):
    """An open file of one modality of a recording."""

    @property
    def end_s(self) -> float | None:
        """Where the file ends, in seconds from the start of the recording; None where it does not tell."""
        return None

    @abstractmethod
    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored | None:
        """Cut a clip's member; None: there is nothing of the clip in the file.

        Args:
            clip: What to cut.
            stop_s: Where it ends, as far as is known.
            pictures: What the pass over the pictures found of it.

        Raises:
            MediaError: there is, but it cannot be read.
        """


class Storage(ABC):
    """The packing of one modality. A subclass has a source, a sink, or either by its settings.

    It is asked only where its section's `source` is not `none`.
    """

    needs_pictures: ClassVar[bool] = False
    """True if members are cut from a source with the clip's pictures at hand, for example their size."""
    media_stream: ClassVar[MediaStream | None] = None
    """Stream of a media file that members can be made of without any other file; None: a file of its own is needed."""
    media_source: ClassVar[str] = "auto"
    """`source` of the section by which members are made of that stream."""
    has_clip_length: ClassVar[bool] = False
    """True if a clip's moments are counted in this member, so that it is stored even where no model takes it."""
    entry_field: ClassVar[str] = ""
    """Name of a clip's entry (`ClipRecord.entries`) in the identity of a plan; empty: files have no entries."""

    @property
    @abstractmethod
    def settings(self) -> type[Settings]:
        """Its section of the packing specification, with a field `source` that may be `none`."""

    def check_settings(self, settings: Any) -> None:  # noqa: B027 - most need nothing that may be missing
        """Refuse now rather than in the first worker what cannot be done here.

        Raises:
            UserError: something is not installed.
        """

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> Source | None:
        """Open the recording's own file of this modality; None: it has none, or members are made of the pictures.

        Args:
            recording: Where its media lie.
            sections: Of the specification.
            files: Closes what is opened.
            video_file: The recording's video file, opened already.

        Raises:
            MediaError: it has one that cannot be read.
        """
        return None

    def sink_maker(self, source: Source | None, sections: Sections) -> SinkMaker | None:
        """Return what makes members of pictures; None: they are not made of them.

        Args:
            source: What `open` returned.
            sections: Of the specification.
        """
        return None
