"""The demo trains its models side by side, each after those it builds on, and only what is not finished."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from karmma_dist.demo import STUDENTS, train_side_by_side
from karmma_dist.recipe import Recipe, load_chain
from karmma_dist.studies import jobs
from kits.recipes import tiny_recipe

TRAINER = """
import json, pathlib, sys, yaml
recipe = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
for earlier in recipe["after"]:
    assert json.loads((pathlib.Path(earlier).parent / "state.json").read_text())["state"] == "finished"
run = pathlib.Path(recipe["runs_dir"], recipe["name"])
(run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
(run / "state.json").write_text(json.dumps({"state": "finished"}))
"""
"""A program that trains nothing: it checks that the runs before its own are finished, and marks its own as finished."""


def test_the_demos_models_are_trained_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "rank_command", lambda words: [sys.executable, "-c", TRAINER, words[1]])
    places = {"runs_dir": str(tmp_path / "runs"), "training": {"epochs": 1, "batch_size": 10}}
    teacher = tiny_recipe(["video", "audio"], name="t/teacher", data={"shards": "no-shards"}, **places)
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


def test_recipes_of_the_demo_build_on_recipes_of_the_demo() -> None:
    names = {recipe.name for student in STUDENTS.values() for recipe in load_chain(f"demo/{student}")}
    for name in names:
        *earlier, recipe = load_chain(name)
        assert set(recipe.after) <= {other.name for other in earlier}
