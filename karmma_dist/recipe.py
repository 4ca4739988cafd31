"""The typed recipe: everything a run depends on, read from YAML, checked in one place, saved with the run.

    recipe = load_recipe("epic_kitchens/distill", ["training.epochs=10"])

A tag says where a field's default is from: [paper], read in arXiv 2504.08578; [fit], forced by or inferred from its
published figures; [Radevski], the code of arXiv 2307.07483, on which its authors build; [ours], our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, ConfigDict, Field, model_validator

from karmma_dist.errors import UserError
from karmma_dist.modalities import MODALITIES
from karmma_dist.modalities.audio import AudioInput
from karmma_dist.modalities.detections import DetectionsInput
from karmma_dist.modalities.video import VideoInput
from karmma_dist.settings import Positive, Settings, check_other_sections, dump, find_file, load_settings, mark

_SHARED_OVERRIDES = ("runs_dir", "data.shards", "data.cache_dir", "data.cache_bytes", "data.num_workers")

Probability = Annotated[float, Field(ge=0, le=1)]

NOT_LEARNED = mark("not_learned")
"""Mark of the fields and sections that change neither the weights a run ends with (but for rounding) nor those in
best/: where things are, speed, memory, logs, checkpoints, limits, and what comes after training. They may change when a
run is resumed, and are no part of the name of a study's run; all others are refused."""


class InputRecipe(Settings):
    """What each modality's tensor looks like. Teacher and student of a distillation share it.

    Modalities of other packages have sections of their own, checked by their `settings`.
    """

    model_config = ConfigDict(extra="allow")

    video: VideoInput = VideoInput()
    """Video and flow: same frames, same crop."""
    audio: AudioInput = AudioInput()
    """Sound."""
    detections: DetectionsInput = DetectionsInput()
    """Boxes."""

    @model_validator(mode="after")
    def _other_sections(self) -> InputRecipe:
        check_other_sections(self, {m.section: m.settings for m in MODALITIES.values()}, "inputs.")
        return self

    def section(self, modality: str) -> Any:
        """Return the settings of a modality."""
        kind = MODALITIES[modality]
        found = getattr(self, kind.section, None)
        return kind.settings() if found is None else found


class ModalityDropout(Settings):
    """Training-time modality dropout: decided once per clip, before decoding, for teacher and student alike."""

    probability: Probability = 0.0
    """Probability that a modality is dropped; at least one that the clip has is kept [paper: 0.5]."""
    draw: Literal["independent", "stratified"] = "stratified"
    """`independent`: each clip on its own [paper]. `stratified`: every run of 2^M positions holds each pattern in
    proportion to its probability, shuffled: the same distribution per clip, no rank slower than others [ours]."""


class OrderRecipe(Settings):
    """Which clips meet in a batch: any of the split, or, where whole shards are fetched, those of a few shards.

    Leave both at 0 where shards lie on a file system, or where every node's cache holds the whole split. On an object
    store take the number of nodes (or a multiple) as `lanes`, so that a node fetches only its own part of the shards,
    each once per epoch, and the `window` that the cache allows: a node holds at most 2 x window shards per lane. Mixing
    goes by lanes x window, the shards a batch is drawn from: two clips that shared a batch share one again in the next
    epoch as often as in a random order from 64 shards, 1.25 to 1.5 times from 16, 8 times from 4 (512 clips each).
    """

    lanes: Annotated[int, Field(ge=0)] = 0
    """Equal parts of every batch, each with shards of its own; must divide training.batch_size. 0: one permutation of
    all clips [ours]."""
    window: Annotated[int, Field(ge=0)] = 0
    """Shards of a lane whose clips are mixed with each other. Needs lanes [ours]."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> OrderRecipe:
        if (self.lanes == 0) != (self.window == 0):
            raise ValueError(f"lanes {self.lanes} with window {self.window}: set both, or leave both at 0")
        return self


class DataRecipe(Settings):
    """Which clips, in which form."""

    shards: str
    """Folder of packed shards, or the URL of one: https://..., s3://..., or another that fsspec opens."""
    cache_dir: Annotated[str | None, NOT_LEARNED] = None
    """Folder on this node that shards from a URL are kept in; None: $KARMMA_DIST_CACHE or ~/.cache/karmma-dist."""
    cache_bytes: Annotated[ByteSize, Field(gt=0), NOT_LEARNED] = ByteSize(200_000_000_000)
    """Size the cache stays below: bytes, or a string such as "200 GB". The least recently used shards go first."""
    keep_decoded: Annotated[ByteSize, NOT_LEARNED] = ByteSize(0)
    """Bytes of decoded clips (frames at short_side, sound, boxes) that each decoding process may keep in memory, or a
    string such as "2 GB": a dataset that fits is decoded once, and batches stay the same bit for bit. 0: none."""
    train_split: str = "train"
    """Split to learn from."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training recordings not learned from, drawn by a hash of the recording, the same in every run:
    clips of one recording stay together. What experts are weighed on (distill.expert_weights)."""
    validation_split: str = "validation"
    """Split to validate on during training. The training split: the clips that hold_out holds out of it."""
    test_split: Annotated[str | None, NOT_LEARNED] = None
    """Split that `karmma-dist eval` takes by default; None: the validation split."""
    modalities: list[str] = ["video", "flow", "audio"]
    """Modalities the model uses, of those the shards declare."""
    heads: Annotated[dict[str, Positive], NOT_LEARNED] = {}
    """Number of classes per head, e.g. {verb: 97, noun: 300}: what `profile` goes by before there are shards. Training
    refuses shards of other classes. Empty: whatever the shards have."""
    modality_dropout: ModalityDropout = ModalityDropout()
    """Training-time modality dropout."""
    order: OrderRecipe = OrderRecipe()
    """How clips are mixed."""
    num_workers: Annotated[int, Field(ge=0), NOT_LEARNED] = 1
    """Decoding processes per rank."""
    stall_s: Annotated[float, Field(ge=0), NOT_LEARNED] = 120
    """Seconds without a batch after which the run ends and says what the decoding process is at; 0: it waits for ever.
    Needs num_workers of 1 or more."""
    max_damaged_fraction: Annotated[Probability, NOT_LEARNED] = 0.001
    """Damaged clips tolerated, as a fraction of the split, before the run ends with a list."""
    drop_nouns: list[int] = []
    """Validation clips of these noun classes are left out: Epic-Kitchens nouns that never occur in training [paper]."""

    @model_validator(mode="after")
    def _known_modalities(self) -> DataRecipe:
        unknown = [m for m in self.modalities if m not in MODALITIES]
        if unknown:
            raise ValueError(f"unknown modality '{unknown[0]}'; there are {', '.join(MODALITIES)}")
        if not self.modalities:
            raise ValueError("modalities is empty: name at least one")
        order = [m for m in MODALITIES if m in self.modalities]
        if order != self.modalities:
            raise ValueError(f"modalities must be listed once each and in this order: {', '.join(order)}")
        return self


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


class OptimizerRecipe(Settings):
    """Optimizer and learning-rate schedule, in epochs of optimizer steps."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW [paper], or plain SGD without momentum, for tests of exactness."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate, reached after warm-up [ours]."""
    start_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the first and at the last step [paper: back to the start value; ours: 1e-6]."""
    lr_batch_size: Positive | None = None
    """Batch size that `lr` and `start_lr` were chosen for; None: training.batch_size, whatever that is."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How both rates change where training.batch_size is not lr_batch_size: not at all, with the square root of the
    ratio (AdamW's rule, arXiv 2205.10287), or in proportion (SGD's)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """From `lr` back to `start_lr` after warm-up: along a cosine [paper], or a straight line [Radevski]."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    """Epochs of linear warm-up; may be a fraction [paper]."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay [paper: teacher 0.05, student 0.01]."""
    decay_norms: bool = False
    """Also decay norms, biases and learnable tokens [ours: no]."""
    clip: Annotated[float, Field(ge=0)] = 2.0
    """Largest norm of the whole gradient; 0 switches clipping off [paper: teacher 1.0, student 2.0]."""

    def rate_factor(self, batch_size: int) -> float:
        """Return what both rates are multiplied by at a batch size, in clips per optimizer step."""
        if self.lr_batch_size is None:
            return 1.0
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        return float((batch_size / self.lr_batch_size) ** power)

    @model_validator(mode="after")
    def _scaling_has_a_base(self) -> OptimizerRecipe:
        if self.lr_scaling != "none" and self.lr_batch_size is None:
            raise ValueError(f"lr_scaling {self.lr_scaling} has no effect without lr_batch_size: say what lr is for")
        return self


class TrainingRecipe(Settings):
    """The loop."""

    epochs: Positive = 100
    """Passes over the training clips [paper]."""
    batch_size: Positive = 32
    """Clips per optimizer step, over all ranks and accumulation steps [paper: teacher 32, student 6]."""
    max_micro_batch_size: Annotated[Positive | None, NOT_LEARNED] = None
    """Most clips per rank and forward pass: the accumulation follows from it and the number of ranks, so that a recipe
    runs on one device as on many. None: no limit."""
    accumulation: Annotated[Positive | None, NOT_LEARNED] = None
    """Forward passes per optimizer step on each rank, whatever max_micro_batch_size says. None: the fewest equal ones
    within that limit; without a limit, 1. The clips of a step are the same for any number."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto`: bf16 on a GPU, fp32 on a CPU."""
    zero_stage: Annotated[int, Field(ge=0, le=3), NOT_LEARNED] = 1
    """DeepSpeed ZeRO stage: 0 nothing sharded, 1 optimizer state, 2 + gradients, 3 + parameters."""
    checkpoint_every_epochs: Annotated[Positive, NOT_LEARNED] = 1
    """Epochs between checkpoints. The last epoch always saves."""
    keep_checkpoints: Annotated[Positive, NOT_LEARNED] = 2
    """Newest checkpoints kept."""
    validate_every_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs between validations with every modality present; 0: only after the last epoch."""
    log_every_steps: Annotated[Positive, NOT_LEARNED] = 10
    """Optimizer steps between lines of metrics.jsonl."""
    threads: Annotated[int, Field(ge=0), NOT_LEARNED] = 0
    """CPU threads of the model per rank; 0 leaves it to torch."""
    best_metric: str = "action_top1"
    """Validation metric whose best weights are kept in best/, e.g. noun_top5 or verb_loss (of losses the lowest)."""
    offload: Annotated[Literal["none", "optimizer", "parameters"], NOT_LEARNED] = "none"
    """What rests in CPU memory instead of the GPU's: nothing, the optimizer state (ZeRO 1 to 3), or the optimizer state
    and the parameters (ZeRO 3)."""
    peak_tflops: Annotated[Annotated[float, Field(gt=0)] | None, NOT_LEARNED] = None
    """Peak of one device in the training precision, in 1e12 FLOP/s, for the MFU; None: known for common GPUs."""
    profile_steps: Annotated[tuple[Annotated[int, Field(ge=0)], Positive] | None, NOT_LEARNED] = None
    """[start, stop]: trace optimizer steps start to stop - 1, counted from 0, into trace/rank0.json.gz."""
    max_skipped_steps: Annotated[Positive, NOT_LEARNED] = 5
    """Optimizer steps in a row whose loss or gradient is not finite before the run gives up; each is left out."""
    guard_every_steps: Annotated[int, Field(ge=0), NOT_LEARNED] = 1000
    """Steps from one comparison of the ranks' graphs to the next, after that of the first step; 0: only that one."""
    collective_timeout_s: Annotated[float, Field(ge=2), NOT_LEARNED] = 60
    """Seconds after which a training step that waits for a rank ends the job with that rank's name; a process that is
    gone is noticed in half of it. A process's first step, validation and saving may take ten minutes."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), NOT_LEARNED] = 0
    """Optimizer steps between checkpoints, counted from the beginning, beside those of whole epochs; 0: none."""
    keep_every_epochs: Annotated[int, Field(ge=0), NOT_LEARNED] = 0
    """Checkpoints of every so many epochs are kept for good, beside the newest ones; 0: none."""

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainingRecipe:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload} needs zero_stage {needed}{' or more' if needed < 3 else ''}")
        if self.profile_steps is not None and self.profile_steps[0] >= self.profile_steps[1]:
            raise ValueError("profile_steps [{}, {}]: start must come before stop".format(*self.profile_steps))
        return self


class ViewsRecipe(Settings):
    """How often `karmma-dist eval` looks at a clip: temporal x spatial views, their class probabilities averaged."""

    temporal: Positive = 1
    """Samplings spread evenly over the clip: offsets within the segments, or places of the dense window."""
    spatial: Literal[1, 3] = 1
    """Crops: the centre, or the start, centre and end of the longer side."""

    @property
    def num(self) -> int:
        """Views of a clip."""
        return self.temporal * self.spatial


class EvaluationRecipe(Settings):
    """How evaluation batches are formed."""

    batch_size: Positive = 16
    """Clips per batch and rank; the answers do not depend on it. Where clips have several views, the views per batch
    (at least one clip's)."""
    annotations: str | None = None
    """Folder with Epic-Kitchens' lists of tail classes and unseen participants: figures over their clips are added."""
    views: ViewsRecipe = ViewsRecipe()
    """Views of a clip in `karmma-dist eval`. Validation during training looks once."""


class SlurmRecipe(Settings):
    """Flags `launch --slurm` hands to sbatch."""

    script: str = "distill.sh"
    """Script of the slurm/ folder."""
    nodes: Positive = 2
    """Nodes."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs, and so ranks, per node; 0: one rank per node, on its CPUs."""
    cpus_per_task: Positive | None = None
    """CPU cores per rank: one for the model and data.num_workers to decode; None: the script's."""
    time: str | None = None
    """Time limit as sbatch takes it, e.g. 2-00:00:00."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    extra: list[str] = []
    """Further sbatch flags, e.g. ["--qos=high"]."""


class Recipe(Settings):
    """One run."""

    name: str
    """The run's name: its folder under `runs_dir`."""
    runs_dir: Annotated[str, NOT_LEARNED] = "runs"
    """Folder of all runs."""
    stage: Literal["supervised", "teacher", "distill"]
    """`supervised`: a model on labels alone. `teacher`: the same on frozen encoders. `distill`: a student taught online
    by a finished teacher."""
    after: Annotated[list[str], NOT_LEARNED] = []
    """Recipes whose runs this one builds on. Those not finished yet are trained first, on the same ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Every random choice of the run follows from this."""
    data: DataRecipe
    """Clips."""
    inputs: InputRecipe = InputRecipe()
    """Tensors."""
    model: ModelRecipe
    """The model that is trained."""
    distill: DistillRecipe | None = None
    """Required by the distill stage, refused by the others."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    """Optimizer."""
    training: TrainingRecipe = TrainingRecipe()
    """Loop."""
    evaluation: Annotated[EvaluationRecipe, NOT_LEARNED] = EvaluationRecipe()
    """Evaluation."""
    slurm: Annotated[SlurmRecipe, NOT_LEARNED] = SlurmRecipe()
    """Submission."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def modalities(self) -> list[str]:
        """Modalities of the model that is trained: model.modalities, or all of data.modalities."""
        return self.data.modalities if self.model.modalities is None else self.model.modalities

    def find_run(self, name: str) -> Path:
        """A run that this recipe refers to: an existing path, or a name under `runs_dir`."""
        return Path(name) if Path(name).exists() else Path(self.runs_dir) / name

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.stage == "distill" and self.distill is None:
            raise ValueError("stage distill needs a section 'distill' naming its teacher")
        if self.stage != "distill" and self.distill is not None:
            raise ValueError(f"stage {self.stage} has no use for the section 'distill': remove it")
        self._check_modalities()
        missing = [m for m in self.modalities if m not in self.model.encoders]
        if missing:
            raise ValueError(f"model.encoders has no entry for modality '{missing[0]}'")
        compiled = [m for m in self.modalities if self.model.encoders[m].compile]
        if compiled and self.training.zero_stage == 3:
            raise ValueError(
                f"model.encoders.{compiled[0]}.compile does not go with training.zero_stage 3, whose parameters come "
                "and go while an encoder runs: switch one of them off"
            )
        trained = [m for m in self.modalities if not self.model.encoders[m].frozen]
        if self.stage == "teacher" and trained:
            raise ValueError(f"stage teacher keeps its encoders frozen: set model.encoders.{trained[0]}.frozen: true")
        if self.optimizer.warmup_epochs > self.training.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs {self.optimizer.warmup_epochs:g} exceeds "
                f"training.epochs {self.training.epochs}"
            )
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            raise ValueError(f"name '{self.name}' must stay inside runs_dir")
        return self

    def _check_modalities(self) -> None:
        own, shown = self.modalities, self.data.modalities
        if not own or own != [m for m in shown if m in own]:
            raise ValueError(
                f"model.modalities {', '.join(own) or 'is empty'}: name some of data.modalities, in their order: "
                f"{', '.join(shown)}"
            )
        if own != shown and self.stage != "distill":
            unused = ", ".join(m for m in shown if m not in own)
            raise ValueError(f"stage {self.stage} has no teacher to see {unused}: take it out of data.modalities too")
        if self.model.fusion == "mean" and len(own) > 1:
            raise ValueError(f"model.fusion mean is for one modality, not for {', '.join(own)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or by name under `recipes/` (`demo/distill`), with `a.b=c` overrides applied.

    Raises:
        UserError: no such file, unknown key (with the nearest), wrong value.
    """
    return load_settings(find_file(name, "recipes"), Recipe, list(overrides))


def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that say where things are, and so hold for every recipe of a chain."""
    return [text for text in overrides if text.partition("=")[0].strip() in _SHARED_OVERRIDES]


def load_chain(name: str, overrides: Sequence[str] = ()) -> list[Recipe]:
    """A recipe preceded by all it comes `after`, in the order to train them, each once.

    Overrides of where things are (`runs_dir`, `data.shards`, its cache, `data.num_workers`) hold for all of them, the
    others for the last alone.

    Raises:
        UserError: as `load_recipe`, or recipes that wait for each other.
    """
    shared = shared_overrides(overrides)
    chain: list[Recipe] = []

    def visit(name: str, overrides: Sequence[str], waiting: tuple[str, ...]) -> None:
        recipe = load_recipe(name, overrides)
        if recipe.name in waiting:
            raise UserError(f"recipes wait for each other: {' -> '.join([*waiting, recipe.name])}")
        for earlier in recipe.after:
            visit(earlier, shared, (*waiting, recipe.name))
        if recipe.name not in [done.name for done in chain]:
            chain.append(recipe)

    visit(name, overrides, ())
    return chain


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default spelled out."""
    path.write_text(dump(recipe))


def read_run_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        UserError: the folder holds none.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder: it holds no recipe.yaml")
    return load_settings(path, Recipe)
