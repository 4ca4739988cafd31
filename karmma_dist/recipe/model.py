"""The sections of a recipe that say what is trained and who teaches it: `model` and `distill`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from karmma_dist.recipe.fields import NOT_LEARNED, Probability
from karmma_dist.settings import Positive, Settings


class EncoderRecipe(Settings):
    """One modality's encoder."""

    name: str
    """Name in the encoder table: swin3d_t, swin3d_b, ast_t, stlt, small_video, small_audio, ..."""
    frozen: bool = False
    """Do not train it; it stays in eval mode."""
    weights: str | None = None
    """Starting weights: a run's name under `runs_dir`, a run folder, a file (.safetensors, or .pth in a published
    layout), or the URL of such a file, which each node downloads once into its cache. None: random."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """What the weights file must hash to; any other is refused. None: not checked."""
    weights_ignore: list[str] = []
    """Patterns (`category.*`) of the encoder's keys that need not be in the weights, be of the right size there, or be
    known: they start at random, or stay unused, and are listed. All others must fit."""
    activation_checkpointing: Annotated[bool, NOT_LEARNED] = False
    """Keep only what goes into each block and compute the rest again in the backward pass: same gradients, less memory,
    about a third more time. swin3d_*, ast_t and stlt can."""
    compile: Annotated[bool, NOT_LEARNED] = False
    """Run it through torch.compile: takes minutes for the first clips, for another number of them and for a single one;
    after that for no number. Not with ZeRO stage 3, whose sharded parameters come and go while the encoder runs."""
    options: dict[str, Any] = {}
    """Sizes the encoder takes, e.g. {width: 32}; see the encoder's docstring."""



class ModelRecipe(Settings):
    """Encoders, fusion block and heads (paper, Sec. III-B). Defaults are the student's."""

    modalities: list[str] | None = None
    """Modalities this model takes, where a student takes fewer than its teacher (paper, Tab. II): the teacher sees all
    of data.modalities, and every clip keeps at least one of these. None: all of data.modalities."""
    encoders: dict[str, EncoderRecipe] = {}
    """One encoder per modality."""
    fusion: Literal["transformer", "mean"] = "transformer"
    """What turns tokens into predictions: `transformer`, the fusion block, a shared layer and a classifier per head
    [paper]; `mean`, for a model of one modality: the mean of its encoder's tokens and a linear layer per head, without
    tau and all sizes below [Radevski]."""
    tau: Positive = 300
    """Most tokens a modality brings to the fusion block [fit]."""
    grouping: Literal["paper", "even"] = "paper"
    """Groups averaged down to tau tokens: floor(n/tau) each, the last takes the rest [paper]; or even ones [ours]."""
    average: Literal["logits", "probabilities"] = "logits"
    """What of the output tokens' predictions is averaged per head: the paper does not say [ours: logits]. It is part of
    the model: switching it after training changes what a model answers."""
    width: Positive = 384
    """Width of the fusion block."""
    num_heads: Positive = 8
    """Attention heads of the fusion block [fit]."""
    num_layers: Positive = 1
    """Layers of the fusion block."""
    feedforward: Positive = 384
    """Feed-forward width of the fusion block."""
    fc_width: Positive = 768
    """Width of the fully connected layer the heads share."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on attention weights in the fusion block [paper: teacher 0.3, student 0]."""
    missing: Literal["leave_out", "stand_in"] = "stand_in"
    """Absent tokens are left out of attention (teacher), or learnable ones stand in for them (student) [paper]."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelRecipe:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        return self



class ObjectiveRecipe(Settings):
    """What training minimises, where that is not what the stage says."""

    name: str
    """Name in the table of objectives: cross_entropy, distillation, or one of another package."""
    options: dict[str, Any] = {}
    """What it takes; see its class."""


class DistillRecipe(Settings):
    """Stage 2: alpha * CE + (1 - alpha) * KL(teacher || student)."""

    teacher: str | None = None
    """The finished teacher: a run's name under `runs_dir`, or a run folder."""
    alpha: Probability = 0.7
    """Weight of the cross-entropy; 1.0 is no distillation [fit]."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softens both distributions; the KL is scaled by its square [ours]."""
    teachers: list[str] = []
    """Instead of `teacher`: finished experts of some of the modalities each, averaged (arXiv 2307.07483): runs, or
    their best weights (`RUN/best`). A clip is judged by the experts that it has a modality for."""
    expert_weights: Literal["softmin", "per_sample", "equal"] = "softmin"
    """How experts are weighed per head: `softmin` of their loss on the training clips that they held out
    (data.hold_out) over weight_temperature; `per_sample`, the same of their loss on the clip itself; `equal`
    [Radevski]. Never by the validation split, which would then choose the model that it measures."""
    weight_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of the experts' weights: low, the best expert counts alone; high, all count alike [ours: 1]."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What of the experts is averaged: class probabilities [ours], or logits [Radevski]."""
    shard_teacher: Annotated[bool, NOT_LEARNED] = False
    """Keep the teacher's parameters in pieces over the ranks (ZeRO-3) and gather them layer by layer: for teachers that
    do not fit on one device. Off: every rank holds all of it."""

    @property
    def names(self) -> list[str]:
        """Runs that teach: the one teacher, or the experts."""
        return self.teachers or [str(self.teacher)]

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> DistillRecipe:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("name either one 'teacher', or several experts in 'teachers'")
        twice = next((name for name in self.teachers if self.teachers.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"teachers names '{twice}' twice")
        return self
