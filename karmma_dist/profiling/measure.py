"""Latency and memory of real forward passes on this machine, with random weights.

Three figures of memory are reported: peak bytes of live tensors (counted, see `memory.py`), peak bytes allocated by
CUDA's allocator, and peak bytes reserved by it. A CPU has no such allocator.

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
from karmma_dist.profiling.costs import DTYPES, Cost, Profile, ProfiledModel, modalities_in_block
from karmma_dist.profiling.memory import attention, fusion_peak, inference_peak
from karmma_dist.progress import Report, silent

_NO_ALLOCATOR = (
    "measured on a CPU: only CUDA's allocator reports peaks, allocated and reserved, so they stay empty; the measured "
    "memory is that of live tensors"
)


@dataclass(frozen=True)
class _Case:
    """A model or its fusion block, with a random input batch."""

    forward: Callable[[], object]
    """Function that runs the forward pass."""
    count: Callable[[], int]
    """Function that returns the peak bytes of live tensors in a forward pass, without weights."""
    inputs: list[Tensor]
    """Input tensors of the forward pass."""

    def run(self) -> float:
        """Return the milliseconds of one forward pass."""
        _wait(self.device)
        began = time.perf_counter()
        with torch.inference_mode():
            self.forward()
        _wait(self.device)
        return 1e3 * (time.perf_counter() - began)

    def peak_bytes(self) -> int:
        """Return the peak bytes of inputs and activations: from CUDA's allocator, or on a CPU of live tensors."""
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
        """Device of the forward pass."""
        return self.inputs[0].device


def measure(
    profile: Profile,
    profiled_models: Sequence[ProfiledModel],
    repeats: int,
    progress: Report = silent,
    precision: str | None = None,
) -> Profile:
    """Fill the measured columns of a profile.

    Latency is measured on the recipe's whole model, or its fusion block, with a batch of clips that have the row's
    modalities. All rows take turns, so that other load of the machine affects them equally; the first pass of each row
    is a warm-up and is not timed. The allocator's peaks are measured on a separate model per row, which holds only the
    row's modalities and is alone on the device.

    Args:
        profile: Counted profile.
        profiled_models: Models of the profile.
        repeats: Timed passes per row; their median is reported.
        progress: Callback for progress.
        precision: "fp32", "bf16" or "fp16"; None: bf16 on a GPU, fp32 on a CPU.

    Raises:
        UserError: the device does not compute in this precision, or has too little memory for the batch.
    """
    device, load = _device(), profile.workload
    require_precision(precision)
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = DTYPES[precision]
    _require_memory(profile, device, dtype)
    models_by_role = {profiled.role: profiled for profiled in profiled_models}
    try:
        allocated = [
            allocator_peaks(row, models_by_role[row.model], device, dtype) if device.type == "cuda" else {}
            for row in profile.rows
        ]
        models = {role: _build(profiled, load.part, device, dtype) for role, profiled in models_by_role.items()}
        cases = [_case(row, models[row.model]) for row in profile.rows]
        peaks, medians = _take_turns(cases, repeats, progress)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"profile --measure: a batch of {load.batch} in {precision} does not fit this GPU's memory: lower --batch"
        ) from error
    rows = [
        replace(row, latency_ms=median, measured_activations_bytes=peak, **allocator)
        for row, median, peak, allocator in zip(profile.rows, medians, peaks, allocated, strict=True)
    ]
    notes = profile.notes if device.type == "cuda" else [*profile.notes, _NO_ALLOCATOR]
    return replace(profile, rows=rows, notes=notes, measured=_settings(device, precision, repeats))


def require_precision(precision: str | None) -> None:
    """Check that the measured device computes in a precision; None, its default precision, always passes.

    Raises:
        UserError: the device does not compute in this precision.
    """
    device = _device()
    if precision is None or _computes(device, precision):
        return
    raise UserError(
        f"profile --measure: this device ({device.type}) does not compute in {precision}: use --precision fp32, "
        "or count without --measure"
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _computes(device: torch.device, precision: str) -> bool:
    """Return True if the device has the operators of the models in that precision."""
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
    """Refuse a batch that does not fit a CPU's memory, before the system kills the process.

    A GPU's allocator raises an error by itself.
    """
    if device.type == "cuda":
        return
    row = max(profile.rows, key=lambda row: row.activations_bytes)
    needed = row.activations_bytes * dtype.itemsize // DTYPES[row.precision].itemsize
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise UserError(
            f"profile --measure: {row.batch} clips of {letters(row.modalities)} take {needed / 1e9:.1f} GB of "
            f"activations, and this machine has {available / 1e9:.1f} GB: lower --batch"
        )


def _take_turns(cases: list[_Case], repeats: int, progress: Report) -> tuple[list[int], list[float]]:
    """Return the peak bytes and the median milliseconds of each case."""
    total = len(cases) * (repeats + 1)
    peaks, times = [], []
    for index, case in enumerate(cases):
        peaks.append(case.peak_bytes())
        progress("measure", index + 1, total)
    for turn in range(1, repeats + 1):
        passes = []
        for index, case in enumerate(cases):
            passes.append(case.run())
            progress("measure", turn * len(cases) + index + 1, total)
        times.append(passes)
    return peaks, [statistics.median(case_times) for case_times in zip(*times, strict=True)]


def allocator_peaks(row: Cost, profiled: ProfiledModel, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Measure the allocator's peaks in a forward pass of a model, or fusion block, that holds only a row's modalities.

    The peaks are totals, not differences: they include weights, the workspaces of libraries (a few MB for cuBLAS), and
    everything else that this process holds on the device, which should be nothing.

    Args:
        row: Row whose part, modalities and batch are run.
        profiled: Model of the row.
        device: GPU to run on.
        dtype: Precision of weights and inputs.

    Returns:
        Bytes by field of `Cost`: `peak_allocated_bytes` and `peak_reserved_bytes`, for a fusion block also unfused.
    """
    alone = replace(profiled, modalities=row.modalities)
    case = _case(row, _build(alone, row.part, device, dtype))
    peaks = {}
    for fused in (True, False) if row.part == "fusion" else (True,):
        _wait(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        with attention(fused=fused):
            case.run()
        prefix = "" if fused else "unfused_"
        peaks[f"{prefix}peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        peaks[f"{prefix}peak_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    return peaks


def _build(profiled: ProfiledModel, part: str, device: torch.device, dtype: torch.dtype) -> KarmmaModel:
    """Return a model with random weights; for part "fusion" only the fusion block has weights."""
    if part == "model":
        with torch.device(device):
            model = KarmmaModel(profiled.model, profiled.inputs, profiled.modalities, profiled.heads)
        return model.to(device=device, dtype=dtype).eval()
    model = meta_model(profiled.model, profiled.inputs, profiled.modalities, profiled.heads).eval()
    model.fusion_block.to(dtype).to_empty(device=device)
    for parameter in model.fusion_block.parameters():
        nn.init.normal_(parameter, std=INIT_STD)
    return model


def _case(row: Cost, model: KarmmaModel) -> _Case:
    """Return a model or its fusion block with a batch of random clips that have the row's modalities."""
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
