"""Latency and memory of real forward passes on this machine, with random weights.

Three figures of memory are kept apart: tensors that live at once (counted, see `memory.py`), bytes that CUDA's
allocator had given out, and bytes that it had reserved. A CPU has no such allocator.

Legend: B clips, M modalities, T tokens, D width.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import letters
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.encoders.transformer import INIT_STD
from karmma_dist.models.flops import meta_model
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.profiling.costs import DTYPES, Cost, Profile, Subject, modalities_in_block
from karmma_dist.profiling.memory import attention, fusion_peak, inference_peak
from karmma_dist.progress import Report, silent

_NO_ALLOCATOR = (
    "measured on a CPU: the allocator's peaks, allocated and reserved, are CUDA's and stay empty; what was measured as "
    "memory are live tensors"
)


@dataclass(frozen=True)
class _Case:
    """A model or its fusion block, and clips of random numbers."""

    forward: Callable[[], object]
    """Forward pass."""
    count: Callable[[], int]
    """Peak bytes of the tensors that live in a forward pass, weights left out."""
    inputs: list[Tensor]
    """What goes into it."""

    def run(self) -> float:
        """Return the milliseconds of one forward pass."""
        _wait(self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            self.forward()
        _wait(self.device)
        return 1e3 * (time.perf_counter() - began)

    def peak_bytes(self) -> int:
        """Return the peak of inputs and activations: of CUDA's allocator, elsewhere of the tensors that live."""
        device = self.device
        if device.type != "cuda":
            return self.count()
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run()
        inputs = sum(x.numel() * x.element_size() for x in self.inputs)
        return torch.cuda.max_memory_allocated(device) - before + inputs

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.inputs[0].device


def measure(
    profile: Profile, subjects: Sequence[Subject], repeats: int, report: Report = silent, precision: str | None = None
) -> Profile:
    """Fill the measured columns of a profile.

    Every row is the recipe's whole model, or its fusion block, on a batch of clips that have the row's modalities. All
    rows take turns, so that what else the machine does meets them alike; the first pass of each warms up and is not
    timed. The allocator's peaks are of another model each, which holds the row's modalities only, alone on the device.

    Args:
        profile: What was counted.
        subjects: Its models.
        repeats: Timed passes per row; their median is reported.
        report: Progress.
        precision: "fp32", "bf16" or "fp16"; None: bf16 on a GPU, fp32 on a CPU.

    Raises:
        UserError: the device has no such precision, or too little memory for the batch.
    """
    device, load = _device(), profile.workload
    require_precision(precision)
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = DTYPES[precision]
    _require_memory(profile, device, dtype)
    of_role = {subject.role: subject for subject in subjects}
    try:
        allocated = [
            allocator_peaks(row, of_role[row.model], device, dtype) if device.type == "cuda" else {}
            for row in profile.rows
        ]
        models = {role: _build(subject, load.part, device, dtype) for role, subject in of_role.items()}
        cases = [_case(row, models[row.model]) for row in profile.rows]
        peaks, medians = _take_turns(cases, repeats, report)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"profile --measure: a batch of {load.batch} in {precision} does not fit this GPU's memory: lower --batch"
        ) from error
    rows = [
        replace(row, latency_ms=median, measured_activations_bytes=peak, **found)
        for row, median, peak, found in zip(profile.rows, medians, peaks, allocated, strict=True)
    ]
    notes = profile.notes if device.type == "cuda" else [*profile.notes, _NO_ALLOCATOR]
    return replace(profile, rows=rows, notes=notes, measured=_settings(device, precision, repeats))


def require_precision(precision: str | None) -> None:
    """Check that the device that is measured computes in a precision; None: in its own.

    Raises:
        UserError: it does not.
    """
    device = _device()
    if precision is None or _computes(device, precision):
        return
    raise UserError(
        f"profile --measure: this device ({device.type}) computes no {precision}: take --precision fp32, or count "
        "without --measure"
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _computes(device: torch.device, precision: str) -> bool:
    """True if the operators that models are made of exist on the device in that precision."""
    if device.type == "cuda":
        return precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    x = torch.ones(1, 1, 2, 2, 2, dtype=DTYPES[precision], device=device)
    try:
        out = F.linear(F.conv3d(x, x), x[0, 0, 0, :1, :1])[0]
        F.scaled_dot_product_attention(out, out, out)
    except RuntimeError:  # "not implemented for 'Half'"
        return False
    return True


def _require_memory(profile: Profile, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what a CPU has no memory for before the system kills it; a GPU's allocator refuses by itself."""
    if device.type == "cuda":
        return
    row = max(profile.rows, key=lambda row: row.activations_bytes)
    needed = row.activations_bytes * dtype.itemsize // DTYPES[row.precision].itemsize
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > has:
        raise UserError(
            f"profile --measure: {row.batch} clips of {letters(row.modalities)} take {needed / 1e9:.1f} GB of "
            f"activations, and this machine has {has / 1e9:.1f} GB: lower --batch"
        )


def _take_turns(cases: list[_Case], repeats: int, report: Report) -> tuple[list[int], list[float]]:
    """Return the peak bytes and the median milliseconds of each."""
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
    return peaks, [statistics.median(of_case) for of_case in zip(*times, strict=True)]


def allocator_peaks(row: Cost, subject: Subject, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Ask CUDA's allocator what a forward pass takes of a model, or fusion block, that holds a row's modalities only.

    The peaks are the allocator's own, not differences: weights are in them, whatever libraries take from it (cuBLAS
    keeps a workspace of some MB), and all else that this process holds on the device, which should be nothing.

    Args:
        row: What to run: part, modalities and batch.
        subject: Its model.
        device: GPU.
        dtype: Precision of weights and inputs.

    Returns:
        Bytes by field of `Cost`: `peak_allocated_bytes` and `peak_reserved_bytes`, of a fusion block also unfused.
    """
    alone = replace(subject, modalities=row.modalities)
    case = _case(row, _build(alone, row.part, device, dtype))
    found = {}
    for fused in (True, False) if row.part == "fusion" else (True,):
        _wait(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        with attention(fused=fused):
            case.run()
        prefix = "" if fused else "unfused_"
        found[f"{prefix}peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        found[f"{prefix}peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return found


def _build(subject: Subject, part: str, device: torch.device, dtype: torch.dtype) -> KarmmaModel:
    """Return a model with random weights; of part "fusion" only the fusion block has any, the rest stays without."""
    if part == "model":
        with torch.device(device):
            model = KarmmaModel(subject.model, subject.inputs, subject.modalities, subject.heads)
        return model.to(device=device, dtype=dtype).eval()
    model = meta_model(subject.model, subject.inputs, subject.modalities, subject.heads).eval()
    model.fusion_block.to(dtype).to_empty(device=device)
    for parameter in model.fusion_block.parameters():
        nn.init.normal_(parameter, std=INIT_STD)
    return model


def _case(row: Cost, model: KarmmaModel) -> _Case:
    """Return a batch of random clips that have the row's modalities, for a model or its fusion block."""
    weight = model.fusion_block.cls_token if row.part == "fusion" else next(model.parameters())
    make = partial(torch.rand, dtype=weight.dtype, device=weight.device)
    if row.part == "fusion":
        block = model.fusion_block
        num_tokens = sum(model.num_tokens[m] for m in modalities_in_block(model, row.modalities))
        tokens_BTD = make(row.batch, num_tokens, model.width)
        return _Case(partial(block, tokens_BTD), partial(fusion_peak, block, tokens_BTD), [tokens_BTD])
    inputs = {m: make(row.batch, *input_shape(m, model.inputs)) for m in row.modalities}
    present_BM = torch.tensor([[m in row.modalities for m in model.modalities]] * row.batch)
    return _Case(
        partial(model, inputs, present_BM), partial(inference_peak, model, inputs, present_BM), list(inputs.values())
    )


def _settings(device: torch.device, precision: str, repeats: int) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
