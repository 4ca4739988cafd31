"""The storage of signals: a clip's samples as the recording's files have them, or absence where they do not cover it.

A clip has no signal (`null`) if its recording lacks a file, if a gap inside of it is longer than `max_gap_s`, or if the
samples cover less than `min_coverage` of it. A gap that reaches beyond an end of the clip counts as not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from karmma_dist.modalities.recording import ClipRecord, Recording
from karmma_dist.modalities.signal import TICKS_S, SignalSpec, TrackSpec
from karmma_dist.modalities.signal.csv_file import RecordedTrack, read_track
from karmma_dist.modalities.signal.member import Channel, SignalMember, Track, write_member
from karmma_dist.modalities.storage import Sections, Source, Storage, Stored

if TYPE_CHECKING:
    from karmma_dist.modalities.pictures import CutPictures
    from karmma_dist.modalities.video_file import VideoFile


_ROUNDING = 1e-9
"""Fraction of a time by which rounding may change it: samples every 0.1 s keep a limit of 0.1 s."""


class SignalSource(Source):
    """The files of a recording, read.

    Args:
        section: The specification's section.
        recorded: Samples of every track.
    """

    def __init__(self, section: SignalSpec, recorded: Sequence[RecordedTrack]) -> None:
        self._section = section
        self._tracks = [_Track(track, each) for track, each in zip(section.tracks, recorded, strict=True)]

    @property
    def end_s(self) -> float:
        """End of the track that ends first, in seconds from the start of the recording."""
        return min(float(track.seconds_T[-1]) for track in self._tracks)

    @property
    def reach_s(self) -> float:
        """End of the track that ends last."""
        return max(float(track.seconds_T[-1]) for track in self._tracks)

    def cut(self, clip: ClipRecord, stop_s: float | None, pictures: CutPictures) -> Stored | None:
        """Cut the samples of the clip's seconds, and one more at each end."""
        if stop_s is None or stop_s <= clip.start_s:
            return None
        for track in self._tracks:
            track.recorded.damage.check("signal", clip.start_s, stop_s)
        tracks = []
        for track in self._tracks:
            rows = track.covering(clip.start_s, stop_s, self._section)
            if rows is None:
                return None
            tracks.append(track.cut(rows))
        member = SignalMember(clip.start_s, stop_s - clip.start_s, tuple(tracks))
        names = ", ".join(f"{channel.name} [{channel.unit}]" for channel in member.channels)
        return write_member(member), {
            "num_channels": len(member.channels), "num_samples": member.num_samples, "span_s": member.span_s,
            "channels": names,
        }  # fmt: skip


class _Track:
    """A track of the whole recording."""

    def __init__(self, spec: TrackSpec, recorded: RecordedTrack) -> None:
        self.recorded, self._tick_s = recorded, TICKS_S[spec.time_unit]
        self.seconds_T = recorded.times_T * self._tick_s
        channels = zip(spec.channels, recorded.values_CT, strict=True)
        self._channels = tuple(
            Channel(
                each.name, each.unit, each.word,
                _rounded(values_T.mean()) if each.mean is None else each.mean,
                (_rounded(values_T.std()) or 1.0) if each.std is None else each.std,
            )
            for each, values_T in channels
        )  # fmt: skip

    def covering(self, start_s: float, stop_s: float, section: SignalSpec) -> slice | None:
        """Return the samples that cover a clip, or None if they do not."""
        most_s = section.max_gap_s * (1 + _ROUNDING)
        first = max(int(np.searchsorted(self.seconds_T, start_s, "right")) - 1, 0)
        last = min(int(np.searchsorted(self.seconds_T, stop_s, "left")), len(self.seconds_T) - 1)
        times_s = self.seconds_T[first : last + 1]
        # A gap at an end of the clip only leaves that end uncovered.
        if len(times_s) > 1 and times_s[0] < start_s and times_s[1] - times_s[0] > most_s:
            first, times_s = first + 1, times_s[1:]
        if len(times_s) > 1 and times_s[-1] > stop_s and times_s[-1] - times_s[-2] > most_s:
            last, times_s = last - 1, times_s[:-1]
        covered_s = min(stop_s, float(times_s[-1])) - max(start_s, float(times_s[0]))
        is_covered = covered_s >= section.min_coverage * (stop_s - start_s) * (1 - _ROUNDING)
        if not is_covered or np.diff(times_s).max(initial=0) > most_s:
            return None
        return slice(first, last + 1)

    def cut(self, rows: slice) -> Track:
        """Return the samples of some rows, as they are stored."""
        return Track(self._channels, self._tick_s, self.recorded.times_T[rows], self.recorded.values_CT[:, rows])


def _rounded(number: float) -> float:
    """Return a number with six digits: the last ones of a sum depend on the processor, and bytes of shards must not."""
    return float(f"{number:.6g}")


class SignalStorage(Storage):
    """The storage of signals."""

    settings = SignalSpec

    def files(self, settings: SignalSpec) -> list[str]:
        """Return the file of every track."""
        return [track.file for track in settings.tracks]

    def open(
        self, recording: Recording, sections: Sections, files: ExitStack, video_file: VideoFile | None
    ) -> SignalSource | None:
        """Read the recording's files."""
        media, section = recording.media.get("signal"), sections["signal"]
        if media is None:
            return None
        paths = [recording.usable(path, "signal") for path in media.paths]
        return SignalSource(section, [read_track(*pair) for pair in zip(paths, section.tracks, strict=True)])


STORAGE = SignalStorage()
