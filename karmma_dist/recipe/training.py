"""The sections of a recipe that say how a model is trained: `optimizer` and `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.recipe.fields import NOT_LEARNED
from karmma_dist.settings import Positive, Settings


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
    trackers: Annotated[list[str], NOT_LEARNED] = ["tensorboard"]
    """What else is told the lines of metrics.jsonl: names in the table of trackers."""
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
