"""Throughput of training: FLOPs of the present clips, model FLOPs utilisation (MFU), and peak memory."""

from __future__ import annotations

import logging
import resource
from collections.abc import Sequence

import torch

from karmma_dist.models.flops import ClipFlops, flops_per_clip
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.streaming.batch import Batch

_logger = logging.getLogger(__name__)

PEAK_TFLOPS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H800": 989.0,
    "A100": 312.0, "A800": 312.0, "A40": 149.7, "A30": 165.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "V100": 125.0,
}  # fmt: skip
"""Dense bf16 tensor-core peak (V100: fp16) in 1e12 FLOP/s, as published by the vendors, by a part of the device's name;
more specific names come first."""


def peak_tflops(device_name: str) -> float | None:
    """Return a GPU's bf16 peak in 1e12 FLOP/s by the name that torch reports; None if unknown."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAK_TFLOPS.items():
        if all(word in words for word in name.split()):
            return peak
    return None


class Throughput:
    """The FLOPs that one rank computes, and their share of the device's peak.

    Args:
        student: the model in training.
        teachers: frozen models that run in every step.
        modalities: columns of the batches' `present_BM`.
        device: this rank's device.
        precision: dtype of the model in training.
        peak: peak of the device in 1e12 FLOP/s; None: looked up by its name.
        verbose: True if this rank warns, once, that no MFU can be computed.
    """

    def __init__(
        self, student: KarmmaModel, teachers: Sequence[KarmmaModel], modalities: Sequence[str], device: torch.device,
        precision: torch.dtype, peak: float | None, verbose: bool,
    ) -> None:  # fmt: skip
        self._student = _counted(student)
        self._remembering = [m for m in student.modalities if student.recipe.encoders[m].memory is not None]
        self._teachers = [_counted(model) for model in teachers]
        self._modalities, self._device = list(modalities), device
        on_gpu = device.type == "cuda"
        if peak is None and on_gpu and precision != torch.float32:
            peak = peak_tflops(torch.cuda.get_device_name(device))
        if peak is None and on_gpu and verbose:
            _logger.warning(
                "MFU is not logged: the peak of %s in %s is unknown: set training.peak_tflops",
                torch.cuda.get_device_name(device), str(precision).removeprefix("torch."),
            )  # fmt: skip
        self._peak = peak

    def flops(self, batch: Batch) -> float:
        """Return the FLOPs of a step, without synchronising: forward and backward pass, and the teacher's forward pass,
        without what is remembered."""
        read = {modality: len(clips) for modality, clips in batch.inputs.items()}
        num_present = read | {modality: len(tokens.is_remembered_N) for modality, tokens in batch.tokens.items()}
        num_encoded = {modality: read.get(modality, 0) for modality in self._remembering}
        num_clips = len(batch.keys)
        student = self._student.training(num_present, num_clips, num_encoded)
        return float(student + (self._teaching(batch, num_present) if batch.answers_BEA is None else 0))

    def _teaching(self, batch: Batch, num_present: dict[str, int]) -> int:
        """Return the FLOPs of asking the teacher about a batch, or about all subsets of its clips' modalities."""
        if batch.dropped is None:
            return sum(teacher.teaching(num_present, len(batch.keys)) for teacher in self._teachers)
        present_BM = batch.present_BM | batch.dropped.present_BM
        columns = {name: m for m, name in enumerate(self._modalities)}
        return sum(
            teacher.all_subsets(present_BM[:, [columns[name] for name in teacher.encoders]])
            for teacher in self._teachers
        )

    def metrics(self, flops: float, seconds: float) -> dict[str, float]:
        """Return `tflops_per_s` for `flops` computed in `seconds`, and `mfu` (0 to 1) if the device's peak is known."""
        reached = flops / seconds / 1e12
        return {"tflops_per_s": reached, **({} if self._peak is None else {"mfu": reached / self._peak})}

    def peak_memory_gb(self) -> float:
        """Return this rank's peak memory in 1e9 bytes: allocated GPU memory, or the process's resident set on a CPU."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


_counted_by_architecture: dict[str, ClipFlops] = {}


def _counted(model: KarmmaModel) -> ClipFlops:
    """Return a model's FLOPs, counted once per architecture: that takes most of a short run's start."""
    settings = model.recipe.model_dump(), model.inputs.model_dump(), model.modalities, model.heads
    key = repr(settings)
    if key not in _counted_by_architecture:
        _counted_by_architecture[key] = flops_per_clip(model)
    return _counted_by_architecture[key]
