"""The batch: identical in structure on every rank and step, tensors of the clips that are there only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from karmma_dist.recipe import InputRecipe
from karmma_dist.streaming.decode import ClipSound
from karmma_dist.streaming.spectrogram import mel_spectrogram
from karmma_dist.streaming.worker_status import LoadStats

UNLABELLED = -1
"""Label of a clip whose split carries none."""

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_FLOW_STD = 0.226
_LUMA = (0.299, 0.587, 0.114)


@dataclass
class Damage:
    """One member that was declared and could not be read or decoded."""

    shard: str
    key: str
    member: str
    what: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.shard}: clip {self.key}: {self.member}: {self.what}"


@dataclass
class Sample:
    """One decoded clip: arrays of the modalities it brings, all others absent."""

    key: str
    labels: dict[str, int | None]
    arrays: dict[str, np.ndarray]
    jitter_3: np.ndarray
    sound: ClipSound | None = None
    """The whole sound that its windows are cut from, where it is asked for."""


@dataclass
class Batch:
    """B clips. As it leaves the loader the inputs are uint8 / int16; `prepare` makes them what models take."""

    keys: list[str]
    """Clip keys, "" for padding."""
    present_BM: Tensor
    """bool, True = there; columns in the order of the recipe's modalities."""
    inputs: dict[str, Tensor]
    """Per modality the present clips only, in batch order; a modality nobody has is left out."""
    labels: dict[str, Tensor]
    """Per head int64 (B,), -1 where unlabelled."""
    valid_B: Tensor
    """bool, False = padding in evaluation."""
    jitter_N3: Tensor | None
    """float32, colour jitter of the clips of inputs["video"]; None where none is jittered."""
    epoch: int = 0
    step: int = 0
    damage: list[Damage] = field(default_factory=list)
    """What was found unreadable while this batch was put together."""
    stats: LoadStats = field(default_factory=LoadStats)
    """What it cost its worker."""
    sounds: list[ClipSound] = field(default_factory=list)
    """The whole sounds of the clips of inputs["audio"], where they are asked for."""

    def tensors(self) -> list[Tensor]:
        """Every tensor that `map` changes."""
        jitter = [] if self.jitter_N3 is None else [self.jitter_N3]
        return [*jitter, *self.inputs.values(), *self.labels.values()]

    def only(self, modalities: Sequence[str], columns: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs and present_BM of some modalities, for a model that takes no others.

        Args:
            modalities: Those of the model, in its order.
            columns: Those of `present_BM`.
        """
        if list(modalities) == list(columns):
            return self.inputs, self.present_BM
        inputs = {m: x for m, x in self.inputs.items() if m in modalities}
        return inputs, self.present_BM[:, [list(columns).index(m) for m in modalities]]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to every tensor but `present_BM` and `valid_B`.

        These decide what is run: they stay where they are, on the CPU, so that nothing waits for a device to know them.
        """
        return replace(
            self,
            inputs={name: change(tensor) for name, tensor in self.inputs.items()},
            labels={head: change(label) for head, label in self.labels.items()},
            jitter_N3=None if self.jitter_N3 is None else change(self.jitter_N3),
        )


def collate(
    samples: Sequence[Sample | None], modalities: Sequence[str], heads: Sequence[str], epoch: int = 0, step: int = 0
) -> Batch:
    """Put samples together; None is padding (no modality, no label, not valid)."""
    present = [[sample is not None and m in sample.arrays for m in modalities] for sample in samples]
    inputs = {}
    for modality in modalities:
        arrays = [sample.arrays[modality] for sample in samples if sample is not None and modality in sample.arrays]
        if arrays:
            inputs[modality] = torch.from_numpy(np.stack(arrays))
    labels = {
        head: torch.tensor([_label(sample, head) for sample in samples], dtype=torch.int64) for head in heads
    }
    jitter = [sample.jitter_3 for sample in samples if sample is not None and "video" in sample.arrays]
    is_jittered = any((factors_3 != 1).any() for factors_3 in jitter)
    return Batch(
        keys=["" if sample is None else sample.key for sample in samples],
        present_BM=torch.tensor(present, dtype=torch.bool).reshape(len(samples), len(modalities)),
        inputs=inputs,
        labels=labels,
        valid_B=torch.tensor([sample is not None for sample in samples]),
        jitter_N3=torch.from_numpy(np.stack(jitter)) if is_jittered else None,
        epoch=epoch,
        step=step,
        sounds=[sample.sound for sample in samples if sample is not None and sample.sound is not None],
    )


def _label(sample: Sample | None, head: str) -> int:
    label = None if sample is None else sample.labels.get(head)
    return UNLABELLED if label is None else label


def prepare(
    batch: Batch, inputs: InputRecipe, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Batch:
    """Move a batch to `device` and turn raw pixels and samples into the normalised floats models take.

    video: (N, F, H, W, 3) uint8 -> (N, 3, F, H, W), jittered, ImageNet-normalised. flow: (N, F, H, W, 2) uint8 ->
    (N, 3, F, H, W), scaled as `VideoInput.flow_scale` says. audio: int16 windows -> mel spectrograms. All of it is
    computed in float32 and then cast to `dtype`, the model's precision.
    """
    moved = batch.map(lambda tensor: tensor.to(device, non_blocking=True))
    made = dict(moved.inputs)
    if "video" in made:
        made["video"] = _normalise_video(made["video"], moved.jitter_N3)
    if "flow" in made:
        made["flow"] = _normalise_flow(made["flow"], inputs.video.flow_scale)
    if "audio" in made:
        made["audio"] = mel_spectrogram(made["audio"], inputs.audio.num_mels)
    return replace(moved, inputs={name: tensor.to(dtype) for name, tensor in made.items()})


def _normalise_video(video: Tensor, jitter_N3: Tensor | None) -> Tensor:
    """Brightness, contrast and saturation as in torchvision's ColorJitter (in this order), then ImageNet statistics."""
    pixels = video.float() / 255  # (N, F, H, W, 3)
    if jitter_N3 is not None:
        brightness, contrast, saturation = jitter_N3[:, :, None, None, None, None].unbind(1)
        luma = pixels.new_tensor(_LUMA)
        # In place: a CPU takes four times as long where every step asks for new memory.
        pixels.mul_(brightness).clamp_(0, 1)
        mean = (pixels @ luma).mean(dim=(1, 2, 3), keepdim=True)[..., None]
        pixels.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1)
        gray = (pixels @ luma)[..., None]
        pixels.sub_(gray).mul_(saturation).add_(gray).clamp_(0, 1)
    pixels.sub_(pixels.new_tensor(_IMAGENET_MEAN)).div_(pixels.new_tensor(_IMAGENET_STD))
    return pixels.permute(0, 4, 1, 2, 3).contiguous()


def _normalise_flow(flow: Tensor, scale: Literal["centred", "imagenet"]) -> Tensor:
    num, *sizes, _ = flow.shape
    channels = torch.zeros(num, 3, *sizes, device=flow.device)  # (N, 3, F, H, W)
    channels[:, :2] = flow.permute(0, 4, 1, 2, 3)
    if scale == "imagenet":
        mean, std = (channels.new_tensor(of)[:, None, None, None] for of in (_IMAGENET_MEAN, _IMAGENET_STD))
        return channels.div_(255).sub_(mean).div_(std)
    channels[:, :2].div_(255).sub_(0.5).div_(_FLOW_STD)
    return channels
