"""Boxes -> tensors, unchanged."""

from __future__ import annotations

from torch import Tensor

from karmma_dist.modalities.contract import TensorMaker
from karmma_dist.modalities.detections import NUM_VALUES, DetectionsInput


class DetectionsTensors(TensorMaker):
    """A maker of tensors (N, F, boxes, 6) from float32 (N, F, boxes, 6)."""

    def shape(self, settings: DetectionsInput) -> tuple[int, ...]:
        """Return (F, boxes, 6)."""
        return (settings.num_frames, settings.max_boxes, NUM_VALUES)

    def make(self, arrays_N: Tensor, settings: DetectionsInput, jitter_N3: Tensor | None) -> Tensor:
        """Return the boxes unchanged."""
        return arrays_N.float()


TENSORS = DetectionsTensors()
