"""Reads and writes recipes: a single one, a chain of recipes that build on each other, and that of a run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.field_values import fitted
from karmma_dist.io.files import write_whole
from karmma_dist.io.named_file import find_beside, find_file
from karmma_dist.recipe.fields import SHARED
from karmma_dist.recipe.recipe import Recipe
from karmma_dist.settings import dump, load_settings, marked

_MOST_WAITING = 100
"""Recipes that come after each other."""
_DATASET = re.compile(r"(data\.mixture\.)([^.=]+)\.")
"""The beginning of a field of a mixture's dataset."""


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or by name under `recipes/` (`demo/distill`), with `a.b=c` overrides applied.

    Recipes that it comes `after` are looked for in the folder of the file that names them first.

    Raises:
        UserError: the file does not exist, a key is unknown (the nearest is suggested), or a value is invalid.
    """
    return load_settings(find_file(name, "recipes"), Recipe, list(overrides), _find_earlier)



def _find_earlier(tree: dict[str, Any], path: Path) -> None:
    """Replace the names of earlier recipes by the paths of files in the folder of the recipe that names them."""
    if isinstance(earlier := tree.get("after"), list):
        names = [fitted(name, str) for name in earlier]
        tree["after"] = [find_beside(name, path, "recipes") if isinstance(name, str) else name for name in names]


def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Return the overrides of locations, which apply to every recipe of a chain."""
    names = marked(Recipe, SHARED)
    return [text for text in overrides if _DATASET.sub(r"\1", text.partition("=")[0].strip()) in names]


def _fitting(name: str, overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of a mixture's dataset that the recipe does not have."""
    datasets = [match[2] if (match := _DATASET.match(text)) else None for text in overrides]
    if not any(datasets):
        return list(overrides)
    known = load_recipe(name).data.mixture
    return [text for text, dataset in zip(overrides, datasets, strict=True) if dataset is None or dataset in known]



def load_chain(name: str, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Load a recipe and, before it, all recipes that it comes `after`: in training order, each once.

    Overrides of locations (`runs_dir`, `data.shards` or those of a mixture's datasets, its cache, `data.num_workers`)
    apply to all recipes, others only to the last one.

    Raises:
        UserError: a recipe cannot be loaded (see `load_recipe`), recipes wait for each other, or the folder of one's
            run would be inside that of another.
    """
    shared = shared_overrides(overrides)
    chain: list[Recipe] = []
    visited: set[str] = set()

    def visit(name: str, overrides: Sequence[str], waiting: tuple[str, ...]) -> None:
        recipe = load_recipe(name, overrides)
        if recipe.name in waiting:
            raise UserError(f"recipes wait for each other: {' -> '.join([*waiting, recipe.name])}")
        if len(waiting) > _MOST_WAITING:
            raise UserError(f"{recipe.name}: more than {_MOST_WAITING} recipes come after each other: use fewer")
        for earlier in recipe.after:
            if earlier not in visited:
                visit(earlier, _fitting(earlier, shared), (*waiting, recipe.name))
                visited.add(earlier)
        for other in chain:
            if other.run_dir in recipe.run_dir.parents or recipe.run_dir in other.run_dir.parents:
                raise UserError(f"the runs {other.name} and {recipe.name} would be inside each other: rename one")
        if recipe.name not in [done.name for done in chain]:
            chain.append(recipe)

    visit(name, overrides, ())
    return chain



def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, including all defaults, completely or not at all."""
    write_whole(path, dump(recipe).encode())



def read_run_recipe(run_dir: Path) -> Recipe:
    """Load the resolved recipe of a run folder.

    Raises:
        UserError: the folder holds no recipe.
    """
    path = run_dir / "recipe.yaml"
    if not path.exists():
        raise UserError(f"{run_dir}: not a run folder: it holds no recipe.yaml")
    return load_settings(path, Recipe)
