"""RGB crops -> jittered, ImageNet-normalised tensors."""

from __future__ import annotations

from torch import Tensor

from karmma_dist.modalities.contract import TensorMaker
from karmma_dist.modalities.video import VideoInput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)


class VideoTensors(TensorMaker):
    """A maker of tensors (N, 3, F, crop, crop) from uint8 (N, F, crop, crop, 3)."""

    def shape(self, settings: VideoInput) -> tuple[int, ...]:
        """Return (3, F, crop, crop)."""
        return (3, settings.num_frames, settings.crop, settings.crop)

    def make(self, arrays_N: Tensor, settings: VideoInput, jitter_N3: Tensor | None) -> Tensor:
        """Change brightness, contrast, saturation, in this order, as torchvision's ColorJitter does, then normalise.

        Args:
            arrays_N: uint8 (N, F, crop, crop, 3).
            settings: `inputs.video`.
            jitter_N3: float32, factors of brightness, contrast and saturation; None for no jitter.
        """
        pixels = arrays_N.float() / 255
        if jitter_N3 is not None:
            brightness, contrast, saturation = jitter_N3[:, :, None, None, None, None].unbind(1)
            luma = pixels.new_tensor(_LUMA)
            # In place: a CPU takes four times as long if every step allocates new memory.
            pixels.mul_(brightness).clamp_(0, 1)
            mean = (pixels @ luma).mean(dim=(1, 2, 3), keepdim=True)[..., None]
            pixels.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1)
            gray = (pixels @ luma)[..., None]
            pixels.sub_(gray).mul_(saturation).add_(gray).clamp_(0, 1)
        pixels.sub_(pixels.new_tensor(IMAGENET_MEAN)).div_(pixels.new_tensor(IMAGENET_STD))
        return pixels.permute(0, 4, 1, 2, 3).contiguous()


TENSORS = VideoTensors()
