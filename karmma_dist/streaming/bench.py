"""The benchmark of the training loader on a folder of shards: `karmma-dist bench loader`."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from karmma_dist.errors import UserError
from karmma_dist.progress import Report, silent
from karmma_dist.recipe import DataRecipe, InputRecipe, data_of, load_recipe
from karmma_dist.shards.remote import open_folder
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches, usable_clips
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.prefetch import on_device
from karmma_dist.streaming.worker_status import LoadStats
from karmma_dist.terminal import print_table

_BATCH_SIZE = 32
_REPLAYED = 4
"""Number of batches kept for replay."""
_PSS_EVERY_S = 0.25


@dataclass
class LoaderBench:
    """The measurements, taken after the workers' first batches."""

    shards: str
    inputs: str
    """Origin of the input settings."""
    modalities: list[str]
    drop_prob: float
    num_workers: int
    batch_size: int
    device: str
    num_batches: int
    num_clips: int
    seconds: float = 0.0
    """Seconds from the request for the first batch to the end of preparing the last."""
    wait_share: float = 0.0
    """Share of the seconds spent waiting for a batch; the rest is `prepare`."""
    clips_per_s: float = 0.0
    supply_clips_per_s: float = 0.0
    """Clips per second that the workers would make without waiting for the trainer, from the seconds per batch."""
    decode_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of decoding per clip in one worker, by modality."""
    read_mb_per_s: float = 0.0
    """Megabytes per second of one worker while it reads."""
    read_kb_per_clip: float = 0.0
    queue_depth: float = 0.0
    """Mean number of finished batches in the queue when one was requested."""
    damaged_clips: int = 0
    worker_pss_mb: list[float] = field(default_factory=list)
    """Largest proportional set size of each worker; empty if the system does not tell."""
    headspace_clips_per_s: float | None = None
    """Clips per second of preparing batches in memory on the device, without loading; None if not measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements for JSON."""
        return asdict(self)


def bench_loader(
    shards: str,
    *,
    recipe: str | None = None,
    num_workers: int | None = None,
    num_batches: int = 50,
    drop_prob: float | None = None,
    headspace: bool = False,
    report: Report = silent,
) -> LoaderBench:
    """Run the training loader over a folder, as one rank of a training run would.

    Each batch is moved to the device and prepared as in training; no model runs.

    Args:
        shards: Folder of packed shards, or its URL.
        recipe: Recipe whose inputs, modalities, dropout, batch size and workers are used; None for the dataset's own.
        num_workers: Number of workers instead of the recipe's.
        num_batches: Number of measured batches; before them each worker makes one that is not measured.
        drop_prob: Training-time drop probability instead of the recipe's.
        headspace: True to also replay batches in memory.
        report: Progress callback.

    Raises:
        UserError: the shards or the recipe do not exist, or they do not fit each other.
    """
    data, inputs, batch_size, seed, source = _settings(shards, recipe)
    if num_workers is not None:
        data = data.model_copy(update={"num_workers": num_workers})
    if drop_prob is not None:
        dropout = data.modality_dropout.model_copy(update={"probability": drop_prob})
        data = data.model_copy(update={"modality_dropout": dropout})
    folder = open_shards(data)
    batch_size = min(batch_size, len(usable_clips(folder.clips(data.train_split), data.modalities)) or 1)
    clips = TrainingClips(folder, data, inputs, seed, batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = LoaderBench(
        folder.where, source, data.modalities, data.modality_dropout.probability, data.num_workers, batch_size,
        device.type, num_batches, num_batches * batch_size,
    )  # fmt: skip
    kept = _measure(clips, inputs, device, result, report)
    if headspace:
        result.headspace_clips_per_s = _replay(kept, inputs, device, num_batches)
    return result


def _settings(shards: str, recipe: str | None) -> tuple[DataRecipe, InputRecipe, int, int, str]:
    """Return data, inputs, batch size, seed and origin: of `recipe`, else of the dataset's recipe if it fits.

    If that does not fit the shards, they are the defaults.
    """
    overrides = [f"data.shards={json.dumps(shards)}", "data.mixture={}"]
    if recipe is not None:
        loaded = load_recipe(recipe, overrides)
        return loaded.data, loaded.inputs, loaded.training.batch_size, loaded.seed, f"recipe {recipe}"
    folder = open_folder(data_of(shards))
    name = f"{folder.manifest.header.dataset}/distill"
    try:
        loaded = load_recipe(name, overrides)
        if set(loaded.data.modalities) <= set(folder.modalities):
            return loaded.data, loaded.inputs, loaded.training.batch_size, loaded.seed, f"recipe {name}"
        reason = f"recipe {name} needs {', '.join(loaded.data.modalities)}"
    except UserError as error:
        reason = str(error).partition(";")[0]
    data = data_of(shards, folder.modalities)
    return data, InputRecipe(), _BATCH_SIZE, 0, f"default inputs ({reason})"


def _measure(
    clips: TrainingClips, inputs: InputRecipe, device: torch.device, result: LoaderBench, report: Report
) -> list[Batch]:
    """Fill in the result and return the last few batches, as they left the loader."""
    num_workers, num_batches = result.num_workers, result.num_batches
    schedule = Schedule(len(clips.clips), result.batch_size)
    num_warm = max(num_workers, 1)
    epochs = -(-(num_warm + num_batches) // schedule.steps_per_epoch)
    kept: list[Batch] = []
    stats: list[LoadStats] = []
    damaged: set[str] = set()
    loader = training_batches(clips, schedule, 0, Position(0, 0), epochs)
    memory = _Memory(loader.worker_pids)
    waited = 0.0
    with on_device(loader, device) as batches:
        for batch in itertools.islice(batches, num_warm):
            prepare(batch, inputs, device)
        _finish(device)
        began = time.perf_counter()
        for number in range(num_batches):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            prepare(batch, inputs, device)
            stats.append(batch.stats)
            damaged |= {event.key for event in batch.damage}
            kept = [*kept, batch][-_REPLAYED:]
            memory.sample()
            report("bench loader", number + 1, num_batches)
        _finish(device)
        result.seconds = time.perf_counter() - began
    result.wait_share = waited / result.seconds
    result.clips_per_s = result.num_clips / result.seconds
    result.damaged_clips = len(damaged)
    result.worker_pss_mb = memory.peaks_mb()
    _sum_up(result, stats)
    return kept


def _sum_up(result: LoaderBench, stats: list[LoadStats]) -> None:
    for modality in result.modalities:
        seconds = sum(cost.decode_s.get(modality, 0.0) for cost in stats)
        num = sum(cost.clips_decoded.get(modality, 0) for cost in stats)
        if num:
            result.decode_ms[modality] = 1000 * seconds / num
    num_bytes, read_s = sum(cost.bytes_read for cost in stats), sum(cost.read_s for cost in stats)
    result.read_mb_per_s = num_bytes / 1e6 / read_s if read_s else 0.0
    result.read_kb_per_clip = num_bytes / 1e3 / result.num_clips
    result.supply_clips_per_s = result.num_clips * max(result.num_workers, 1) / sum(cost.load_s for cost in stats)
    result.queue_depth = sum(cost.queue_depth for cost in stats) / len(stats)


def _replay(kept: list[Batch], inputs: InputRecipe, device: torch.device, num_batches: int) -> float:
    """Return the clips per second of preparing batches in memory."""
    began = time.perf_counter()
    num_clips = 0
    for batch in itertools.islice(itertools.cycle(kept), num_batches):
        prepare(batch, inputs, device)
        num_clips += len(batch.keys)
    _finish(device)
    return num_clips / (time.perf_counter() - began)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Memory:
    """The largest observed proportional set size of each process, from /proc if it exists."""

    def __init__(self, pids: list[int]) -> None:
        self._peaks = dict.fromkeys(pids, 0)
        self._sampled = 0.0

    def sample(self) -> None:
        """Sample all processes, unless the last sample is recent."""
        if time.monotonic() - self._sampled < _PSS_EVERY_S:
            return
        for pid, peak in self._peaks.items():
            self._peaks[pid] = max(peak, _pss_kb(pid))
        self._sampled = time.monotonic()

    def peaks_mb(self) -> list[float]:
        """Return the peak of each process that could be sampled, in megabytes."""
        return [peak * 1024 / 1e6 for peak in self._peaks.values() if peak]


def _pss_kb(pid: int) -> int:
    """Return a process's proportional set size in KiB; 0 if the system does not tell or the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def print_loader_bench(result: LoaderBench) -> None:
    """Print the result as a table."""
    rows = [
        ("waiting for the loader", f"{100 * result.wait_share:.0f} % of {result.seconds:.1f} s"),
        ("workers alone, never waiting", f"{result.supply_clips_per_s:,.1f} clips/s"),
        ("batches ready on request", f"{result.queue_depth:.1f}"),
        *((f"decoding {modality}", f"{ms:.1f} ms per clip") for modality, ms in result.decode_ms.items()),
        ("reading, one worker", f"{result.read_mb_per_s:,.0f} MB/s, {result.read_kb_per_clip:,.0f} KB per clip"),
    ]
    if result.worker_pss_mb:
        rows.append(("memory per worker", f"{max(result.worker_pss_mb):,.0f} MB (largest peak PSS)"))
    rows.append(("damaged clips", f"{result.damaged_clips}"))
    footer = [
        f"{result.num_batches} batches of {result.batch_size}, {', '.join(result.modalities)}, drop probability "
        f"{result.drop_prob:g}, {result.num_workers} workers, {result.device}; {result.inputs}"
    ]
    if result.headspace_clips_per_s is not None:
        rows.append(("preparing alone, no loading", f"{result.headspace_clips_per_s:,.1f} clips/s"))
        footer.append("preparing alone: normalising and spectrograms of batches in memory; no model runs")
    title = f"{result.shards}: {result.clips_per_s:,.1f} clips/s"
    print_table(["loader", "measured"], rows, right=["measured"], title=title, footer=footer)
