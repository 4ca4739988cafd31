"""Windows of signals -> tensors, unchanged."""

from __future__ import annotations

from torch import Tensor

from karmma_dist.modalities.contract import TensorMaker
from karmma_dist.modalities.signal import SignalInput


class SignalTensors(TensorMaker):
    """A maker of tensors (N, channels, samples) from float32 (N, channels, samples)."""

    def shape(self, settings: SignalInput) -> tuple[int, ...]:
        """Return (channels, samples)."""
        return (settings.num_channels, settings.num_samples)

    def make(self, arrays_N: Tensor, settings: SignalInput, jitter_N3: Tensor | None) -> Tensor:
        """Return the windows unchanged."""
        return arrays_N.float()


TENSORS = SignalTensors()
