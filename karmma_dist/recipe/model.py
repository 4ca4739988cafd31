"""The recipe sections that define the model, its objective and its teacher: `model`, `objective` and `distill`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from karmma_dist.errors import nearest, quoted
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe.fields import NOT_LEARNED, Probability
from karmma_dist.settings import PathText, Positive, Settings


class EncoderMemory(Settings):
    """Memory of a frozen encoder's tokens: a training clip's view is encoded once, and read from then on."""

    path: Annotated[PathText, NOT_LEARNED]
    """Folder of the tokens. Runs with the same encoder, shards, inputs and seed may share it."""
    views: Annotated[int, Field(ge=0)] = 4
    """Number of different views of a training clip, which epochs take in turn (epoch modulo views); all memories of a
    model have the same. 0: a new view in each epoch, as without a memory [ours]."""
    dtype: Literal["bfloat16", "float16", "int8", "float32"] = "bfloat16"
    """Type of the stored numbers; int8 has a scale per token. The model is trained on the rounded tokens, also in the
    pass that stores them, so that what is learned does not depend on what was stored before [ours]."""



class EncoderRecipe(Settings):
    """Encoder of one modality."""

    name: str
    """Name in the table of encoders: swin3d_t, swin3d_b, ast_t, stlt, small_video, signal_cnn, hf_vjepa2, ..."""
    frozen: bool = False
    """True: the encoder is not trained and stays in eval mode."""
    weights: PathText | None = None
    """Initial weights: a run's name under `runs_dir`, a run folder, a file (.safetensors, or .pth in a published
    layout), or the URL of such a file, which each node downloads once into its cache. For hf_* and timm_frames a
    published folder with its config.json, or its URL (hf://owner/name@revision). None: random."""
    weights_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the weights file; a file with another hash is refused. None: not checked."""
    weights_ignore: list[str] = []
    """Patterns (`category.*`) of keys that may be missing from the weights, differ in size, or be unknown to the
    encoder. Such parameters are initialised at random or stay unused, and are listed. All other keys must match."""
    activation_checkpointing: Annotated[bool, NOT_LEARNED] = False
    """Keep only the input of each block and recompute the rest in the backward pass: same gradients, less memory, about
    a third more time. Supported by swin3d_*, ast_t and stlt."""
    compile: Annotated[bool, NOT_LEARNED] = False
    """Use torch.compile. Compiling takes minutes: for the first clips, for a second number of clips, and for a single
    clip; no other number is compiled again. Not with ZeRO stage 3, which gathers and frees parameters while the encoder
    runs."""
    options: dict[str, Any] = {}
    """Options of the encoder, e.g. {width: 32}; see the encoder's docstring."""
    memory: EncoderMemory | None = None
    """Memory of the encoder's tokens after the tau-average; the encoder must be frozen. None: every clip is encoded in
    every epoch."""

    @model_validator(mode="after")
    def _only_frozen_is_remembered(self) -> EncoderRecipe:
        if self.memory is not None and not self.frozen:
            raise ValueError("memory is for a frozen encoder: set frozen: true, or remove the memory")
        return self



class ModelRecipe(Settings):
    """Encoders, fusion block and heads (paper, Sec. III-B). The defaults are those of the student."""

    modalities: list[str] | None = None
    """Modalities of this model, for a student with fewer modalities than its teacher (paper, Tab. II): the teacher sees
    all of data.modalities, and every clip keeps at least one of these. None: all of data.modalities."""
    encoders: dict[str, EncoderRecipe] = {}
    """Encoders by modality."""
    fusion: Literal["transformer", "mean", "late", "bottleneck"] = "transformer"
    """Computation from tokens to predictions. `transformer`: the fusion block, a shared layer and a classifier per head
    [paper]. `mean`, for unimodal models: the mean of the encoder's tokens and a linear layer per head; tau and the
    sizes below have no effect [Radevski]. `late`: for each modality the mean of its tokens and a linear layer per head,
    whose predictions are averaged over the present modalities; the sizes below have no effect. `bottleneck`: a
    transformer per modality; they exchange information only through a few bottleneck tokens (arXiv 2107.00135)."""
    tau: Positive = 300
    """Maximum number of tokens of a modality in the fusion block [fit]."""
    grouping: Literal["paper", "even"] = "paper"
    """Sizes of the groups of tokens that are averaged to obtain tau tokens. `paper`: floor(n/tau) each, the last group
    takes the rest [paper]. `even`: groups of even size [ours]."""
    average: Literal["logits", "probabilities"] = "logits"
    """Quantity averaged over the output tokens' predictions per head; the paper does not specify it [ours: logits]. It
    is part of the model: changing it after training changes the predictions."""
    width: Positive = 384
    """Width of the fusion block."""
    num_heads: Positive = 8
    """Number of attention heads of the fusion block [fit]."""
    num_layers: Positive = 1
    """Number of layers of the fusion block."""
    feedforward: Positive = 384
    """Feed-forward width of the fusion block."""
    fc_width: Positive = 768
    """Width of the fully connected layer that the heads share."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on attention weights in the fusion block [paper: teacher 0.3, student 0]."""
    missing: Literal["leave_out", "stand_in", "zeros", "mean", "token", "prompts"] = "stand_in"
    """Treatment of missing modalities. `leave_out`: their tokens are excluded from attention (teacher). `stand_in`:
    learnable tokens replace them (student) [paper]. `zeros`: zeros replace them. `mean`: the training clips' mean token
    at each position replaces them. `token`: one learnable token per modality, repeated at all positions, replaces them,
    and nothing is added to the tokens of present modalities (arXiv 2401.11470). `prompts`: they are excluded from
    attention, and learnable prompts for the set of present modalities precede the tokens (arXiv 2303.03369)."""
    bottleneck_tokens: Positive = 4
    """Number of bottleneck tokens of `fusion: bottleneck` (4 in arXiv 2107.00135)."""
    bottleneck_from: Annotated[int, Field(ge=0)] = 0
    """First layer, counted from 0, that has bottleneck tokens; in the layers before it each modality is alone. Another
    layer must follow, in which the modalities read what the others have written (8 of 12 layers in arXiv 2107.00135;
    ours: 0, since fusion blocks have few layers)."""
    prompt_length: Positive = 16
    """Number of prompts that `missing: prompts` adds at a layer (16 in arXiv 2303.03369)."""
    prompt_layers: Positive | None = None
    """Number of layers, from the first on, at whose input prompts are added. None: half of them, rounded up (6 of 12 in
    arXiv 2303.03369)."""

    @property
    def num_views(self) -> int:
        """Number of different views of a training clip; 0: a new one in each epoch."""
        return next((encoder.memory.views for encoder in self.encoders.values() if encoder.memory is not None), 0)

    @property
    def num_prompt_layers(self) -> int:
        """Number of layers at whose input `missing: prompts` adds prompts."""
        return (self.num_layers + 1) // 2 if self.prompt_layers is None else self.prompt_layers

    @model_serializer(mode="wrap")
    def _without_default_options(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out options of one value of `fusion` or `missing` at their defaults: other models do not have them."""
        tree: dict[str, Any] = handler(self)
        defaults = {name: type(self).model_fields[name].default for name in _OPTION_OF}
        return {name: value for name, value in tree.items() if name not in defaults or value != defaults[name]}

    @model_validator(mode="after")
    def _fits_together(self) -> ModelRecipe:
        unknown = next((name for name in self.encoders if name not in MODALITIES), None)
        if unknown is not None:
            advice = f"{nearest(unknown[:60], list(MODALITIES))}; known are {', '.join(MODALITIES)}"
            raise ValueError(f"encoders: unknown modality {quoted(unknown)}{advice}")
        views = {name: encoder.memory.views for name, encoder in self.encoders.items() if encoder.memory is not None}
        if len(set(views.values())) > 1:
            shown = ", ".join(f"{name} {num}" for name, num in views.items())
            raise ValueError(f"encoders: memories of one model must have the same number of views, not {shown}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        self._check_fusion_and_missing()
        return self

    def _check_fusion_and_missing(self) -> None:
        fusion, missing = self.fusion, self.missing
        if fusion == "late" and missing != "leave_out":
            raise ValueError(
                f"fusion late averages the predictions of present modalities, so that nothing replaces missing ones: "
                f"set missing: leave_out, not {missing}"
            )
        if fusion == "mean" and missing not in ("leave_out", "stand_in"):
            raise ValueError(f"fusion mean is for one modality, which is never missing: remove missing: {missing}")
        if missing == "prompts" and fusion != "transformer":
            raise ValueError(f"missing prompts is for fusion transformer, not for {fusion}")
        for option, (field, value) in _OPTION_OF.items():
            if option in self.model_fields_set and getattr(self, field) != value:
                raise ValueError(f"{option} is an option of {field} {value}, not of {getattr(self, field)}: remove it")
        if fusion == "bottleneck" and self.bottleneck_from + 2 > self.num_layers:
            raise ValueError(
                f"bottleneck_from {self.bottleneck_from} with num_layers {self.num_layers}: modalities write into the "
                f"bottleneck in one layer and read in the next: set num_layers to {self.bottleneck_from + 2} or more"
            )
        if missing == "prompts" and self.num_prompt_layers > self.num_layers:
            raise ValueError(f"prompt_layers {self.prompt_layers} exceeds num_layers {self.num_layers}")


_OPTION_OF = {
    "bottleneck_tokens": ("fusion", "bottleneck"), "bottleneck_from": ("fusion", "bottleneck"),
    "prompt_length": ("missing", "prompts"), "prompt_layers": ("missing", "prompts"),
}  # fmt: skip
"""The field and its value to which an option belongs."""



class ObjectiveRecipe(Settings):
    """Objective that training minimises instead of the default of the stage."""

    name: str
    """Name in the table of objectives: cross_entropy, distillation, hard_combinations (arXiv 2304.08028), or an
    objective of another package."""
    options: dict[str, Any] = {}
    """Options of the objective; see its class."""


class DistillRecipe(Settings):
    """Distillation, stage 2 of the method: alpha * CE + (1 - alpha) * KL(teacher || student)."""

    teacher: PathText | None = None
    """Finished run of the teacher: its name under `runs_dir`, or a run folder."""
    alpha: Probability = 0.7
    """Weight of the cross-entropy; 1.0 means no distillation [fit]."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of both distributions; the KL is scaled by its square [ours]."""
    teachers: list[PathText] = []
    """Finished experts, each for some of the modalities, to average instead of a single `teacher` (arXiv 2307.07483):
    runs, or their best weights (`RUN/best`). Each clip is classified by the experts for at least one of its
    modalities."""
    expert_weights: Literal["softmin", "per_sample", "equal"] = "softmin"
    """Weights of the experts per head [Radevski]. `softmin`: softmin of their loss on held-out training clips
    (data.hold_out) divided by weight_temperature. `per_sample`: the same with their loss on the clip itself. `equal`:
    equal weights. The validation split is not used, since it would then select the model that it measures."""
    weight_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the experts' weights: at low values only the best expert counts, at high values all count equally
    [ours: 1]."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """Quantity averaged over the experts: class probabilities [ours], or logits [Radevski]."""
    memory: Annotated[PathText | None, NOT_LEARNED] = None
    """Folder in which the teacher's answers are remembered. A run reads the answers that are there and adds those that
    are not, at no extra cost; what it learns does not change. The answers are of one teacher, seed and set of views;
    students, alpha and temperature may differ, and with `memory_subsets: all` modality dropout. None: the teacher is
    asked in every step."""
    memory_subsets: Annotated[Literal["drawn", "all"], NOT_LEARNED] = "drawn"
    """Sets of a clip's modalities whose answers the memory holds. `drawn`: the set that modality dropout keeps; 802
    bytes per clip and epoch on Epic-Kitchens in bf16, found by runs with the same modality dropout. `all`: all subsets
    of the clip's modalities, found by runs with any modality dropout; 5.6 kB (7 subsets x 397 classes x 2 bytes). A run
    that stores them reads every modality of its clips, and its teacher encodes a clip once and fuses it once per
    subset."""
    shard_teacher: Annotated[bool, NOT_LEARNED] = False
    """True: shard the teacher's parameters over the ranks (ZeRO-3) and gather them layer by layer, for teachers that do
    not fit on one device. False: every rank holds the full teacher."""

    @property
    def names(self) -> list[str]:
        """Runs of the single teacher or of the experts."""
        return self.teachers or [str(self.teacher)]

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> DistillRecipe:
        if (self.teacher is None) == (not self.teachers):
            raise ValueError("set either 'teacher', or several experts in 'teachers'")
        twice = next((name for name in self.teachers if self.teachers.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"teachers lists '{twice}' twice")
        return self
