"""The recipe: all sections of a run, with a check of their consistency.

    recipe = load_recipe("epic_kitchens/distill", ["training.epochs=10"])

A tag gives the source of a field's default: [paper], stated in arXiv 2504.08578; [fit], implied by or inferred from its
published results; [Radevski], the code of arXiv 2307.07483, on which its authors build; [ours], our choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from karmma_dist.recipe.data import DataRecipe, InputRecipe
from karmma_dist.recipe.fields import NOT_LEARNED, SHARED
from karmma_dist.recipe.model import DistillRecipe, ModelRecipe, ObjectiveRecipe
from karmma_dist.recipe.name import RunName
from karmma_dist.recipe.training import OptimizerRecipe, TrainingRecipe
from karmma_dist.settings import PathText, Positive, Settings


class ViewsRecipe(Settings):
    """Views per clip in `karmma-dist eval`: temporal x spatial views, whose class probabilities are averaged."""

    temporal: Annotated[int, Field(gt=0, le=1000)] = 1
    """Number of temporal samplings, spread evenly over the clip: offsets within the segments, or positions of the dense
    window."""
    spatial: Literal[1, 3] = 1
    """Number of crops: 1 for the centre, 3 for the start, centre and end of the longer side."""

    @property
    def num(self) -> int:
        """Number of views of a clip."""
        return self.temporal * self.spatial



class EvaluationRecipe(Settings):
    """Settings of evaluation."""

    batch_size: Positive = 16
    """Clips per batch and rank; results do not depend on it. With several views per clip, the number of views per batch
    (at least those of one clip)."""
    annotations: PathText | None = None
    """Folder with Epic-Kitchens' lists of tail classes and unseen participants; adds metrics over their clips."""
    views: ViewsRecipe = ViewsRecipe()
    """Views per clip in `karmma-dist eval`. Validation during training uses one view."""



class SlurmRecipe(Settings):
    """sbatch flags of `launch --slurm`."""

    script: PathText = "distill.sh"
    """Script in the slurm/ folder."""
    nodes: Annotated[int, Field(gt=0, le=100_000)] = 2
    """Number of nodes."""
    gpus_per_node: Annotated[int, Field(ge=0, le=1000)] = 8
    """GPUs per node, each with one rank; 0: one rank per node, on the CPU."""
    cpus_per_task: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """CPU cores per rank: one for the model plus data.num_workers for decoding; None: the script's value."""
    time: str | None = None
    """Time limit in sbatch's format, e.g. 2-00:00:00; None: the script's value."""
    partition: str | None = None
    """Partition; None: not passed to sbatch."""
    account: str | None = None
    """Account; None: not passed to sbatch."""
    extra: list[str] = []
    """Further sbatch flags, e.g. ["--qos=high"]."""



class Recipe(Settings):
    """One run."""

    name: RunName
    """Name of the run, and of its folder under `runs_dir`."""
    runs_dir: Annotated[PathText, NOT_LEARNED, SHARED] = "runs"
    """Folder of all runs."""
    stage: Literal["supervised", "teacher", "distill"]
    """`supervised`: train a model on labels only. `teacher`: the same with frozen encoders. `distill`: train a student
    online from a finished teacher."""
    after: Annotated[list[PathText], NOT_LEARNED] = []
    """Recipes whose runs this run builds on: files in the folder of the recipe that names them, paths, or names under
    recipes/. Unfinished ones are trained first, on the same ranks."""
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of all random choices of the run."""
    data: DataRecipe
    """Clips, their modalities, and their loading."""
    inputs: InputRecipe = InputRecipe()
    """Input tensors."""
    model: ModelRecipe
    """Model to train."""
    distill: DistillRecipe | None = None
    """Distillation settings; required in the distill stage, refused in other stages."""
    objective: ObjectiveRecipe | None = None
    """Objective; None: distillation in the distill stage, else cross_entropy."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    """Optimizer and learning-rate schedule."""
    training: TrainingRecipe = TrainingRecipe()
    """Training loop."""
    evaluation: Annotated[EvaluationRecipe, NOT_LEARNED] = EvaluationRecipe()
    """Evaluation."""
    slurm: Annotated[SlurmRecipe, NOT_LEARNED] = SlurmRecipe()
    """Submission to Slurm."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def modalities(self) -> list[str]:
        """Modalities of the model to train: model.modalities, or all of data.modalities."""
        return self.data.modalities if self.model.modalities is None else self.model.modalities

    def find_run(self, name: str) -> Path:
        """Return the path of a run that this recipe refers to: an existing path, or a name under `runs_dir`."""
        return Path(name) if Path(name).exists() else Path(self.runs_dir) / name

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.stage == "distill" and self.distill is None:
            raise ValueError("stage distill needs a section 'distill' naming its teacher")
        if self.stage != "distill" and self.distill is not None:
            raise ValueError(f"stage {self.stage} does not use the section 'distill': remove it")
        self._check_modalities()
        self._check_mixture()
        self.inputs = self.inputs.completed(self.data.modalities)  # a run's recipe.yaml holds every setting
        missing = [m for m in self.modalities if m not in self.model.encoders]
        if missing:
            raise ValueError(f"model.encoders has no entry for modality '{missing[0]}'")
        compiled = [m for m in self.modalities if self.model.encoders[m].compile]
        if compiled and self.training.zero_stage == 3:
            raise ValueError(
                f"model.encoders.{compiled[0]}.compile does not work with training.zero_stage 3, which gathers "
                "and frees parameters while an encoder runs: disable one of them"
            )
        trained = [m for m in self.modalities if not self.model.encoders[m].frozen]
        if self.stage == "teacher" and trained:
            raise ValueError(f"stage teacher keeps its encoders frozen: set model.encoders.{trained[0]}.frozen: true")
        if self.optimizer.warmup_epochs > self.training.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs {self.optimizer.warmup_epochs:g} exceeds "
                f"training.epochs {self.training.epochs}: set optimizer.warmup_epochs"
            )
        return self

    def _check_modalities(self) -> None:
        modalities, data_modalities = self.modalities, self.data.modalities
        if not modalities or modalities != [m for m in data_modalities if m in modalities]:
            raise ValueError(
                f"model.modalities {', '.join(modalities) or 'is empty'}: list some of data.modalities, in order: "
                f"{', '.join(data_modalities)}"
            )
        if modalities != data_modalities and self.stage != "distill":
            unused = ", ".join(m for m in data_modalities if m not in modalities)
            raise ValueError(f"stage {self.stage} has no teacher that uses {unused}: remove it from data.modalities")
        if self.model.fusion == "mean" and len(modalities) > 1:
            raise ValueError(f"model.fusion mean is for one modality, not for {', '.join(modalities)}")

    def _check_mixture(self) -> None:
        """Refuse what counts the clips or the heads of one dataset."""
        if not self.data.mixture:
            return
        memories = [f"model.encoders.{name}.memory" for name, encoder in self.model.encoders.items() if encoder.memory]
        memories += ["distill.memory"] if self.distill is not None and self.distill.memory is not None else []
        if memories:
            raise ValueError(
                f"{memories[0]} remembers the clips of one dataset, each once per epoch; in data.mixture a clip comes "
                "as often as its dataset's weight has it: remove the memory"
            )
        if self.distill is not None and self.distill.teachers and self.distill.expert_weights == "softmin":
            raise ValueError(
                "distill.expert_weights softmin weighs experts by their loss on held-out clips of one dataset, not of "
                "data.mixture: set it to per_sample or equal"
            )
