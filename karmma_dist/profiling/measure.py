"""Latency and memory of real forward passes on this machine, with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.layout import input_shape
from karmma_dist.profiling.costs import Profile
from karmma_dist.profiling.memory import inference_peak
from karmma_dist.profiling.subjects import Subject
from karmma_dist.progress import Report, silent


@dataclass(frozen=True)
class _Case:
    """A model and one clip of random numbers that has a subset of its modalities."""

    model: KarmmaModel
    inputs: dict[str, Tensor]
    present_BM: Tensor

    def run(self) -> float:
        """Milliseconds of one forward pass."""
        _wait(self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            self.model(self.inputs, self.present_BM)
        _wait(self.device)
        return 1e3 * (time.perf_counter() - began)

    def peak_bytes(self) -> int:
        """Peak of inputs and activations: of CUDA's allocator, elsewhere of the tensors that operators make."""
        device = self.device
        if device.type != "cuda":
            return inference_peak(self.model, self.inputs, self.present_BM)
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run()
        inputs = sum(x.numel() * x.element_size() for x in self.inputs.values())
        return torch.cuda.max_memory_allocated(device) - before + inputs

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.inputs.values())).device


def measure(profile: Profile, subjects: Sequence[Subject], repeats: int, report: Report = silent) -> Profile:
    """The profile with its measured columns filled.

    Every row is the recipe's whole model on one clip that has the row's modalities. All rows take turns, so that what
    else the machine does meets them alike; the first pass of each warms up and is not timed.

    Args:
        profile: What was counted.
        subjects: Its models.
        repeats: Timed passes per row; their median is reported.
        report: Progress.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = {s.role: _build(s, device, dtype) for s in subjects}
    cases = [_case(models[row.model], row.modalities, device, dtype) for row in profile.rows]
    total = len(cases) * (repeats + 1)
    peaks, times = [], []
    for place, case in enumerate(cases):
        peaks.append(case.peak_bytes())
        report("measure", place + 1, total)
    for turn in range(1, repeats + 1):
        passes = []
        for place, case in enumerate(cases):
            passes.append(case.run())
            report("measure", turn * len(cases) + place + 1, total)
        times.append(passes)
    rows = [
        replace(row, latency_ms=statistics.median(of), measured_activations_bytes=peak)
        for row, of, peak in zip(profile.rows, zip(*times, strict=True), peaks, strict=True)
    ]
    return replace(profile, rows=rows, measured=_settings(device, dtype, repeats))


def _build(subject: Subject, device: torch.device, dtype: torch.dtype) -> KarmmaModel:
    model = KarmmaModel(subject.model, subject.inputs, subject.modalities, subject.heads)
    return model.to(device=device, dtype=dtype).eval()


def _case(model: KarmmaModel, subset: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> _Case:
    inputs = {m: torch.rand(1, *input_shape(m, model.inputs), dtype=dtype, device=device) for m in subset}
    return _Case(model, inputs, torch.tensor([[m in subset for m in model.modalities]]))


def _settings(device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype],
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
