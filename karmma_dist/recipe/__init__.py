"""The typed recipe: every setting of a run, read from YAML, checked in one place, and saved with the run."""

from karmma_dist.recipe.data import DataRecipe, InputRecipe, MixtureDataset, ModalityDropout, OrderRecipe, data_of
from karmma_dist.recipe.fields import NOT_LEARNED
from karmma_dist.recipe.files import load_chain, load_recipe, read_run_recipe, save_recipe, shared_overrides
from karmma_dist.recipe.model import DistillRecipe, EncoderRecipe, ModelRecipe, ObjectiveRecipe
from karmma_dist.recipe.recipe import EvaluationRecipe, Recipe, SlurmRecipe, ViewsRecipe
from karmma_dist.recipe.training import OptimizerRecipe, TrackerRecipe, TrainingRecipe

__all__ = [
    "NOT_LEARNED", "DataRecipe", "DistillRecipe", "EncoderRecipe", "EvaluationRecipe", "InputRecipe", "MixtureDataset",
    "ModalityDropout", "ModelRecipe", "ObjectiveRecipe", "OptimizerRecipe", "OrderRecipe", "Recipe", "SlurmRecipe",
    "TrackerRecipe", "TrainingRecipe", "ViewsRecipe", "data_of", "load_chain", "load_recipe", "read_run_recipe",
    "save_recipe", "shared_overrides",
]  # fmt: skip
