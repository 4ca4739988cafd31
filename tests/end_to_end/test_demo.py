"""The demo trains its models side by side, each after those it builds on, and only what is not finished."""

from __future__ import annotations

import json
from pathlib import Path

from karmma_dist.demo import STUDENTS, train_side_by_side
from karmma_dist.recipe import Recipe, load_chain
from kits.recipes import tiny_recipe


def test_the_demos_models_are_trained_in_order_and_once(shards: Path, tmp_path: Path) -> None:
    places = {"runs_dir": str(tmp_path / "runs"), "training": {"epochs": 1, "batch_size": 10}}
    teacher = tiny_recipe(["video", "audio"], name="t/teacher", data={"shards": str(shards)}, **places)
    student = {**teacher, "name": "t/student", "stage": "distill", "after": ["t/teacher"]}
    trees = (teacher, {**student, "distill": {"teacher": "t/teacher"}})
    recipes = {tree["name"]: Recipe.model_validate(tree) for tree in trees}
    shown: dict[str, tuple[int, int]] = {}

    def report(stage: str, done: int, total: int, note: str = "") -> None:  # noqa: ARG001
        shown[stage] = (done, total)

    train_side_by_side(tmp_path, recipes, report)
    assert shown == {"train t/teacher": (1, 1), "train t/student": (1, 1)}
    states = [tmp_path / "runs" / name / "state.json" for name in recipes]
    assert [json.loads(state.read_text())["state"] for state in states] == ["finished", "finished"]
    before = [state.stat().st_mtime_ns for state in states]
    train_side_by_side(tmp_path, recipes, report)
    assert [state.stat().st_mtime_ns for state in states] == before


def test_every_recipe_of_the_demo_finds_what_it_comes_after_in_the_demos_own_folder() -> None:
    names = {recipe.name for name in STUDENTS.values() for recipe in load_chain(f"demo/{name}")}
    for name in names:
        *earlier, recipe = load_chain(name)
        assert set(recipe.after) <= {other.name for other in earlier}
