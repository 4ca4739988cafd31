"""The place of a run on disk: no run inside of another, so that none removes or overwrites another's files.

    runs/exp          a run
    runs/exp/best     refused as the name of a run: it would be the first one's best weights
    runs/exp/fast     refused too: it would be listed, copied and removed with the first
    runs/a/b          a run; then runs/a is refused, which would contain it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError, quoted
from karmma_dist.field_values import fitted
from karmma_dist.io.yaml_file import plain_values, read_yaml
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.name import check_run_name
from karmma_dist.runs.folder import STATE

_RECIPE = "recipe.yaml"
_CHECKPOINTS = "checkpoints"
_EVIDENCE = (_CHECKPOINTS, "metrics.jsonl", "weights.safetensors")
"""Names next to a recipe that make its folder that of a run."""
_COUNTS = ("epochs", "batch_size", "log_every_steps")
_MOST_BYTES = 4096 - 512
"""Bytes of the absolute path of a run's folder: Linux' PATH_MAX without names inside of the folder."""


def check_place(recipe: Recipe) -> None:
    """Check that the folder of a run may be created, filled and emptied, before anything is written or removed.

    Raises:
        UserError: the name is unsafe, its path too long, or the folder would be inside of another run's or contain one.
    """
    try:
        check_run_name(recipe.name)
    except ValueError as error:
        raise UserError(f"the name of the run, {quoted(recipe.name)}: {error}") from None
    folder = Path(os.path.abspath(recipe.run_dir))
    try:
        num_bytes = len(os.fsencode(folder))
    except UnicodeEncodeError:
        raise UserError(f"the locale cannot write the folder {quoted(str(folder))}: export PYTHONUTF8=1") from None
    if num_bytes > _MOST_BYTES:
        raise UserError(f"the folder of the run {quoted(recipe.name)} has too long a path: choose another runs_dir")
    top = Path(os.path.abspath(recipe.runs_dir))
    advice = "give this run another name or place (--set name=... or runs_dir=...)"
    for outer in folder.parents:
        if is_run(outer):
            raise UserError(f"{recipe.run_dir}: would be inside of the run {outer}: {advice}")
        if outer == top:
            break
    inner = next(_runs_inside(folder), None)
    if inner is not None:
        raise UserError(f"{recipe.run_dir}: would contain the run {inner}: {advice}")


def is_run(folder: Path) -> bool:
    """Return True if a folder is that of a run: it holds a state, or a recipe with this folder's name or its files."""
    if (folder / STATE).is_file():
        return True
    if not (folder / _RECIPE).is_file():
        return False
    if any((folder / name).exists() for name in _EVIDENCE):
        return True
    name = (read_written_recipe(folder) or {}).get("name")
    parts = Path(name).parts if isinstance(name, str) else ()
    return bool(parts) and folder.absolute().parts[-len(parts) :] == parts


def read_written_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of a run folder without validation; None if it is missing, damaged or no recipe."""
    try:
        tree = read_yaml(folder / _RECIPE)
    except (FileNotFoundError, UserError):
        return None
    if not isinstance(tree, dict) or "name" not in tree:
        return None
    names = {key: fitted(tree[key], str) for key in ("name", "runs_dir") if key in tree}
    recipe: dict[str, Any] = {**plain_values(tree), **names}
    training = recipe.get("training", {})
    counts = [training.get(key, 1) for key in _COUNTS] if isinstance(training, dict) else [None]
    is_recipe = all(isinstance(name, str) for name in names.values()) and all(isinstance(num, int) for num in counts)
    return recipe if is_recipe else None


def _runs_inside(folder: Path) -> Iterator[Path]:
    """Yield the runs below a folder, in whatever subfolder; the recipes in its own checkpoints are none."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        is_checkpoint = os.path.basename(os.path.dirname(parent)) == _CHECKPOINTS
        if Path(parent) != folder and _RECIPE in files and not is_checkpoint and is_run(Path(parent)):
            yield Path(parent)
