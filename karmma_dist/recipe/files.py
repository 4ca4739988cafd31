"""Recipes are read and written here: one, a chain of those that build on each other, that of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.io.files import write_whole
from karmma_dist.recipe.fields import SHARED
from karmma_dist.recipe.recipe import Recipe
from karmma_dist.settings import dump, find_file, load_settings, marked


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by path or by name under `recipes/` (`demo/distill`), with `a.b=c` overrides applied.

    Raises:
        UserError: no such file, unknown key (with the nearest), wrong value.
    """
    return load_settings(find_file(name, "recipes"), Recipe, list(overrides))



def shared_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that say where things are, and so hold for every recipe of a chain."""
    names = marked(Recipe, SHARED)
    return [text for text in overrides if text.partition("=")[0].strip() in names]



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
    """Write the resolved recipe, every default spelled out, whole or not at all."""
    write_whole(path, dump(recipe).encode())



def read_run_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        UserError: the folder holds none.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder: it holds no recipe.yaml")
    return load_settings(path, Recipe)
