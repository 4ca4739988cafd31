"""Costs of a recipe's models, or of their fusion blocks alone, on every subset of modalities.

Costs are counted on the meta device, so that no tensor holds a value and the batch size is free. See `memory.py` for
the definition of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from karmma_dist.errors import UserError, masked
from karmma_dist.modalities import parse_modalities, subsets
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import input_shape
from karmma_dist.models.flops import ClipFlops, count_flops, flops_per_clip, meta_clip, meta_model, meta_tokens
from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.models.model_card import CARD, read_card
from karmma_dist.profiling.memory import FUSION_CLIPS, fusion_peak, inference_peak, training_peak
from karmma_dist.recipe import InputRecipe, ModelRecipe, Recipe, load_chain
from karmma_dist.shards.format import MANIFEST
from karmma_dist.shards.mixture import open_datasets
from karmma_dist.streaming.loader import check_heads


@dataclass(frozen=True)
class ProfiledModel:
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
    """Number of classes by head."""


def find_models(name: str, overrides: Sequence[str] = ()) -> tuple[list[ProfiledModel], list[str]]:
    """Return a recipe's models, a distillation's teacher first, and notes on models that were not found.

    The teacher is the model of the finished run if it exists, otherwise that of a recipe under the distillation's
    `after`.

    Raises:
        UserError: the recipe or a recipe under its `after` is wrong, the finished teacher has other modalities, or the
            number of classes is unknown.
    """
    *earlier, recipe = load_chain(name, overrides)
    heads = _heads(recipe)
    role = {"distill": "student", "teacher": "teacher"}.get(recipe.stage, recipe.name.rpartition("/")[2])
    profiled_models = [_profiled_model(role, recipe, heads)]
    if recipe.distill is None:
        return profiled_models, []
    if recipe.distill.teacher is None:
        experts = ", ".join(recipe.distill.teachers)
        return profiled_models, [f"only the student is profiled: profile its experts with their own recipes: {experts}"]
    run = recipe.find_run(recipe.distill.teacher)
    if (run / CARD).is_file():
        card = read_card(run / CARD)
        if card.modalities != recipe.data.modalities:
            raise UserError(
                f"{run}: the teacher's modalities {', '.join(card.modalities)} differ from data.modalities, "
                f"{', '.join(recipe.data.modalities)}"
            )
        teacher = ProfiledModel("teacher", str(run), card.model, card.inputs, tuple(card.modalities), card.heads)
        return [teacher, *profiled_models], []
    teachers = [r for r in earlier if r.name == recipe.distill.teacher or r.run_dir == run]
    if teachers:
        return [_profiled_model("teacher", teachers[0], heads), *profiled_models], []
    note = f"only the student is profiled: {run / CARD} is missing, and 'after' names no recipe of that run"
    return profiled_models, [note]


def _profiled_model(role: str, recipe: Recipe, heads: dict[str, int]) -> ProfiledModel:
    return ProfiledModel(role, recipe.name, recipe.model, recipe.inputs, tuple(recipe.modalities), heads)


def _heads(recipe: Recipe) -> dict[str, int]:
    """Return the number of classes by head, from the recipe's shards if they are local, otherwise from data.heads."""
    locations = recipe.data.locations
    if all((Path(location) / MANIFEST).is_file() for location in locations):
        return check_heads(recipe.data, open_datasets(recipe.data))
    if not recipe.data.heads:
        raise UserError(
            f"{recipe.name}: the number of classes is unknown: there are no shards in "
            f"{' or '.join(map(masked, locations))}, and data.heads is "
            "empty: pack the shards, or set it: --set data.heads.HEAD=NUMBER, for example --set data.heads.action=174"
        )
    return dict(recipe.data.heads)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions that can be profiled."""

_TABLE_V = {785: 14.28, 300: 2.65}
"""Published memory of the teacher's fusion block in GB, by tau (arXiv 2504.08578, Tab. V); 785 reduces no tokens."""

_PUBLISHED_SIZES = (768, 8, 2, 768, 784, 784, 784)
"""Width, heads, layers and feed-forward width of the published block, and the unreduced tokens of each modality."""


@dataclass(frozen=True)
class Workload:
    """The counted part of a model, and its batch."""

    part: str = "model"
    """"model", or "fusion": the fusion block alone, on tokens after tau-average and Linear."""
    precision: str = "bf16"
    """Precision of weights, inputs and activations, one of `DTYPES`."""
    batch: int = 1
    """Number of clips."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision as a PyTorch dtype."""
        return DTYPES[self.precision]

    @property
    def clips(self) -> str:
        """Batch size in words."""
        return "one clip" if self.batch == 1 else f"{self.batch} clips"


@dataclass(frozen=True)
class Cost:
    """Costs of one model on one subset of modalities, for a model that holds only this subset (as published).

    FLOPs are counted for one clip, memory for `batch` clips in `precision`; see `memory.py` for the definition of
    memory. With `part` "fusion", every value except `tokens` belongs to the fusion block alone.
    """

    model: str
    """Role of the model."""
    run: str
    """Name of the model's run."""
    modalities: tuple[str, ...]
    """The subset."""
    gflops: float
    """1e9 FLOPs of a forward pass."""
    gflops_whole_model: float
    """1e9 FLOPs of a forward pass of the recipe's whole model on a clip with this subset only, including the stand-in
    tokens of missing modalities if the model has any."""
    params_total: int
    """Number of parameters."""
    params_trainable: int
    """Number of trainable parameters."""
    tokens: dict[str, int]
    """Number of tokens that the fusion block gets, by modality."""
    weights_bytes_bf16: int
    """Bytes of the parameters in bfloat16."""
    weights_bytes_fp32: int
    """Bytes of the parameters in float32."""
    activations_bytes: int
    """Peak bytes of inputs and activations at inference, without weights."""
    training_bytes: int
    """Peak bytes of inputs, activations and gradients of a training step, without weights and optimizer state."""
    latency_ms: float | None = None
    """Median time of a forward pass of the whole model with this subset present; None: not measured."""
    measured_activations_bytes: int | None = None
    """Peak bytes of inputs and activations of this pass in the measured precision; None: not measured."""
    part: str = "model"
    """Counted part of the model, as `Workload.part`."""
    precision: str = "bf16"
    """Precision of the counted memory, as `Workload.precision`."""
    batch: int = 1
    """Number of clips of the counted memory and the measured forward pass."""
    unfused_activations_bytes: int | None = None
    """`activations_bytes` with unfused attention, which makes its matrix of weights; None for a whole model."""
    unfused_training_bytes: int | None = None
    """`training_bytes` with unfused attention, which keeps its matrix of weights; None for a whole model."""
    peak_allocated_bytes: int | None = None
    """Peak bytes allocated by CUDA's allocator in a forward pass of a model (or fusion block) that holds only this
    subset, including weights, in the measured precision; None: not measured, or measured on a CPU."""
    peak_reserved_bytes: int | None = None
    """Peak bytes reserved by the allocator in this pass."""
    unfused_peak_allocated_bytes: int | None = None
    """`peak_allocated_bytes` with unfused attention; None also for a whole model."""
    unfused_peak_reserved_bytes: int | None = None
    """`peak_reserved_bytes` with unfused attention; None also for a whole model."""

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights in the counted precision."""
        return self.weights_bytes_fp32 if self.precision == "fp32" else self.weights_bytes_bf16

    @property
    def inference_bytes(self) -> int:
        """Bytes of weights and activations at inference in the counted precision."""
        return self.weights_bytes + self.activations_bytes

    @property
    def unfused_inference_bytes(self) -> int | None:
        """`inference_bytes` with unfused attention; None for a whole model."""
        return None if self.unfused_activations_bytes is None else self.weights_bytes + self.unfused_activations_bytes


@dataclass(frozen=True)
class Profile:
    """The costs of a recipe's models."""

    recipe: str
    """Name of the recipe."""
    rows: list[Cost]
    """Costs, smallest subsets first, the teacher before the student."""
    notes: list[str]
    """Notes on models that could not be profiled, and published figures to compare with."""
    measured: dict[str, Any] | None = None
    """Device, precision, threads and repeats of the measured columns; None: not measured."""
    workload: Workload = Workload()
    """Counted part and batch."""

    def to_dict(self) -> dict[str, Any]:
        """Return the profile for JSON."""
        rows = [{**asdict(row), "inference_bytes": row.inference_bytes} for row in self.rows]
        return {"recipe": self.recipe, "rows": rows, "notes": self.notes, "measured": self.measured}


def profile_recipe(
    name: str, overrides: Sequence[str] = (), modalities: str | None = None, workload: Workload | None = None
) -> tuple[Profile, list[ProfiledModel]]:
    """Count the costs of a recipe's models.

    Args:
        name: Name or path of the recipe.
        overrides: Overrides of its fields, `a.b=c`.
        modalities: Only this subset, e.g. "V,F"; None: all subsets.
        workload: Part and batch to count; None: whole models, one clip in bf16.

    Returns:
        The profile, and the profiled models.

    Raises:
        UserError: `find_models` raises it, or a modality is unknown or not one of the recipe's.
    """
    load = workload or Workload()
    profiled_models, notes = find_models(name, overrides)
    available = profiled_models[0].modalities  # a student may have fewer modalities than its teacher
    chosen = subsets(available) if modalities is None else [parse_modalities(modalities, available)]
    whole_models = {profiled.role: _meta(profiled, profiled.modalities) for profiled in profiled_models}
    flops = {role: flops_per_clip(model) for role, model in whole_models.items()} if load.part == "model" else {}
    counted: dict[str, Cost] = {}
    rows = []
    for subset in chosen:
        for profiled in profiled_models:
            if not set(subset) <= set(profiled.modalities):
                continue
            sizes = _sizes(profiled, subset)
            if sizes not in counted and load.part == "fusion":
                counted[sizes] = fusion_cost(profiled, subset, whole_models[profiled.role], load)
            elif sizes not in counted:
                counted[sizes] = cost(profiled, subset, flops[profiled.role], load)
            tokens = dict(zip(subset, counted[sizes].tokens.values(), strict=True))
            rows.append(replace(counted[sizes], modalities=subset, tokens=tokens))
    if load.part == "fusion":
        notes = [*notes, *(note for role, model in whole_models.items() for note in _published_notes(role, model))]
    return Profile(profiled_models[-1].run, rows, notes, workload=load), profiled_models


def cost(profiled: ProfiledModel, subset: tuple[str, ...], flops: ClipFlops, workload: Workload | None = None) -> Cost:
    """Count the costs of a model that has `profiled`'s architecture but holds only `subset`.

    Args:
        profiled: Model to count.
        subset: Modalities that the counted model holds.
        flops: FLOPs of the recipe's whole model, by part.
        workload: Precision and batch for counting memory; None: one clip in bf16.
    """
    load = workload or Workload()
    model = _meta(profiled, subset).to(load.dtype)
    clips = meta_clip(profiled.inputs, subset, load.dtype, load.batch)
    present = torch.ones(load.batch, len(subset), dtype=torch.bool)
    return Cost(
        model=profiled.role,
        run=profiled.run,
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


def fusion_cost(profiled: ProfiledModel, subset: tuple[str, ...], whole_model: KarmmaModel, workload: Workload) -> Cost:
    """Count the costs of the fusion block alone, with fused and with unfused attention.

    Args:
        profiled: Model of the block.
        subset: Modalities whose tokens the block gets.
        whole_model: Whole model of the recipe on the meta device; it is not changed.
        workload: Precision and batch for counting memory.
    """
    block = deepcopy(whole_model.fusion_block).to(workload.dtype)
    tokens = {m: whole_model.num_tokens[m] for m in subset}
    in_block = [whole_model.num_tokens[m] for m in modalities_in_block(whole_model, subset)]
    flops, flops_whole = (
        count_flops(block, meta_tokens(block, num))[1] for num in (sum(tokens.values()), sum(in_block))
    )
    tokens_BTD = meta_tokens(block, sum(tokens.values()), workload.batch)
    return Cost(
        model=profiled.role,
        run=profiled.run,
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
    """Return the modalities whose tokens a model's fusion block gets from clips that have `subset`."""
    return subset if model.leaves_out else model.modalities


def _meta(profiled: ProfiledModel, modalities: tuple[str, ...]) -> KarmmaModel:
    return meta_model(profiled.model, profiled.inputs, modalities, profiled.heads).eval()


def _num_parameters(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def _sizes(profiled: ProfiledModel, subset: tuple[str, ...]) -> str:
    """Return a key of all values that costs depend on, so that modalities with equal encoders are counted once."""
    encoders = [
        (profiled.model.encoders[m].model_dump(exclude={"weights"}), input_shape(m, profiled.inputs)) for m in subset
    ]
    return repr((profiled.role, encoders))


def _published_notes(role: str, model: KarmmaModel) -> list[str]:
    """Return a note that compares published and counted memory; empty unless this is the paper's fusion block."""
    recipe, block = model.recipe, model.fusion_block
    num_tokens = [encoder.num_tokens for encoder in model.encoders.values() if isinstance(encoder, Encoder)]
    if (recipe.width, recipe.num_heads, recipe.num_layers, recipe.feedforward, *num_tokens) != _PUBLISHED_SIZES:
        return []

    def counted_gigabytes(fused: bool) -> str:
        lengths = [sum(min(num, tau) for num in num_tokens) for tau in _TABLE_V]
        peaks = [fusion_peak(block, meta_tokens(block, length, FUSION_CLIPS), fused=fused) for length in lengths]
        return " / ".join(f"{peak / 1e9:.2f}" for peak in peaks)

    published = " / ".join(f"{gigabytes:.2f}" for gigabytes in _TABLE_V.values())
    return [
        f"the {role}'s fusion block without token reduction / at tau 300: published {published} GB (arXiv 2504.08578, "
        f"Tab. V); counted at inference with {FUSION_CLIPS} clips in fp32 {counted_gigabytes(fused=False)} GB with "
        f"unfused attention and {counted_gigabytes(fused=True)} GB with fused attention, which this model uses"
    ]
