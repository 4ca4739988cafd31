"""Two ranks under DeepSpeed against one plain PyTorch loop: the cases, the loop, and how far the two are apart.

    python tests/distributed/exactness.py [--zero-stages 0,1,2,3] [--out DIR]       every case, as a table

Two ranks train all cases at all stages one after the other, through `training.trainer.train`; the reference knows
neither ranks nor DeepSpeed and takes each global batch at once. The model is the real one with every kind of encoder,
small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.evaluation.run import validate
from karmma_dist.io.files import write_whole
from karmma_dist.launching.local import launch_local
from karmma_dist.modalities.signal.member import Channel, SignalMember, Track, write_member
from karmma_dist.models.karmma import KarmmaModel, KnownTokens
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.packing.tars.writer import write_shard
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip
from karmma_dist.shards.manifest import Manifest, SplitEntry
from karmma_dist.streaming import loader
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips
from karmma_dist.streaming.order import Slice

MODALITIES = ("video", "flow", "audio", "detections", "signal")
NUM_RANKS, BATCH_SIZE, NUM_STEPS = 2, 12, 3
LR = {"sgd": 0.1, "adamw": 1e-3}
NOISE = 1e-8
"""AdamW's epsilon: smaller gradients are below what it takes for one, and where the whole gradient has norm 1 (it is
clipped to that) they are what rounding leaves."""

V, FL, A, D, S = ([index == place for index in range(5)] for place in range(5))


def _both(*patterns: list[bool]) -> list[bool]:
    return [any(flags) for flags in zip(*patterns, strict=True)]


PRESENCE: dict[str, list[list[bool]]] = {
    # The first six clips of each batch are the first rank's, the other six the second's.
    "disjoint": [V, _both(V, FL), FL, V, FL, _both(V, FL), A, _both(A, D), S, D, _both(D, S), _both(A, D, S)],
    "absent": [_both(V, A), _both(A, S), _both(V, FL, A, D, S), _both(A, D), FL, V,
               S, _both(V, D), FL, _both(FL, D), D, _both(V, S)],
    "equal sizes": [V, V, V, V, V, V, FL, FL, FL, FL, FL, FL],
}
"""The modalities that clips keep, by their place in the batch; "dropped" is the recipe's own modality dropout.

In `absent` the second rank never has audio. In `equal sizes` only branches of equal sizes differ, so ranks that skipped
them would reduce the wrong gradients instead of failing.
"""


@dataclass(frozen=True)
class Case:
    """A run."""

    stage: str
    optimizer: str
    accumulation: int
    presence: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.stage}-{self.optimizer}-{self.accumulation}-{self.presence}".replace(" ", "_")


CASES = [
    Case("supervised", "sgd", 1, "disjoint"),
    Case("supervised", "adamw", 3, "absent"),
    Case("distill", "sgd", 3, "disjoint"),
    Case("distill", "adamw", 1, "absent"),
    Case("teacher", "adamw", 1, "absent"),
]
"""The cases that are tested at ZeRO stage 1; the others run only `FEW`, and the table has all combinations."""

FEW = CASES[1:3]
"""Two cases with every optimizer, accumulation and presence, and every stage of training but `teacher`."""

BROKEN = Case("supervised", "sgd", 1, "equal sizes")
"""A case that is exact as it is, and wrong where branches are skipped."""

EVERY_CASE = [
    Case(*combination)
    for combination in itertools.product(
        ["supervised", "teacher", "distill"], ["sgd", "adamw"], [1, 3], ["disjoint", "absent", "dropped"]
    )
]


def make_recipe(case: Case, shards: Path, folder: Path) -> Recipe:
    """Return the recipe of a case with its run in `folder`; a teacher is expected in folder/teacher."""
    teaches = case.stage == "teacher"
    swin = {"name": "swin3d_small", "options": {"width": 12, "depths": [1, 1], "heads": [1, 2], "drop_path": 0.0}}
    stlt = {"spatial_layers": 1, "temporal_layers": 1, "width": 8, "heads": 2, "dropout": 0.0}
    encoders: dict[str, dict[str, Any]] = {
        "video": swin,
        "flow": swin,
        "audio": swin if teaches else {"name": "small_audio", "options": {"width": 4}},
        "detections": {"name": "stlt", "options": stlt},
        "signal": {"name": "signal_cnn", "options": {"width": 4, "dropout": 0.0}},
    }
    return Recipe.model_validate(
        {
            "name": case.name,
            "runs_dir": str(folder),
            "stage": case.stage,
            "seed": 5,
            "data": {
                "shards": str(shards),
                "modalities": list(MODALITIES),
                "modality_dropout": {"probability": 0.5},
                "num_workers": 0,
            },
            "inputs": {
                "video": {"num_frames": 4, "short_side": 32, "crop": 32},
                "audio": {"num_windows": 4, "window_s": 0.5, "num_mels": 32},
                "detections": {"num_frames": 3, "max_boxes": 2},
                "signal": {"rate_hz": 20, "num_samples": 32, "num_channels": 2},
            },
            "model": {
                "encoders": {m: {**encoder, "frozen": teaches} for m, encoder in encoders.items()},
                "tau": 10,
                "width": 16,
                "num_heads": 2,
                "num_layers": 2 if teaches else 1,
                "feedforward": 16,
                "fc_width": 16,
                "missing": "leave_out" if teaches else "stand_in",
            },
            "distill": {"teacher": "teacher"} if case.stage == "distill" else None,
            "optimizer": {
                "name": case.optimizer, "lr": LR[case.optimizer], "start_lr": LR[case.optimizer], "warmup_epochs": 0,
                "clip": 1.0,
            },
            "training": {
                "epochs": 1, "batch_size": BATCH_SIZE, "accumulation": case.accumulation, "log_every_steps": 1,
                "validate_every_epochs": 0, "threads": 1, "precision": "fp32",
            },
        }
    )  # fmt: skip


def make_shards(folder: Path) -> Path:
    """Pack 36 synthetic clips that have video, flow and audio, and give each of them boxes and a signal as well."""
    write_kitchen(folder / "raw", seed=0, train_recordings=3, validation_recordings=1, clips_per_recording=12)
    packed, out = folder / "packed", folder / "shards"
    pack(load_spec("demo", raw=str(folder / "raw"), out=str(packed), overrides=["clips_per_shard=12"]))
    before = ShardFolder(packed)
    header = replace(before.manifest.header, modalities=tuple(MODALITIES))
    splits = {}
    out.mkdir()
    for split, entry in before.manifest.splits.items():
        clips = before.clips(split)
        shards = [
            write_shard(
                out / shard.name, [(c.key, _with_more(before, c)) for c in clips if c.shard == shard.name], header
            )
            for shard in entry.shards
        ]
        splits[split] = SplitEntry.of_shards(shards)
    write_whole(out / "manifest.json", Manifest(header, splits, before.manifest.label_counts).to_bytes())
    return out


def _with_more(folder: ShardFolder, clip: Clip) -> dict[str, bytes]:
    """Return a clip's members, five frames of two boxes, and two channels of a signal, made from its key."""
    random = np.random.default_rng(zlib.crc32(clip.key.encode()))
    corners = random.uniform(0, 0.5, (5, 2, 2)).round(3)
    frames = [[[*xy, *(xy + 0.4), kind, 0.9] for kind, xy in enumerate(frame, 1)] for frame in corners]
    boxes = json.dumps({"width": 96, "height": 72, "frames": frames}).encode()
    members = {m: folder.read(clip, m) for m in ("video", "flow", "audio")}
    metadata = json.loads(folder.read(clip, "json"))
    counts = {"num_frames": 5, "num_boxes": 10}
    metadata["modalities"]["detections"] = {"bytes": len(boxes), "crc32": zlib.crc32(boxes), **counts}
    channels = tuple(Channel(name, "N", "force", 0.0, 1.0) for name in ("left", "right"))
    track = Track(channels, 1.0, np.arange(40) / 20, random.normal(size=(2, 40)).round(3))
    signal = write_member(SignalMember(0.0, 2.0, (track,)))
    sizes = {"num_channels": 2, "num_samples": 40, "span_s": 2.0, "channels": "left [N], right [N]"}
    metadata["modalities"]["signal"] = {"bytes": len(signal), "crc32": zlib.crc32(signal), **sizes}
    return {"json": json.dumps(metadata).encode(), **members, "detections": boxes, "signal": signal}


def make_teacher(shards: Path, folder: Path) -> None:
    """Write a teacher with random weights to folder/teacher."""
    recipe = make_recipe(Case("teacher", "sgd", 1, "absent"), shards, folder)
    classes = ShardFolder(shards).classes
    torch.manual_seed(1)
    heads = {head: len(names) for head, names in classes.items()}
    save_model(KarmmaModel(recipe.model, recipe.inputs, MODALITIES, heads), folder / "teacher", classes=classes)


@contextmanager
def presence(case: Case) -> Iterator[None]:
    """Replace modality dropout by the case's own pattern."""
    rows = PRESENCE.get(case.presence)
    if rows is None:
        yield
        return
    pattern = np.array(rows)

    def keep_patterns(num_places: int, *_: object) -> np.ndarray:
        return np.resize(pattern, (num_places, len(MODALITIES)))

    with mock.patch.object(loader, "keep_patterns", keep_patterns):
        yield


@dataclass
class Outcome:
    """The batches, losses and final weights of a run."""

    seen: list[list[Any]]
    """Step, key and present modalities of each clip, in the order of places."""
    losses: list[float]
    """The loss of the global batch at each optimizer step."""
    weights: dict[str, Tensor]
    """The weights at the end."""


def seen_in(batch: Batch) -> list[list[Any]]:
    """Return `Outcome.seen` of one batch."""
    flags = batch.present_BM.tolist()
    present = [[m for m, is_present in zip(MODALITIES, row, strict=True) if is_present] for row in flags]
    return [[batch.step, key, modalities] for key, modalities in zip(batch.keys, present, strict=True)]


@dataclass
class Reference(Outcome):
    """The outcome of plain PyTorch in one process."""

    start: dict[str, Tensor]
    """Weights before the first step."""
    is_noise: dict[str, Tensor]
    """Under AdamW, the elements of each parameter whose gradient (after clipping) was never above `NOISE` but not 0.

    The true value of such a gradient is 0: above all that of the keys' biases, since adding the same to all keys
    changes no attention. Its rounding error differs between any two orders of summation, and AdamW scales it up to
    parts of a step.
    """


def run_reference(case: Case, shards: Path, folder: Path) -> Reference:
    """Train the case in this process, each global batch at once."""
    recipe, shard_folder = make_recipe(case, shards, folder), ShardFolder(shards)
    heads = {head: len(names) for head, names in shard_folder.classes.items()}
    torch.manual_seed(recipe.seed)
    model = KarmmaModel(recipe.model, recipe.inputs, MODALITIES, heads).train()
    teacher = load_model(folder / "teacher")[0].eval() if case.stage == "distill" else None
    outcome = Reference([], [], {}, _copy(model), {})
    largest: dict[str, Tensor] = {}
    optimizer = _optimizer(model, recipe)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    clips = TrainingClips(shard_folder, recipe.data, recipe.inputs, recipe.seed, BATCH_SIZE)
    with presence(case):
        for step in range(NUM_STEPS):
            raw = clips.batch(Slice(0, step, step * BATCH_SIZE, (step + 1) * BATCH_SIZE))
            outcome.seen += seen_in(raw)
            batch = prepare(raw, recipe.inputs, "cpu")
            loss = _loss(model, teacher, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), recipe.optimizer.clip)
            for name, parameter in trained.items():
                size = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
                largest[name] = torch.maximum(size, largest.get(name, size))
            optimizer.step()
            outcome.losses.append(loss.item())
    outcome.weights = _copy(model)
    if case.optimizer == "adamw":
        outcome.is_noise = {name: (size > 0) & (size <= NOISE) for name, size in largest.items()}
    return outcome


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or any(word in name for word in ("token", "position", "pos_embed"))
            (plain if is_plain else decayed).append(parameter)
    decay = recipe.optimizer.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]
    kind: Callable[..., torch.optim.Optimizer] = (
        torch.optim.SGD if recipe.optimizer.name == "sgd" else torch.optim.AdamW
    )
    return kind(groups, lr=recipe.optimizer.lr)


def _loss(model: nn.Module, teacher: nn.Module | None, batch: Batch) -> Tensor:
    """Return the cross-entropy, or 0.7 of it and 0.3 of the KL to the teacher; means over heads and clips."""
    logits = model(batch.inputs, batch.present_BM)
    hard = torch.stack([F.cross_entropy(logits[head], batch.labels[head]) for head in logits]).mean()
    if teacher is None:
        return hard
    with torch.no_grad():
        taught = teacher(batch.inputs, batch.present_BM)
    soft = [
        (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean()
        for t, s in ((taught[head], logits[head]) for head in logits)
    ]
    return 0.7 * hard + 0.3 * torch.stack(soft).mean()


@dataclass(frozen=True)
class Job:
    """Cases that two ranks train at one ZeRO stage; `read_outcome` reads what they leave in `folder`."""

    cases: list[Case]
    zero_stage: int
    folder: Path
    skip_branches: bool = False
    """True if the ranks run no branch of a modality that none of their clips has: the mistake to be noticed."""


def launch_ranks(jobs: list[Job], shards: Path) -> int:
    """Train all jobs one after the other on two ranks, with a teacher in each job's folder; return their exit code."""
    for job in jobs:
        make_teacher(shards, job.folder)
    told = json.dumps({"jobs": [asdict(job) for job in jobs], "shards": shards}, default=str)
    return launch_local(NUM_RANKS, [sys.executable, __file__, "--rank-jobs", told])


def run_rank(jobs: list[Job], shards: Path) -> None:
    """Train all jobs as one rank of `launch_ranks`."""
    from karmma_dist.distributed.process_group import process_group
    from karmma_dist.distributed.world import find_world
    from karmma_dist.training import trainer as loop

    world = find_world(os.environ)
    make_batch = TrainingClips.batch
    with process_group(world):
        for job, case in [(each, case) for each in jobs for case in each.cases]:
            recipe = make_recipe(case, shards, job.folder)
            recipe.training.zero_stage = job.zero_stage
            seen: list[list[Any]] = []

            def batch(self: TrainingClips, part: Slice, *rest: Any, seen: list[list[Any]] = seen) -> Batch:
                made = make_batch(self, part, *rest)
                seen += seen_in(made)
                return made

            with presence(case), mock.patch.object(TrainingClips, "batch", batch):
                if job.skip_branches:
                    # The graph check would stop the ranks at the first step.
                    with (
                        mock.patch.object(KarmmaModel, "encode", encode_present_only),
                        mock.patch.object(loop.GraphCheck, "is_due", return_value=False),
                    ):
                        loop.train(recipe, world, validate)
                else:
                    loop.train(recipe, world, validate)
            (recipe.run_dir / f"seen-{world.rank}.json").write_text(json.dumps(seen))


_encode = KarmmaModel.encode


def encode_present_only(
    self: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor, known: Mapping[str, KnownTokens] | None = None
) -> dict[str, Tensor]:
    """Break the rule: run no branch of a modality that no clip of this rank has."""
    before, self.training = self.training, False
    try:
        return _encode(self, inputs, present_BM, known)
    finally:
        self.training = before


def read_outcome(case: Case, folder: Path) -> Outcome:
    """Return what the ranks of a job did in one case."""
    run = folder / case.name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    per_rank = [json.loads((run / f"seen-{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    seen = sorted(itertools.chain(*per_rank), key=lambda clip: clip[0])  # stable: by step, then rank, then place
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return Outcome(seen, losses, load_file(run / "weights.safetensors"))


@dataclass
class Difference:
    """The distance of a run from its reference."""

    same_clips: bool
    """True if every place of every step had the same key with the same modalities."""
    loss: float
    """Largest difference of a step's loss."""
    weight: float
    """Largest difference of a weight at the end, without `Reference.is_noise`."""
    cosine: float
    """Smallest cosine of a parameter's update with the reference's."""
    worst: str
    """The parameter with that cosine."""
    noise_share: float
    """Share of `Reference.is_noise` in all weights."""
    noise: float
    """Largest difference of a weight that is noise."""


def compare(outcome: Outcome, reference: Reference) -> Difference:
    """Compare a run with its reference."""
    cosines, weight, num, num_noise, noise = {}, 0.0, 0, 0, 0.0
    for name, start in reference.start.items():
        off = (outcome.weights[name] - reference.weights[name]).abs()
        is_noise = reference.is_noise.get(name, torch.zeros_like(off, dtype=torch.bool))
        num, num_noise = num + off.numel(), num_noise + int(is_noise.sum())
        noise = max(noise, float(off[is_noise].max() if is_noise.any() else 0))
        if is_noise.all():
            continue
        weight = max(weight, float(off[~is_noise].max()))
        should = (reference.weights[name].double() - start.double())[~is_noise]
        if float(should.norm()) > 1e-6:
            moved = (outcome.weights[name].double() - start.double())[~is_noise]
            cosines[name] = float(F.cosine_similarity(moved, should, dim=0))
    worst = min(cosines, key=cosines.__getitem__)
    return Difference(
        same_clips=outcome.seen == reference.seen,
        loss=max(abs(a - b) for a, b in zip(outcome.losses, reference.losses, strict=True)),
        weight=weight,
        cosine=cosines[worst],
        worst=worst,
        noise_share=num_noise / num,
        noise=noise,
    )


def main() -> None:
    """Run as one rank, or print the table of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero-stages", default="0,1,2,3")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-jobs", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank_jobs:
        jobs = [
            Job(**{**job, "cases": [Case(**case) for case in job["cases"]], "folder": Path(job["folder"])})
            for job in arguments.rank_jobs["jobs"]
        ]
        run_rank(jobs, Path(arguments.rank_jobs["shards"]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        out: Path = arguments.out or Path(temporary)
        shards = make_shards(out)
        make_teacher(shards, out)
        references = {case: run_reference(case, shards, out) for case in EVERY_CASE}
        titles = f"{'loss':>9} {'weights':>9} {'cosine':>11} {'left out':>9} {'they':>8}  worst parameter"
        print(f"{'ZeRO':4} {'case':34} {'clips':6} {titles}")
        for zero_stage in map(int, arguments.zero_stages.split(",")):
            folder = out / f"zero-{zero_stage}"
            if launch_ranks([Job(EVERY_CASE, zero_stage, folder)], shards):
                raise SystemExit(f"the ranks of ZeRO stage {zero_stage} failed")
            for case in EVERY_CASE:
                off = compare(read_outcome(case, folder), references[case])
                same = "same" if off.same_clips else "OTHER"
                print(
                    f"{zero_stage:4} {case.name:34} {same:6} {off.loss:9.1e} {off.weight:9.1e} "
                    f"{off.cosine:11.8f} {off.noise_share:9.2%} {off.noise:8.1e}  {off.worst}"
                )


if __name__ == "__main__":
    main()
