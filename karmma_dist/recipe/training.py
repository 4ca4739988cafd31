"""The recipe sections that define how a model is trained: `optimizer` and `training`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from karmma_dist.recipe.fields import NOT_LEARNED
from karmma_dist.settings import Positive, Seconds, Settings


class OptimizerRecipe(Settings):
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW [paper], or plain SGD without momentum, meant for exactness tests."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Highest learning rate, reached after warm-up [ours]."""
    start_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Learning rate at the first step of the warm-up and at the last step of the run, unless it is the only one [paper:
    back to the start value; ours: 1e-6]."""
    lr_batch_size: Positive | None = None
    """Batch size that `lr` and `start_lr` were chosen for; None: training.batch_size."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Scaling of both learning rates by the ratio of training.batch_size to lr_batch_size: none, by its square root
    (rule for AdamW, arXiv 2205.10287), or linear (rule for SGD)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Decay from `lr` back to `start_lr` after warm-up: cosine [paper], or linear [Radevski]."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    """Epochs of linear warm-up; may be fractional [paper]."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decoupled weight decay [paper: teacher 0.05, student 0.01]."""
    decay_norms: bool = False
    """True: also decay norms, biases, learnable tokens and position tables [ours: no]."""
    clip: Annotated[float, Field(ge=0)] = 2.0
    """Maximum norm of the full gradient; 0 disables clipping [paper: teacher 1.0, student 2.0]."""

    def rate_factor(self, batch_size: int) -> float:
        """Return the factor for both learning rates at a batch size, in clips per optimizer step."""
        if self.lr_batch_size is None:
            return 1.0
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        return float((batch_size / self.lr_batch_size) ** power)

    @model_validator(mode="after")
    def _scaling_has_a_base(self) -> OptimizerRecipe:
        if self.lr_scaling != "none" and self.lr_batch_size is None:
            raise ValueError(f"lr_scaling {self.lr_scaling} has no effect without lr_batch_size: set both")
        return self



class TrackerRecipe(Settings):
    """A tracker of metrics."""

    name: str
    """Name in the table of trackers: tensorboard, wandb, mlflow, trackio, or a tracker of another package."""
    options: dict[str, Any] = {}
    """Options of the tracker, e.g. {project: epic, server: "https://api.wandb.ai"}; see its class."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value



class TrainingRecipe(Settings):
    """Training loop, precision, sharding, checkpoints and limits."""

    epochs: Positive = 100
    """Number of passes over the training clips [paper]."""
    batch_size: Positive = 32
    """Clips per optimizer step, over all ranks and accumulation steps [paper: teacher 32, student 6]."""
    max_micro_batch_size: Annotated[Positive | None, NOT_LEARNED] = None
    """Maximum number of clips per rank and forward pass. The gradient accumulation follows from it and the number of
    ranks, so that a recipe runs on one device as well as on many. None: no limit."""
    accumulation: Annotated[Positive | None, NOT_LEARNED] = None
    """Forward passes per optimizer step on each rank; overrides max_micro_batch_size. None: the smallest number of
    equal passes within that limit, or 1 without a limit. The clips of a step do not depend on it."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Training precision; `auto`: bf16 on a GPU, fp32 on a CPU."""
    zero_stage: Annotated[int, Field(ge=0, le=3), NOT_LEARNED] = 1
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 also gradients, 3 also parameters."""
    checkpoint_every_epochs: Annotated[Positive, NOT_LEARNED] = 1
    """Epochs between checkpoints. A checkpoint is always saved after the last epoch."""
    keep_checkpoints: Annotated[Positive, NOT_LEARNED] = 2
    """Number of newest checkpoints to keep."""
    validate_every_epochs: Annotated[int, Field(ge=0)] = 5
    """Epochs between validations with every modality present; 0: only after the last epoch."""
    log_every_steps: Annotated[Positive, NOT_LEARNED] = 10
    """Optimizer steps between lines of metrics.jsonl."""
    trackers: Annotated[list[TrackerRecipe], NOT_LEARNED] = [TrackerRecipe(name="tensorboard")]
    """Trackers that receive the metrics in addition to metrics.jsonl: names, or {name: ..., options: {...}}. They write
    to the run folder; only those whose options name a server send anything."""
    threads: Annotated[int, Field(ge=0, le=10_000), NOT_LEARNED] = 0
    """CPU threads of the model per rank; 0: torch's default."""
    best_metric: str = "action_top1"
    """Validation metric that selects the weights in best/, e.g. noun_top5 or verb_loss (for losses, the lowest is
    best)."""
    offload: Annotated[Literal["none", "optimizer", "parameters"], NOT_LEARNED] = "none"
    """State kept in CPU memory instead of GPU memory: none, the optimizer state (ZeRO 1 to 3), or the optimizer state
    and the parameters (ZeRO 3)."""
    peak_tflops: Annotated[Annotated[float, Field(gt=0)] | None, NOT_LEARNED] = None
    """Peak of one device in the training precision, in 1e12 FLOP/s, for the MFU; None: looked up for common GPUs."""
    profile_steps: Annotated[tuple[Annotated[int, Field(ge=0)], Positive] | None, NOT_LEARNED] = None
    """Optimizer steps to trace into trace/rank0.json.gz: [start, stop] traces steps start to stop - 1, counted from
    0."""
    max_skipped_steps: Annotated[Positive, NOT_LEARNED] = 5
    """Number of consecutive optimizer steps with a non-finite loss or gradient at which the run ends; such steps are
    skipped."""
    guard_every_steps: Annotated[int, Field(ge=0), NOT_LEARNED] = 1000
    """Optimizer steps between comparisons of the ranks' autograd graphs; 0: only at the first step."""
    collective_timeout_s: Annotated[Seconds, Field(ge=2), NOT_LEARNED] = 60
    """Seconds that a training step may wait for a rank; the job then ends and names that rank. A lost process is
    detected in half that time. The first step of a process, validation and saving may each take ten minutes."""
    checkpoint_every_steps: Annotated[int, Field(ge=0), NOT_LEARNED] = 0
    """Optimizer steps between additional checkpoints, counted from the beginning of the run; 0: none."""
    keep_every_epochs: Annotated[int, Field(ge=0), NOT_LEARNED] = 0
    """Epochs between checkpoints that are kept permanently, in addition to the newest ones; 0: none."""

    @model_validator(mode="after")
    def _settings_agree(self) -> TrainingRecipe:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload} needs zero_stage {needed}{' or more' if needed < 3 else ''}")
        if self.profile_steps is not None and self.profile_steps[0] >= self.profile_steps[1]:
            raise ValueError("profile_steps [{}, {}]: start must come before stop".format(*self.profile_steps))
        return self
