"""A study of two tiny models on the tiny kitchen, in a folder of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from kits.recipes import tiny_recipe

TEACHER = tiny_recipe(
    ["video", "audio"], name="tiny/teacher", optimizer={"lr": 0.001},
    training={"epochs": 1, "batch_size": 10, "log_every_steps": 1},
)  # fmt: skip
STUDY: dict[str, Any] = {
    "title": "Two tiny models",
    "caption": "Tab. 0",
    "seeds": 2,
    "clips": 30,
    "heads": {"verb": 4, "noun": 6},
    "rows": [
        {"label": "teacher", "recipe": "tiny/teacher", "published": {"all": 12.5}},
        {"label": "student", "recipe": "tiny/student", "set": ["distill.alpha=0.4"]},
    ],
    "evaluate": {"subsets": True, "sweep": True, "drop_seeds": 2},
    "columns": [
        {"name": "all"},
        {"name": "V", "at": "V"},
        {"name": "average", "at": "average", "tested": True},
        {"name": "GFLOPs", "metric": "gflops"},
    ],
}


def student() -> dict[str, Any]:
    """The tiny student's recipe, which comes after the tiny teacher's."""
    return {
        **copy.deepcopy(TEACHER), "name": "tiny/student", "stage": "distill", "after": ["tiny/teacher"],
        "distill": {"teacher": "tiny/teacher"},
    }  # fmt: skip


def later_student() -> dict[str, Any]:
    """The recipe of a student with the same teacher, which comes after the tiny student's."""
    return {**student(), "name": "tiny/later", "after": ["tiny/teacher", "tiny/student"]}


LATER = {
    "label": "later", "recipe": "tiny/later", "set": ["distill.alpha=0.9"],
    "set_of": {"tiny/student": ["distill.alpha=0.4"]},
}  # fmt: skip
"""Row of the later student, after the run of the row `student`."""


def write_study(folder: Path, changes: dict[str, Any] | None = None, shards: Path | None = None) -> Path:
    """Write the recipes and the study below `folder`/recipes, with top-level `changes`; return the study's path."""
    recipes = folder / "recipes" / "tiny"
    (recipes / "studies").mkdir(parents=True, exist_ok=True)
    for recipe in (TEACHER, student(), later_student()):
        content = copy.deepcopy(recipe)
        content["data"]["shards"] = str(shards or folder / "no-shards")
        (recipes / f"{recipe['name'].rpartition('/')[2]}.yaml").write_text(yaml.safe_dump(content))
    path = recipes / "studies" / "tab0.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **(changes or {})}))
    return path
