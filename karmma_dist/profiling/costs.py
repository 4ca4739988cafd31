"""A recipe's models, and what each costs on every subset of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from karmma_dist.modality import parse_modalities, subsets
from karmma_dist.models.layout import input_shape
from karmma_dist.profiling.flops import ClipFlops, flops_per_clip, meta_clip, meta_model
from karmma_dist.profiling.memory import inference_peak, training_peak
from karmma_dist.profiling.subjects import Subject, find_subjects


@dataclass(frozen=True)
class Cost:
    """One model on one subset of modalities: of one clip, and of a model that holds this subset only (as published).

    Memory is counted in bfloat16 with one clip; see `memory.py` for what is seen of it.
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

    @property
    def inference_bytes(self) -> int:
        """Weights and activations at inference, bfloat16."""
        return self.weights_bytes_bf16 + self.activations_bytes


@dataclass(frozen=True)
class Profile:
    """All rows of a recipe."""

    recipe: str
    """Its name."""
    rows: list[Cost]
    """Smallest subsets first; the teacher before the student."""
    notes: list[str]
    """What could not be profiled, and why."""
    measured: dict[str, Any] | None = None
    """Device, precision, threads and repeats of the measured columns."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rows = [{**asdict(row), "inference_bytes": row.inference_bytes} for row in self.rows]
        return {"recipe": self.recipe, "rows": rows, "notes": self.notes, "measured": self.measured}


def profile_recipe(
    name: str, overrides: Sequence[str] = (), modalities: str | None = None
) -> tuple[Profile, list[Subject]]:
    """Count what a recipe's models cost.

    Args:
        name: Recipe.
        overrides: `a.b=c`.
        modalities: Only this subset, e.g. "V,F"; None: all of them.

    Returns:
        The profile, and the models it is of.

    Raises:
        UserError: as `find_subjects`; a modality that is unknown or that the recipe does not have.
    """
    subjects, notes = find_subjects(name, overrides)
    available = subjects[-1].modalities
    chosen = subsets(available) if modalities is None else [parse_modalities(modalities, available)]
    whole = [flops_per_clip(meta_model(s.model, s.inputs, s.modalities, s.heads)) for s in subjects]
    known: dict[str, Cost] = {}
    rows = []
    for subset in chosen:
        for subject, flops in zip(subjects, whole, strict=True):
            like = _sizes(subject, subset)
            found = known[like] if like in known else cost(subject, subset, flops)
            known[like] = found
            rows.append(replace(found, modalities=subset, tokens=dict(zip(subset, found.tokens.values(), strict=True))))
    return Profile(subjects[-1].run, rows, notes), subjects


def cost(subject: Subject, subset: tuple[str, ...], flops: ClipFlops) -> Cost:
    """What a model of `subject`'s architecture that holds only `subset` costs per clip.

    Args:
        subject: The model.
        subset: Modalities.
        flops: Of the recipe's whole model, by part.
    """
    model = meta_model(subject.model, subject.inputs, subset, subject.heads).to(torch.bfloat16).eval()
    clip = meta_clip(subject.inputs, subset, torch.bfloat16)
    present = torch.ones(1, len(subset), dtype=torch.bool)
    sizes = {p: p.numel() for p in model.parameters()}
    return Cost(
        model=subject.role,
        run=subject.run,
        modalities=subset,
        gflops=flops.alone(subset) / 1e9,
        gflops_whole_model=flops.forward(dict.fromkeys(subset, 1), 1) / 1e9,
        params_total=sum(sizes.values()),
        params_trainable=sum(size for p, size in sizes.items() if p.requires_grad),
        tokens=model.num_tokens,
        weights_bytes_bf16=2 * sum(sizes.values()),
        weights_bytes_fp32=4 * sum(sizes.values()),
        activations_bytes=inference_peak(model, clip, present),
        training_bytes=training_peak(model, clip, present),
    )


def _sizes(subject: Subject, subset: tuple[str, ...]) -> str:
    """All that costs depend on, so that flow need not be counted where it is encoded as video is."""
    encoders = [
        (subject.model.encoders[m].model_dump(exclude={"weights"}), input_shape(m, subject.inputs)) for m in subset
    ]
    return repr((subject.role, encoders))
