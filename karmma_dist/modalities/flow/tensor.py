"""Crops of displacements -> scaled tensors of three channels."""

from __future__ import annotations

import torch
from torch import Tensor

from karmma_dist.modalities.contract import TensorMaker
from karmma_dist.modalities.video import VideoInput
from karmma_dist.modalities.video.tensor import IMAGENET_MEAN, IMAGENET_STD

_FLOW_STD = 0.226


class FlowTensors(TensorMaker):
    """A maker of tensors (N, 3, F, crop, crop) from uint8 (N, F, crop, crop, 2): u, v and an empty channel."""

    def shape(self, settings: VideoInput) -> tuple[int, ...]:
        """Return (3, F, crop, crop)."""
        return (3, settings.num_frames, settings.crop, settings.crop)

    def make(self, arrays_N: Tensor, settings: VideoInput, jitter_N3: Tensor | None) -> Tensor:
        """Scale flow according to `VideoInput.flow_scale`; `jitter_N3` is ignored."""
        num_clips, *sizes, _ = arrays_N.shape
        channels = torch.zeros(num_clips, 3, *sizes, device=arrays_N.device)  # (N, 3, F, H, W)
        channels[:, :2] = arrays_N.permute(0, 4, 1, 2, 3)
        if settings.flow_scale == "imagenet":
            mean = channels.new_tensor(IMAGENET_MEAN)[:, None, None, None]
            std = channels.new_tensor(IMAGENET_STD)[:, None, None, None]
            return channels.div_(255).sub_(mean).div_(std)
        channels[:, :2].div_(255).sub_(0.5).div_(_FLOW_STD)
        return channels


TENSORS = FlowTensors()
