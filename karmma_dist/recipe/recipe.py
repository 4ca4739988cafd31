"""The recipe: all sections of a run, and whether they agree.

    recipe = load_recipe("epic_kitchens/distill", ["training.epochs=10"])

A tag says where a field's default is from: [paper], read in arXiv 2504.08578; [fit], forced by or inferred from its
published figures; [Radevski], the code of arXiv 2307.07483, on which its authors build; [ours], our choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.recipe.data import DataRecipe, InputRecipe
from karmma_dist.recipe.fields import NOT_LEARNED, SHARED
from karmma_dist.recipe.model import DistillRecipe, ModelRecipe, ObjectiveRecipe
from karmma_dist.recipe.training import OptimizerRecipe, TrainingRecipe
from karmma_dist.settings import Positive, Settings


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
    runs_dir: Annotated[str, NOT_LEARNED, SHARED] = "runs"
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
    objective: ObjectiveRecipe | None = None
    """What is minimised; None: distillation in the distill stage, else cross_entropy."""
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
        if Path(self.name).is_absolute() or ".." in Path(self.name).parts or not Path(self.name).parts:
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
