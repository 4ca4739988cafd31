"""Signals in contact sheets: a line per channel, those of one unit in one frame."""

from __future__ import annotations

from matplotlib.axes import Axes

from karmma_dist.modalities.contract import Drawing, Sheet
from karmma_dist.modalities.signal import SignalDescription
from karmma_dist.modalities.signal.member import Channel, Track, read_member
from karmma_dist.terminal import harmless

_MOST_FRAMES = 3
"""Units that are drawn; further ones would be too small to read."""
_LEFT, _BOTTOM, _GAP = 0.14, 0.12, 0.08
"""Margins as fractions of the cell."""


class SignalDrawing(Drawing):
    """A drawing of a clip's channels over its seconds, in their units."""

    title = "signal: channels by unit"

    def draw(self, axis: Axes, data: bytes, description: SignalDescription, sheet: Sheet) -> None:
        """Draw the channels as they are stored."""
        axis.axis("off")
        member = read_member(data)
        frames: dict[tuple[str, str], list[tuple[Channel, Track, int]]] = {}
        for track in member.tracks:
            for row, channel in enumerate(track.channels):
                frames.setdefault((channel.word, channel.unit), []).append((channel, track, row))
        num = min(len(frames), _MOST_FRAMES)
        height = (1 - _BOTTOM - _GAP * (num - 1)) / num
        for number, ((word, unit), lines) in enumerate(list(frames.items())[:num]):
            inset = axis.inset_axes((_LEFT, 1 - (number + 1) * height - number * _GAP, 1 - _LEFT, height))
            for channel, track, row in lines:
                times_s = track.times_T * track.tick_s - member.start_s
                inset.plot(times_s, track.values_CT[row], linewidth=0.6, label=_plain(channel.name))
            inset.set_xlim(0, member.span_s)
            inset.set_ylabel(_plain(f"{word}\n{unit}"), fontsize=6)
            inset.tick_params(labelsize=6, pad=1, length=2)
            inset.legend(fontsize=5, loc="upper right", frameon=False, ncols=3, handlelength=1)
            inset.xaxis.set_major_formatter("{x:g} s")
            if number < num - 1:
                inset.set_xticklabels([])


def _plain(text: str) -> str:
    """Return a text without control characters, in which dollar signs start no formula."""
    return "\n".join(harmless(line) for line in text.split("\n")).replace("$", r"\$")


DRAWING = SignalDrawing()
