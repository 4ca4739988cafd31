"""Two ranks under DeepSpeed against one plain PyTorch loop: the cases, the loop, and how far the two are apart.

    python tests/distributed/exactness.py [--zero-stages 0,1,2,3] [--out DIR]       every case, as a table

The ranks of one ZeRO stage train all its cases in one job, through `training.loop.train`; the reference knows neither
ranks nor DeepSpeed and takes each global batch at once. The model is the real one with every kind of encoder, small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_dist.evaluation.run import validate
from karmma_dist.io.files import write_json
from karmma_dist.launching.local import launch_local
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import load_model, save_model
from karmma_dist.packing.pack import pack
from karmma_dist.packing.spec import load_spec
from karmma_dist.packing.synthetic.kitchen import write_kitchen
from karmma_dist.packing.tars.writer import write_shard
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, facts_of
from karmma_dist.streaming import loader
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import TrainingClips
from karmma_dist.streaming.order import Slice

MODALITIES = ("video", "flow", "audio", "detections")
NUM_RANKS, BATCH_SIZE, NUM_STEPS = 2, 12, 3
LR = {"sgd": 0.1, "adamw": 1e-3}
NOISE = 1e-8
"""AdamW's epsilon: smaller gradients are below what it takes for one, and where the whole gradient has norm 1 (it is
clipped to that) they are what rounding leaves."""

V, FL, A, D = ([index == place for index in range(4)] for place in range(4))


def _both(*patterns: list[bool]) -> list[bool]:
    return [any(flags) for flags in zip(*patterns, strict=True)]


PRESENCE: dict[str, list[list[bool]]] = {
    # Of each batch: the first rank's six clips, then the second's.
    "disjoint": [V, _both(V, FL), FL, V, FL, _both(V, FL), A, _both(A, D), D, D, A, _both(A, D)],
    "absent": [_both(V, A), A, _both(V, FL, A, D), _both(A, D), FL, V, V, _both(V, D), FL, _both(FL, D), D, V],
    "equal sizes": [V, V, V, V, V, V, FL, FL, FL, FL, FL, FL],
}
"""Which modalities clips keep by their place in the batch; "dropped" is the recipe's own modality dropout.

`absent`: the second rank never hears anything. `equal sizes`: branches of equal sizes alone differ, so that ranks that
skipped them would reduce the wrong gradients instead of failing.
"""


@dataclass(frozen=True)
class Case:
    """One run."""

    stage: str
    optimizer: str
    accumulation: int
    presence: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.stage}-{self.optimizer}-{self.accumulation}-{self.presence}".replace(" ", "_")


CASES = [
    Case("supervised", "sgd", 1, "disjoint"),
    Case("supervised", "adamw", 3, "absent"),
    Case("distill", "sgd", 3, "disjoint"),
    Case("distill", "adamw", 1, "absent"),
    Case("teacher", "adamw", 1, "absent"),
]
"""What the test of ZeRO stage 1 runs. Of the others only `FEW`: the table has all combinations."""

FEW = CASES[1:3]
"""Two that hold every stage of training but `teacher`, optimizer, accumulation and presence."""

BROKEN = Case("supervised", "sgd", 1, "equal sizes")
"""Exact as it is, and wrong where branches are skipped."""

EVERY_CASE = [
    Case(*combination)
    for combination in itertools.product(
        ["supervised", "teacher", "distill"], ["sgd", "adamw"], [1, 3], ["disjoint", "absent", "dropped"]
    )
]


def make_recipe(case: Case, shards: Path, folder: Path) -> Recipe:
    """The recipe of a case, its run in `folder`; a teacher is expected in folder/teacher."""
    teaches = case.stage == "teacher"
    swin = {"name": "swin3d_small", "options": {"width": 12, "depths": [1, 1], "heads": [1, 2], "drop_path": 0.0}}
    stlt = {"spatial_layers": 1, "temporal_layers": 1, "width": 8, "heads": 2, "dropout": 0.0}
    encoders: dict[str, dict[str, Any]] = {
        "video": swin,
        "flow": swin,
        "audio": swin if teaches else {"name": "small_audio", "options": {"width": 4}},
        "detections": {"name": "stlt", "options": stlt},
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
    """Pack 36 synthetic clips that have video, flow and sound, and give each of them boxes as well."""
    write_kitchen(folder / "raw", seed=0, train_recordings=3, validation_recordings=1, clips_per_recording=12)
    packed, out = folder / "packed", folder / "shards"
    pack(load_spec("demo", raw=str(folder / "raw"), out=str(packed), overrides=["clips_per_shard=12"]))
    before = ShardFolder(packed)
    manifest = {**before.manifest, "modalities": list(MODALITIES)}
    out.mkdir()
    for split, described in manifest["splits"].items():
        names = [shard["name"] for shard in described["shards"]]
        clips = before.clips(split)
        described["shards"] = [
            write_shard(
                out / name, [(c.key, _with_boxes(before, c)) for c in clips if c.shard == name], facts_of(manifest)
            )
            for name in names
        ]
    write_json(out / "manifest.json", manifest)
    return out


def _with_boxes(folder: ShardFolder, clip: Clip) -> dict[str, bytes]:
    """A clip's members and five frames of two boxes made from its key."""
    corners = np.random.default_rng(zlib.crc32(clip.key.encode())).uniform(0, 0.5, (5, 2, 2)).round(3)
    frames = [[[*xy, *(xy + 0.4), kind, 0.9] for kind, xy in enumerate(frame, 1)] for frame in corners]
    boxes = json.dumps({"width": 96, "height": 72, "frames": frames}).encode()
    members = {m: folder.read(clip, m) for m in ("video", "flow", "audio")}
    metadata = json.loads(folder.read(clip, "json"))
    counts = {"num_frames": 5, "num_boxes": 10}
    metadata["modalities"]["detections"] = {"bytes": len(boxes), "crc32": zlib.crc32(boxes), **counts}
    return {"json": json.dumps(metadata).encode(), **members, "detections": boxes}


def make_teacher(shards: Path, folder: Path) -> None:
    """A teacher with random weights in folder/teacher."""
    recipe = make_recipe(Case("teacher", "sgd", 1, "absent"), shards, folder)
    classes = ShardFolder(shards).classes
    torch.manual_seed(1)
    heads = {head: len(names) for head, names in classes.items()}
    save_model(KarmmaModel(recipe.model, recipe.inputs, MODALITIES, heads), folder / "teacher", classes=classes)


@contextmanager
def presence(case: Case) -> Iterator[None]:
    """Modality dropout that keeps what the case says."""
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
    """What a run did."""

    seen: list[list[Any]]
    """Per clip, in the order of places: step, key, the modalities it brought."""
    losses: list[float]
    """Per optimizer step, over the global batch."""
    weights: dict[str, Tensor]
    """At the end."""


def seen_in(batch: Batch) -> list[list[Any]]:
    """`Outcome.seen` of one batch."""
    flags = batch.present_BM.tolist()
    brought = [[m for m, there in zip(MODALITIES, row, strict=True) if there] for row in flags]
    return [[batch.step, key, modalities] for key, modalities in zip(batch.keys, brought, strict=True)]


@dataclass
class Reference(Outcome):
    """What plain PyTorch does in one process."""

    start: dict[str, Tensor]
    """Weights before the first step."""
    is_noise: dict[str, Tensor]
    """Under AdamW, per parameter the elements whose gradient (after clipping) was never above `NOISE` but not 0.

    Its true value is 0: above all that of the keys' biases, since adding the same to all keys changes no attention.
    What rounding leaves of it differs between any two ways to add up, and AdamW scales it up to parts of a step.
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
    """Cross-entropy, or 0.7 of it and 0.3 of the KL to the teacher; means over heads and clips."""
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


def launch_ranks(cases: list[Case], zero_stage: int, shards: Path, folder: Path, skip_branches: bool = False) -> int:
    """Train cases one after the other on two ranks; returns their exit code. Results: see `read_outcome`."""
    job = {
        "cases": [asdict(case) for case in cases], "zero_stage": zero_stage, "shards": str(shards),
        "folder": str(folder), "skip_branches": skip_branches,
    }  # fmt: skip
    return launch_local(NUM_RANKS, [sys.executable, __file__, "--rank-job", json.dumps(job)])


def run_rank(job: dict[str, Any]) -> None:
    """What every rank of `launch_ranks` does."""
    from karmma_dist.distributed.process_group import process_group
    from karmma_dist.distributed.world import find_world
    from karmma_dist.training import trainer as loop

    world = find_world(os.environ)
    folder = Path(job["folder"])
    make_batch = TrainingClips.batch
    with process_group(world):
        for case in (Case(**fields) for fields in job["cases"]):
            recipe = make_recipe(case, Path(job["shards"]), folder)
            recipe.training.zero_stage = job["zero_stage"]
            seen: list[list[Any]] = []

            def batch(self: TrainingClips, part: Slice, *rest: Any, seen: list[list[Any]] = seen) -> Batch:
                made = make_batch(self, part, *rest)
                seen += seen_in(made)
                return made

            with presence(case), mock.patch.object(TrainingClips, "batch", batch):
                if job["skip_branches"]:
                    # Disable the graph check, which would stop the ranks at the first step.
                    with (
                        mock.patch.object(KarmmaModel, "encode", encode_only_what_is_there),
                        mock.patch.object(loop.GraphCheck, "is_due", return_value=False),
                    ):
                        loop.train(recipe, world, validate)
                else:
                    loop.train(recipe, world, validate)
            (recipe.run_dir / f"seen-{world.rank}.json").write_text(json.dumps(seen))


_encode = KarmmaModel.encode


def encode_only_what_is_there(
    self: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor
) -> dict[str, Tensor]:
    """Break the rule: run no branch of a modality that no clip of this rank has."""
    before, self.training = self.training, False
    try:
        return _encode(self, inputs, present_BM)
    finally:
        self.training = before


def read_outcome(case: Case, folder: Path) -> Outcome:
    """What the ranks of a job did in one case."""
    run = folder / case.name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    per_rank = [json.loads((run / f"seen-{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    seen = sorted(itertools.chain(*per_rank), key=lambda clip: clip[0])  # stable: by step, then rank, then place
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return Outcome(seen, losses, load_file(run / "weights.safetensors"))


@dataclass
class Difference:
    """How far a run is from its reference."""

    same_clips: bool
    """Same keys with the same modalities at every place of every step."""
    loss: float
    """Largest difference of a step's loss."""
    weight: float
    """Largest difference of a weight at the end, leaving out `Reference.is_noise`."""
    cosine: float
    """Smallest cosine of a parameter's update with what it should have been."""
    worst: str
    """The parameter that has it."""
    noise_share: float
    """Share of all weights that are left out."""
    noise: float
    """Largest difference among those."""


def compare(got: Outcome, reference: Reference) -> Difference:
    """Compare a run with its reference."""
    cosines, weight, num, num_noise, noise = {}, 0.0, 0, 0, 0.0
    for name, start in reference.start.items():
        off = (got.weights[name] - reference.weights[name]).abs()
        is_noise = reference.is_noise.get(name, torch.zeros_like(off, dtype=torch.bool))
        num, num_noise = num + off.numel(), num_noise + int(is_noise.sum())
        noise = max(noise, float(off[is_noise].max() if is_noise.any() else 0))
        if is_noise.all():
            continue
        weight = max(weight, float(off[~is_noise].max()))
        should = (reference.weights[name].double() - start.double())[~is_noise]
        if float(should.norm()) > 1e-6:
            moved = (got.weights[name].double() - start.double())[~is_noise]
            cosines[name] = float(F.cosine_similarity(moved, should, dim=0))
    worst = min(cosines, key=cosines.__getitem__)
    return Difference(
        same_clips=got.seen == reference.seen,
        loss=max(abs(a - b) for a, b in zip(got.losses, reference.losses, strict=True)),
        weight=weight,
        cosine=cosines[worst],
        worst=worst,
        noise_share=num_noise / num,
        noise=noise,
    )


def main() -> None:
    """Run what one rank runs, or print the table of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero-stages", default="0,1,2,3")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank-job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank_job:
        run_rank(arguments.rank_job)
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
            make_teacher(shards, folder)
            if launch_ranks(EVERY_CASE, zero_stage, shards, folder):
                raise SystemExit(f"the ranks of ZeRO stage {zero_stage} failed")
            for case in EVERY_CASE:
                found = compare(read_outcome(case, folder), references[case])
                same = "same" if found.same_clips else "OTHER"
                print(
                    f"{zero_stage:4} {case.name:34} {same:6} {found.loss:9.1e} {found.weight:9.1e} "
                    f"{found.cosine:11.8f} {found.noise_share:9.2%} {found.noise:8.1e}  {found.worst}"
                )


if __name__ == "__main__":
    main()
