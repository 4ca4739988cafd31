"""What a training step costs: absent modalities skipped against masked, the loop against its bare steps, and a GPU.

    python tests/benchmarks/training.py [--arms skip,loop,gpu] [--repeats N] [--threads N] [--peak-tflops X]

skip   a distillation step at modality dropout 0.5 (stratified, batch 8) with encoders run on present clips only,
       against the same step with every encoder on all clips and absent tokens masked; Swin-B teachers, Swin-T and
       AST-T students, short clips of few pixels. Both ways give the same logits, which is checked first.
loop   `Trainer`, from one batch to the next with preparing, averages and logging, against the forwards, backward and
       optimizer step of the same batches, in blocks in turn.
gpu    recipes/epic_kitchens/distill.yaml with random weights on synthetic clips at batch sizes 4, 8, 16, 32: clips/s,
       share of the GPU's peak, memory. Skipped without CUDA.

Arms run in turn in one process; medians and ratios are printed. Without CUDA seconds are of CPU time, on one thread.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from karmma_dist.distributed.collectives import highest
from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import World, find_world
from karmma_dist.evaluation.run import validate
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.recipe import DistillRecipe, ModelRecipe, Recipe, load_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.dropout import keep_patterns, keep_present
from karmma_dist.streaming.loader import TrainingClips
from karmma_dist.streaming.order import Slice
from karmma_dist.training import trainer as loop
from karmma_dist.training.engine import Engine
from karmma_dist.training.fault_tolerance.preemption import PreemptionHandler
from karmma_dist.training.objectives import Distillation, SoftTargets

SHORT_CLIPS = ["inputs.video.num_frames=8", "inputs.video.short_side=56", "inputs.video.crop=56",
               "inputs.audio.num_windows=8"]  # fmt: skip
HEADS = {"verb": 97, "noun": 300}
GPU_BATCH_SIZES = (4, 8, 16, 32)
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A40": 149.7, "V100": 125.0}
"""Dense bf16 (V100: fp16) tensor-core peaks by part of the device's name, from the makers' data sheets."""
BLOCK = 10
"""Steps of an arm before the other has its turn."""


def epic_recipe(*overrides: str) -> Recipe:
    """The published student's recipe with random starting weights."""
    without = [f"model.encoders.{m}.weights=null" for m in ("video", "flow")]
    return load_recipe("epic_kitchens/distill", ["data.modality_dropout.draw=stratified", *without, *overrides])


def make_teacher(recipe: Recipe) -> KarmmaModel:
    """The published teacher with random weights, frozen."""
    published = load_recipe("epic_kitchens/teacher").model
    model = ModelRecipe.model_validate(
        {**published.model_dump(), "encoders": {
            m: {**e.model_dump(), "weights": None} for m, e in published.encoders.items()
        }}
    )  # fmt: skip
    return KarmmaModel(model, recipe.inputs, recipe.data.modalities, HEADS).requires_grad_(False).eval()


def synthetic_batch(recipe: Recipe, size: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Batch:
    """A prepared batch of random clips that had everything before modality dropout."""
    modalities = recipe.data.modalities
    kept = keep_patterns(size, len(modalities), recipe.data.modality_dropout, seed, epoch=0)
    everything = kept | True
    rows = [keep_present(keep, there, place) for place, (keep, there) in enumerate(zip(kept, everything, strict=True))]
    present_BM = torch.tensor([row.tolist() for row in rows])
    torch.manual_seed(seed)
    inputs = {
        m: torch.randn(num, *input_shape(m, recipe.inputs), device=device, dtype=dtype)
        for m, num in zip(modalities, present_BM.sum(dim=0).tolist(), strict=True)
        if num
    }
    labels = {head: torch.randint(0, num, (size,), device=device) for head, num in HEADS.items()}
    valid_B = torch.ones(size, dtype=torch.bool)
    return Batch([f"clip_{row}" for row in range(size)], present_BM, inputs, labels, valid_B, None)


class Dense(nn.Module):
    """The same model computed the usual way: every encoder sees all clips, and what is absent is masked afterwards."""

    def __init__(self, model: KarmmaModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """As `KarmmaModel.forward`; absent inputs are zeros."""
        whole = {}
        for place, modality in enumerate(self.model.modalities):
            given = inputs[modality]
            whole[modality] = given.new_zeros(len(present_BM), *given.shape[1:])
            whole[modality][present_BM[:, place]] = given
        everything = torch.ones_like(present_BM)
        return self.model.fuse(self.model.encode(whole, everything), everything, keep_BM=present_BM)


def targets_of(teacher: nn.Module, recipe: DistillRecipe) -> SoftTargets:
    """Return the soft targets of one model, or of one that is called like it."""

    def soft_targets(batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            logits = teacher(batch.inputs, batch.present_BM)
        return {head: (logits_BC.float() / recipe.temperature).log_softmax(-1) for head, logits_BC in logits.items()}

    return soft_targets


def bench_skip(repeats: int) -> None:
    """Present clips only against dense and masked."""
    recipe = epic_recipe("training.batch_size=8", *SHORT_CLIPS)
    assert recipe.distill is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    student = KarmmaModel(recipe.model, recipe.inputs, recipe.data.modalities, HEADS).to(device)
    teacher = make_teacher(recipe).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    batch = synthetic_batch(recipe, 8, device, torch.float32)
    arms: dict[str, tuple[nn.Module, Distillation]] = {
        "present clips only": (student, Distillation(recipe.distill, targets_of(teacher, recipe.distill))),
        "dense, masked": (Dense(student), Distillation(recipe.distill, targets_of(Dense(teacher), recipe.distill))),
    }
    _check_same(arms, student, batch)
    steps = {name: partial(plain_step, *arm, optimizer, batch) for name, arm in arms.items()}
    seconds = seconds_in_turn(steps, repeats, device)
    share = float(batch.present_BM.float().mean())
    print(f"distillation step, batch 8, {share:.0%} of (clip, modality) pairs present, {repeats} repeats in turn")
    print_ratio(seconds, "present clips only", "dense, masked")


def _check_same(arms: dict[str, tuple[nn.Module, Distillation]], student: nn.Module, batch: Batch) -> None:
    student.eval()
    with torch.no_grad():
        one, other = (model(batch.inputs, batch.present_BM) for model, _ in arms.values())
    for head in one:
        torch.testing.assert_close(one[head], other[head], atol=1e-4, rtol=1e-4)
    student.train()


def plain_step(model: nn.Module, objective: Distillation, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    loss, _ = objective.loss(model(batch.inputs, batch.present_BM), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _now(device: torch.device) -> float:
    """Seconds of the clock once the device is done; on a CPU those of this process, whatever else runs beside it."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _timed(work: Callable[[], object], device: torch.device) -> float:
    started = _now(device)
    work()
    return _now(device) - started


def seconds_in_turn(
    steps: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each repeat of each step, taken in turn; a first one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            took = _timed(step, device)
            if repeat:
                seconds[name].append(took)
    return seconds


def print_ratio(seconds: dict[str, list[float]], ours: str, base: str) -> None:
    for name, values in seconds.items():
        spread = f"min {min(values):.3f}, max {max(values):.3f}"
        print(f"  {name:24} median {statistics.median(values):8.3f} s  ({spread})")
    ratios = [a / b for a, b in zip(seconds[ours], seconds[base], strict=True)]
    print(
        f"  {ours} / {base}: {statistics.median(seconds[ours]) / statistics.median(seconds[base]):.3f} of medians, "
        f"{statistics.median(ratios):.3f} median of pairs"
    )


class InTurn(Iterator[Batch]):
    """Gives the trainer batches and, after every block of them, makes the same steps without the trainer.

    The time between two batches is the trainer's; the bare steps are made, and timed, while it waits for a batch.
    """

    def __init__(self, trainer: loop.Trainer, raw: list[Batch]) -> None:
        self.trainer, self.raw = trainer, raw
        recipe, engine = trainer.recipe, trainer.engine
        self.prepared = [prepare(batch, recipe.inputs, engine.device, engine.dtype) for batch in raw]
        self.seconds: dict[str, list[float]] = {"loop": [], "bare steps": []}
        self._given = 0
        self._block_began = 0.0

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __next__(self) -> Batch:
        if self._given % BLOCK == 0:
            device = self.trainer.engine.device
            if self._given:
                self.seconds["loop"].append((_now(device) - self._block_began) / BLOCK)
            self.seconds["bare steps"].append(_timed(self._bare_block, device) / BLOCK)
            self._block_began = _now(device)
        self._given += 1
        return self.raw[self._given % len(self.raw)]

    def _bare_block(self) -> None:
        engine, objective = self.trainer.engine, self.trainer.objective
        for place in range(1, BLOCK + 1):
            batch = self.prepared[place % len(self.prepared)]
            loss, _ = objective.loss(engine.forward(batch.inputs, batch.present_BM), batch)
            engine.backward(loss)
            engine.step(1e-6)


def bench_loop(repeats: int, world: World) -> None:
    """The trainer against its bare steps."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_kitchen(folder / "raw", seed=0, train_recordings=3, validation_recordings=1, clips_per_recording=27)
        spec = load_spec("demo", raw=str(folder / "raw"), out=str(folder / "shards"))
        pack(spec)
        recipe = _loop_recipe(folder, repeats)
        shards = ShardFolder(folder / "shards")
        undisturbed = PreemptionHandler(world.rank, None, highest)
        clips = TrainingClips(shards, recipe.data, recipe.inputs, recipe.seed, 8)
        trainer = loop.Trainer(recipe, world, clips, validate, lambda *_: None, undisturbed, None)
        in_turn = InTurn(trainer, [clips.batch(Slice(0, step, step * 8, step * 8 + 8)) for step in range(BLOCK)])
        recipe.run_dir.mkdir(parents=True)
        with (
            mock.patch.object(loop, "training_batches", return_value=in_turn),
            mock.patch.object(loop, "on_device", _as_it_is),
        ):
            trainer.run()
    seconds = {name: values[1 : repeats + 1] for name, values in in_turn.seconds.items()}
    print(f"training loop, batch 8, logging every {BLOCK} steps, seconds per step, {repeats} blocks of {BLOCK} in turn")
    print_ratio(seconds, "loop", "bare steps")
    extra = [1000 * (a - b) for a, b in zip(seconds["loop"], seconds["bare steps"], strict=True)]
    print(f"  the loop adds {statistics.median(extra):.1f} ms to a step")


@contextmanager
def _as_it_is(batches: InTurn, _device: torch.device) -> Iterator[InTurn]:
    yield batches


def _loop_recipe(folder: Path, repeats: int) -> Recipe:
    """A student without a teacher whose step takes about a tenth of a second on a CPU core."""
    swin: dict[str, Any] = {"name": "swin3d_small", "options": {"width": 48, "depths": [1, 1, 2]}}
    small = {"name": "small_audio"}
    return Recipe.model_validate(
        {
            "name": "loop", "runs_dir": str(folder / "runs"), "stage": "supervised",
            "data": {"shards": str(folder / "shards"), "modality_dropout": {"probability": 0.5}, "num_workers": 0},
            "inputs": {
                "video": {"num_frames": 8, "short_side": 56, "crop": 56},
                "audio": {"num_windows": 1, "window_s": 1.0, "num_mels": 64},
            },
            "model": {"encoders": {"video": swin, "flow": swin, "audio": small}},
            "optimizer": {"warmup_epochs": 0},
            "training": {
                "epochs": repeats + 2, "batch_size": 8, "log_every_steps": BLOCK, "validate_every_epochs": 0,
                "checkpoint_every_epochs": repeats + 2, "threads": torch.get_num_threads(),
            },
        }
    )  # fmt: skip


def bench_gpu(repeats: int, world: World, peak_tflops: float | None, batch_sizes: tuple[int, ...]) -> None:
    """Throughput, share of the peak and memory of the published distillation on one GPU."""
    if not torch.cuda.is_available():
        print("gpu: skipped, no CUDA here")
        return
    name = torch.cuda.get_device_name()
    known = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    peak = peak_tflops or known
    print(f"epic_kitchens/distill on {name}, bf16, random weights, synthetic clips, median of {repeats} steps")
    print(f"  {'batch':>5} {'s/step':>8} {'clips/s':>8} {'TFLOPs/step':>11} {'of peak':>8} {'GiB':>6}")
    for size in batch_sizes:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds, flops = _gpu_step(size, repeats, world)
        except torch.cuda.OutOfMemoryError:
            print(f"  {size:5} out of memory")
            continue
        share = "unknown" if peak is None else f"{flops / seconds / (peak * 1e12):.1%}"
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"  {size:5} {seconds:8.3f} {size / seconds:8.1f} {flops / 1e12:11.1f} {share:>8} {memory:6.1f}")
    if peak is None:
        print("  this GPU's peak is not in the table: give --peak-tflops")


def _gpu_step(size: int, repeats: int, world: World) -> tuple[float, float]:
    """Median seconds and FLOPs (2 per multiply-accumulate, backward and teacher included) of a step."""
    recipe = epic_recipe(f"training.batch_size={size}")
    assert recipe.distill is not None
    torch.manual_seed(0)
    engine = Engine(KarmmaModel(recipe.model, recipe.inputs, recipe.data.modalities, HEADS), recipe, world)
    teacher = make_teacher(recipe).to(engine.device, engine.dtype)
    objective = Distillation(recipe.distill, targets_of(teacher, recipe.distill))
    batches = [synthetic_batch(recipe, size, engine.device, engine.dtype, seed) for seed in range(2)]
    engine.model.train()

    def step(batch: Batch) -> None:
        loss, _ = objective.loss(engine.forward(batch.inputs, batch.present_BM), batch)
        engine.backward(loss)
        engine.step(1e-6)

    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            step(batch)
    flops = counter.get_total_flops() / len(batches)
    torch.cuda.synchronize()
    seconds = [_timed(lambda: [step(batch) for batch in batches], engine.device) for _ in range(repeats)]
    return statistics.median(seconds) / len(batches), flops


def main() -> None:
    """Run the arms that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="skip,loop,gpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU, where the table does not know it")
    parser.add_argument("--batch-sizes", default=",".join(map(str, GPU_BATCH_SIZES)), help="of the gpu arm")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms = arguments.arms.split(",")
    print(f"{torch.get_num_threads()} threads, load before {os.getloadavg()[0]:.1f}")
    if "skip" in arms:
        bench_skip(arguments.repeats)
    world = find_world({})
    with process_group(world):
        if "loop" in arms:
            bench_loop(arguments.repeats, world)
        if "gpu" in arms:
            sizes = tuple(map(int, arguments.batch_sizes.split(",")))
            bench_gpu(arguments.repeats, world, arguments.peak_tflops, sizes)
    print(f"load after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
