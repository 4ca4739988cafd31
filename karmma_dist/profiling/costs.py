"""Costs of a recipe's models, or of their fusion blocks alone, on every subset of modalities.

Counted on the meta device, whatever the batch: no tensor holds a value. See `memory.py` for what counts as memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.modalities import parse_modalities, subsets
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.flops import ClipFlops, count_flops, flops_per_clip, meta_clip, meta_model, meta_tokens
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import CARD, ModelCard
from karmma_dist.profiling.memory import FUSION_CLIPS, fusion_peak, inference_peak, training_peak
from karmma_dist.recipe import InputRecipe, ModelRecipe, Recipe, load_chain
from karmma_dist.settings import read_tree, validate
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import MANIFEST
from karmma_dist.streaming.loader import check_heads


@dataclass(frozen=True)
class Subject:
    """A model to profile."""

    role: str
    """"student", "teacher", or the last part of the run's name."""
    run: str
    """The run's name."""
    model: ModelRecipe
    """Architecture."""
    inputs: InputRecipe
    """Sizes of the inputs."""
    modalities: tuple[str, ...]
    """All modalities of the recipe."""
    heads: dict[str, int]
    """Classes per head."""


def find_subjects(name: str, overrides: Sequence[str] = ()) -> tuple[list[Subject], list[str]]:
    """The models of a recipe, a distillation's teacher first, and remarks on what was not found.

    The teacher is the finished run's, if there is one, otherwise that of a recipe the distillation comes `after`.

    Raises:
        UserError: the recipe or a recipe it comes after is wrong, or the number of classes is not known.
    """
    *earlier, recipe = load_chain(name, overrides)
    heads = _heads(recipe)
    role = {"distill": "student", "teacher": "teacher"}.get(recipe.stage, recipe.name.rpartition("/")[2])
    subjects = [_subject(role, recipe, heads)]
    if recipe.distill is None:
        return subjects, []
    if recipe.distill.teacher is None:
        experts = ", ".join(recipe.distill.teachers)
        return subjects, [f"only the student: profile the experts that teach it by their own recipes: {experts}"]
    run = recipe.find_run(recipe.distill.teacher)
    if (run / CARD).is_file():
        card = validate(read_tree(run / CARD), ModelCard, str(run / CARD))
        if card.modalities != recipe.data.modalities:
            raise UserError(
                f"{run}: the teacher's modalities {', '.join(card.modalities)} are not those of data.modalities, "
                f"{', '.join(recipe.data.modalities)}"
            )
        teacher = Subject("teacher", str(run), card.model, card.inputs, tuple(card.modalities), card.heads)
        return [teacher, *subjects], []
    teachers = [r for r in earlier if r.name == recipe.distill.teacher or r.run_dir == run]
    if teachers:
        return [_subject("teacher", teachers[0], heads), *subjects], []
    return subjects, [f"only the student: there is no {run / CARD}, and no recipe of that name under 'after'"]


def _subject(role: str, recipe: Recipe, heads: dict[str, int]) -> Subject:
    return Subject(role, recipe.name, recipe.model, recipe.inputs, tuple(recipe.modalities), heads)


def _heads(recipe: Recipe) -> dict[str, int]:
    """Classes per head: of the recipe's shards where they lie on this machine, else those the recipe names."""
    folder = Path(recipe.data.shards)
    if (folder / MANIFEST).is_file():
        return check_heads(recipe.data, ShardFolder(folder))
    if not recipe.data.heads:
        raise UserError(
            f"{recipe.name}: the number of classes is not known: there are no shards in {folder}, and data.heads is "
            "empty: pack the shards, or say it: --set data.heads.HEAD=NUMBER, for example --set data.heads.action=174"
        )
    return dict(recipe.data.heads)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that can be profiled."""

_TABLE_V = {785: 14.28, 300: 2.65}
"""GB of the teacher's fusion block by tau, as published (arXiv 2504.08578, Tab. V). 785 reduces nothing."""

_PUBLISHED_SIZES = (768, 8, 2, 768, 784, 784, 784)
"""Width, heads, layers and feed-forward width of that block, and the tokens of each modality without reduction."""


@dataclass(frozen=True)
class Workload:
    """The part of a model that is counted, and the batch it gets."""

    part: str = "model"
    """"model", or "fusion": the fusion block alone, on tokens after tau-average and Linear."""
    precision: str = "bf16"
    """One of `DTYPES`: of weights, inputs and activations."""
    batch: int = 1
    """Clips at once."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision as PyTorch's."""
        return DTYPES[self.precision]

    @property
    def clips(self) -> str:
        """The batch in words."""
        return "one clip" if self.batch == 1 else f"{self.batch} clips"


@dataclass(frozen=True)
class Cost:
    """Costs of one model on one subset of modalities, of a model that holds this subset only (as published).

    FLOPs are of one clip; memory is of `batch` clips in `precision`; see `memory.py` for what is seen of it. With
    `part` "fusion" everything but `tokens` is of the fusion block alone.
    """

    model: str
    """Role of the model."""
    run: str
    """Its run's name."""
    modalities: tuple[str, ...]
    """The subset."""
    gflops: float
    """1e9 FLOPs of a forward pass."""
    gflops_whole_model: float
    """The same for the recipe's whole model on a clip that lacks its other modalities: with stand-in tokens in their
    places, if the model has such."""
    params_total: int
    """Parameters."""
    params_trainable: int
    """Parameters that training changes."""
    tokens: dict[str, int]
    """Tokens that each modality brings to the fusion block."""
    weights_bytes_bf16: int
    """Parameters in bfloat16."""
    weights_bytes_fp32: int
    """Parameters in float32."""
    activations_bytes: int
    """Peak of inputs and activations at inference; weights come on top."""
    training_bytes: int
    """Peak of inputs, activations and gradients of a training step; weights and optimizer state come on top."""
    latency_ms: float | None = None
    """Median time of a forward pass of the whole model with this subset present, where it was measured."""
    measured_activations_bytes: int | None = None
    """Peak of inputs and activations of the same, in the precision it was measured in."""
    part: str = "model"
    """Part of the model that was counted, as `Workload.part`."""
    precision: str = "bf16"
    """Precision in which memory was counted, as `Workload.precision`."""
    batch: int = 1
    """Clips whose memory was counted and whose forward pass was measured."""
    unfused_activations_bytes: int | None = None
    """`activations_bytes` with attention that makes its matrix of weights; None: a whole model."""
    unfused_training_bytes: int | None = None
    """`training_bytes` with attention that keeps its matrix of weights; None: a whole model."""
    peak_allocated_bytes: int | None = None
    """Most that CUDA's allocator had given out in a forward pass of a model (or fusion block) that holds this subset
    only, weights included, in the precision it was measured in; None: not measured, or on a CPU."""
    peak_reserved_bytes: int | None = None
    """Most that the allocator had taken from the device meanwhile."""
    unfused_peak_allocated_bytes: int | None = None
    """`peak_allocated_bytes` with attention that makes its matrix of weights; None also for a whole model."""
    unfused_peak_reserved_bytes: int | None = None
    """`peak_reserved_bytes` with such attention."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights in the precision in which memory was counted."""
        return self.weights_bytes_fp32 if self.precision == "fp32" else self.weights_bytes_bf16

    @property
    def inference_bytes(self) -> int:
        """Weights and activations at inference, in the precision in which memory was counted."""
        return self.weights_bytes + self.activations_bytes

    @property
    def unfused_inference_bytes(self) -> int | None:
        """The same with attention that makes its matrix of weights; None: a whole model."""
        return None if self.unfused_activations_bytes is None else self.weights_bytes + self.unfused_activations_bytes


@dataclass(frozen=True)
class Profile:
    """All rows of a recipe."""

    recipe: str
    """Its name."""
    rows: list[Cost]
    """Smallest subsets first; the teacher before the student."""
    notes: list[str]
    """What could not be profiled, and why; what figures to compare with."""
    measured: dict[str, Any] | None = None
    """Device, precision, threads and repeats of the measured columns."""
    workload: Workload = Workload()
    """What was counted."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [{**asdict(row), "inference_bytes": row.inference_bytes} for row in self.rows]
        return {"recipe": self.recipe, "rows": rows, "notes": self.notes, "measured": self.measured}


def profile_recipe(
    name: str, overrides: Sequence[str] = (), modalities: str | None = None, workload: Workload | None = None
) -> tuple[Profile, list[Subject]]:
    """Count what a recipe's models cost.

    Args:
        name: Recipe.
        overrides: `a.b=c`.
        modalities: Only this subset, e.g. "V,F"; None: all of them.
        workload: What to count; None: whole models, one clip in bf16.

    Returns:
        The profile, and the models it is of.

    Raises:
        UserError: as `find_subjects`; a modality that is unknown or that the recipe does not have.
    """
    load = workload or Workload()
    subjects, notes = find_subjects(name, overrides)
    available = subjects[0].modalities  # a student may take fewer than its teacher
    chosen = subsets(available) if modalities is None else [parse_modalities(modalities, available)]
    whole = {subject.role: _meta(subject, subject.modalities) for subject in subjects}
    flops = {role: flops_per_clip(model) for role, model in whole.items()} if load.part == "model" else {}
    known: dict[str, Cost] = {}
    rows = []
    for subset in chosen:
        for subject in subjects:
            if not set(subset) <= set(subject.modalities):
                continue
            like = _sizes(subject, subset)
            if like not in known and load.part == "fusion":
                known[like] = fusion_cost(subject, subset, whole[subject.role], load)
            elif like not in known:
                known[like] = cost(subject, subset, flops[subject.role], load)
            counted = known[like]
            tokens = dict(zip(subset, counted.tokens.values(), strict=True))
            rows.append(replace(counted, modalities=subset, tokens=tokens))
    if load.part == "fusion":
        notes = [*notes, *(note for role, model in whole.items() for note in _beside_published(role, model))]
    return Profile(subjects[-1].run, rows, notes, workload=load), subjects


def cost(subject: Subject, subset: tuple[str, ...], flops: ClipFlops, workload: Workload | None = None) -> Cost:
    """Count what a model of `subject`'s architecture that holds only `subset` costs.

    Args:
        subject: The model.
        subset: Modalities.
        flops: FLOPs of the recipe's whole model, by part.
        workload: Precision and batch of what is counted as memory; None: one clip in bf16.
    """
    load = workload or Workload()
    model = _meta(subject, subset).to(load.dtype)
    clips = meta_clip(subject.inputs, subset, load.dtype, load.batch)
    present = torch.ones(load.batch, len(subset), dtype=torch.bool)
    return Cost(
        model=subject.role,
        run=subject.run,
        modalities=subset,
        gflops=flops.alone(subset) / 1e9,
        gflops_whole_model=flops.forward(dict.fromkeys(subset, 1), 1) / 1e9,
        params_total=_num_parameters(model),
        params_trainable=_num_parameters(model, trainable=True),
        tokens=model.num_tokens,
        weights_bytes_bf16=2 * _num_parameters(model),
        weights_bytes_fp32=4 * _num_parameters(model),
        activations_bytes=inference_peak(model, clips, present),
        training_bytes=training_peak(model, clips, present),
        precision=load.precision,
        batch=load.batch,
    )


def fusion_cost(subject: Subject, subset: tuple[str, ...], whole: KarmmaModel, workload: Workload) -> Cost:
    """Count what the fusion block alone costs, with fused attention and with attention that makes its weights.

    Args:
        subject: The model.
        subset: Modalities whose tokens the block gets.
        whole: The recipe's whole model on the meta device; it is not touched.
        workload: Precision and batch of what is counted as memory.
    """
    block = deepcopy(whole.fusion_block).to(workload.dtype)
    tokens = {m: whole.num_tokens[m] for m in subset}
    in_block = [whole.num_tokens[m] for m in modalities_in_block(whole, subset)]
    flops, flops_whole = (
        count_flops(block, meta_tokens(block, num))[1] for num in (sum(tokens.values()), sum(in_block))
    )
    tokens_BTD = meta_tokens(block, sum(tokens.values()), workload.batch)
    return Cost(
        model=subject.role,
        run=subject.run,
        modalities=subset,
        gflops=flops / 1e9,
        gflops_whole_model=flops_whole / 1e9,
        params_total=_num_parameters(block),
        params_trainable=_num_parameters(block, trainable=True),
        tokens=tokens,
        weights_bytes_bf16=2 * _num_parameters(block),
        weights_bytes_fp32=4 * _num_parameters(block),
        # Inference first: a training step leaves the block in training mode.
        activations_bytes=fusion_peak(block, tokens_BTD),
        unfused_activations_bytes=fusion_peak(block, tokens_BTD, fused=False),
        training_bytes=fusion_peak(block, tokens_BTD, training=True),
        unfused_training_bytes=fusion_peak(block, tokens_BTD, fused=False, training=True),
        part="fusion",
        precision=workload.precision,
        batch=workload.batch,
    )


def modalities_in_block(model: KarmmaModel, subset: tuple[str, ...]) -> tuple[str, ...]:
    """Return the modalities whose tokens a model's fusion block gets of clips that have `subset`."""
    return subset if model.leaves_out else model.modalities


def _meta(subject: Subject, modalities: tuple[str, ...]) -> KarmmaModel:
    return meta_model(subject.model, subject.inputs, modalities, subject.heads).eval()


def _num_parameters(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _sizes(subject: Subject, subset: tuple[str, ...]) -> str:
    """Return all that costs depend on, so that flow need not be counted where it is encoded as video is."""
    encoders = [
        (subject.model.encoders[m].model_dump(exclude={"weights"}), input_shape(m, subject.inputs)) for m in subset
    ]
    return repr((subject.role, encoders))


def _beside_published(role: str, model: KarmmaModel) -> list[str]:
    """Return the paper's memory of its fusion block beside ours, in one sentence; nothing for any other block."""
    recipe, block = model.recipe, model.fusion_block
    num_tokens = [encoder.num_tokens for encoder in model.encoders.values() if isinstance(encoder, Encoder)]
    if (recipe.width, recipe.num_heads, recipe.num_layers, recipe.feedforward, *num_tokens) != _PUBLISHED_SIZES:
        return []

    def counted(fused: bool) -> str:
        lengths = [sum(min(num, tau) for num in num_tokens) for tau in _TABLE_V]
        peaks = [fusion_peak(block, meta_tokens(block, length, FUSION_CLIPS), fused=fused) for length in lengths]
        return " / ".join(f"{peak / 1e9:.2f}" for peak in peaks)

    published = " / ".join(f"{gigabytes:.2f}" for gigabytes in _TABLE_V.values())
    return [
        f"the {role}'s fusion block without token reduction / at tau 300: published {published} GB (arXiv 2504.08578, "
        f"Tab. V); counted at inference with {FUSION_CLIPS} clips in fp32 {counted(fused=False)} GB with unfused "
        f"attention and {counted(fused=True)} GB with fused attention, which is ours"
    ]
