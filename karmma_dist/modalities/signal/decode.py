"""The signal decoder: stored samples -> standardised channels on their own clocks -> windows on a regular clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.modalities.contract import ArrayType, DecodeError, Decoder, StoredError, View
from karmma_dist.modalities.signal import SignalDescription, SignalInput
from karmma_dist.modalities.signal.member import SignalMember, read_member

TIME, VALUE = 0, 1
"""Places of the moments and of the samples in a decoded channel."""


class SignalDecoder(Decoder):
    """A decoder to float32 (V, channels, samples)."""

    always_whole = True

    def decode(self, data: bytes, description: SignalDescription, settings: SignalInput) -> np.ndarray:
        """Read every channel: float64 (channels, 2, T), moments in seconds of the clip above standardised samples.

        A channel with fewer samples than another repeats its last one.

        Raises:
            DecodeError: the member cannot be read, or has other sizes than declared.
            UserError: the recipe asks for another number of channels.
        """
        member = read_member(data)
        _check(member, description)
        if len(member.channels) != settings.num_channels:
            raise UserError(
                f"inputs.signal.num_channels is {settings.num_channels}, but the shards have {len(member.channels)} "
                f"channels: {description.channels}"
            )
        decoded = np.empty((len(member.channels), 2, member.num_samples))
        row = 0
        for track in member.tracks:
            num = len(track.times_T)
            for channel, values_T in zip(track.channels, track.values_CT, strict=True):
                decoded[row, TIME, :num] = track.times_T * track.tick_s - member.start_s
                decoded[row, VALUE, :num] = (values_T - channel.mean) / channel.std
                decoded[row, :, num:] = decoded[row, :, num - 1 : num]
                row += 1
        return decoded

    def cut(
        self, decoded: np.ndarray, description: SignalDescription, settings: SignalInput, views: Sequence[View],
        length_s: float,
    ) -> np.ndarray:  # fmt: skip
        """Interpolate each view's window linearly; beyond the stored samples it is 0."""
        windows = np.empty((len(views), len(decoded), settings.num_samples), np.float32)
        for window, view in zip(windows, views, strict=True):
            moments_S = window_start_s(view, length_s, settings) + np.arange(settings.num_samples) / settings.rate_hz
            for channel, (times_T, values_T) in zip(window, decoded, strict=True):
                channel[:] = np.interp(moments_S, times_T, values_T, left=0, right=0)
        return windows

    def array(self, settings: SignalInput) -> ArrayType:
        """Return the type of a window."""
        shape = (settings.num_channels, settings.num_samples)
        axes = "channels, samples; each channel with mean 0 and variance 1"
        return ArrayType(shape, "float32", axes, settings.rate_hz)

    def check(self, data: bytes, description: SignalDescription) -> None:
        """Read everything and compare sizes, length and channels."""
        member = read_member(data)
        names = ", ".join(f"{channel.name} [{channel.unit}]" for channel in member.channels)
        if (names, member.span_s) != (description.channels, description.span_s):
            declared = f"{description.channels} in {description.span_s} s"
            raise StoredError("decode", f"{names} in {member.span_s} s, declared {declared}")
        try:
            _check(member, description)
        except DecodeError as error:
            raise StoredError("length", str(error)) from None


def window_start_s(view: View, length_s: float, settings: SignalInput) -> float:
    """Return the start of a view's window, in seconds of the clip.

    The window leaves out as much of the clip before it, in proportion, as the view's moments do: at random in training,
    half in evaluation. A window that is longer than the clip lies around it in the same way.
    """
    before, after = float(view.times_F[0]), 1 - float(view.times_F[-1])
    return before / (before + after) * (length_s - settings.window_s)


def _check(member: SignalMember, description: SignalDescription) -> None:
    """Compare the sizes of a member with its description.

    Raises:
        DecodeError: they differ.
    """
    sizes = len(member.channels), member.num_samples
    if sizes != (description.num_channels, description.num_samples):
        declared = f"{description.num_samples} of {description.num_channels}"
        raise DecodeError(f"{sizes[1]} samples of {sizes[0]} channels in it, declared {declared}")


DECODER = SignalDecoder()
