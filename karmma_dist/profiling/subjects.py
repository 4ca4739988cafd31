"""Which models a recipe has, and what is known of them before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.models.pretrained import CARD, ModelCard
from karmma_dist.recipe import InputRecipe, ModelRecipe, Recipe, load_chain
from karmma_dist.settings import read_tree, validate
from karmma_dist.shards import MANIFEST, ShardFolder
from karmma_dist.streaming.loader import check_heads


@dataclass(frozen=True)
class Subject:
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
    """Classes per head."""


def find_subjects(name: str, overrides: Sequence[str] = ()) -> tuple[list[Subject], list[str]]:
    """The models of a recipe, a distillation's teacher first, and remarks on what was not found.

    The teacher is the finished run's, if there is one, otherwise that of a recipe the distillation comes `after`.

    Raises:
        UserError: the recipe or a recipe it comes after is wrong, or the number of classes is not known.
    """
    *earlier, recipe = load_chain(name, overrides)
    heads = _heads(recipe)
    role = {"distill": "student", "teacher": "teacher"}.get(recipe.stage, recipe.name.rpartition("/")[2])
    subjects = [_subject(role, recipe, heads)]
    if recipe.distill is None:
        return subjects, []
    if recipe.distill.teacher is None:
        experts = ", ".join(recipe.distill.teachers)
        return subjects, [f"only the student: profile the experts that teach it by their own recipes: {experts}"]
    run = recipe.find_run(recipe.distill.teacher)
    if (run / CARD).is_file():
        card = validate(read_tree(run / CARD), ModelCard, str(run / CARD))
        if card.modalities != recipe.data.modalities:
            raise UserError(
                f"{run}: the teacher's modalities {', '.join(card.modalities)} are not those of data.modalities, "
                f"{', '.join(recipe.data.modalities)}"
            )
        teacher = Subject("teacher", str(run), card.model, card.inputs, tuple(card.modalities), card.heads)
        return [teacher, *subjects], []
    teachers = [r for r in earlier if r.name == recipe.distill.teacher or r.run_dir == run]
    if teachers:
        return [_subject("teacher", teachers[0], heads), *subjects], []
    return subjects, [f"only the student: there is no {run / CARD}, and no recipe of that name under 'after'"]


def _subject(role: str, recipe: Recipe, heads: dict[str, int]) -> Subject:
    return Subject(role, recipe.name, recipe.model, recipe.inputs, tuple(recipe.modalities), heads)


def _heads(recipe: Recipe) -> dict[str, int]:
    """Classes per head: of the recipe's shards where they lie on this machine, else those the recipe names."""
    folder = Path(recipe.data.shards)
    if (folder / MANIFEST).is_file():
        return check_heads(recipe.data, ShardFolder(folder))
    if not recipe.data.heads:
        raise UserError(
            f"{recipe.name}: the number of classes is not known: there are no shards in {folder}, and data.heads is "
            "empty: pack the shards, or say it: --set data.heads.HEAD=NUMBER, for example --set data.heads.action=174"
        )
    return dict(recipe.data.heads)
