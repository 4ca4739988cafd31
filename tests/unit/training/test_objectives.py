"""Objectives: chosen by the recipe, or else by its stage; unknown names and options are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.training.objectives import CrossEntropy, Distillation, build_objective
from karmma_dist.training.trackers.run_log import RunLog
from kits.experts import make_recipe


def test_without_an_objective_the_stage_decides(tmp_path: Path) -> None:
    assert isinstance(build_objective(make_recipe(tmp_path), None), CrossEntropy)
    student = make_recipe(tmp_path, distill={"teacher": "t", "alpha": 0.2})
    objective = build_objective(student, lambda _batch: {})
    assert isinstance(objective, Distillation)
    assert objective.recipe.alpha == 0.2


def test_student_with_a_teacher_may_learn_from_labels_only(tmp_path: Path) -> None:
    student = make_recipe(tmp_path, distill={"teacher": "t"}, objective={"name": "cross_entropy"})
    assert isinstance(build_objective(student, lambda _batch: {}), CrossEntropy)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "cross_entropi"}, r"objective\.name.*cross_entropi.*cross_entropy"),
        ({"name": "cross_entropy", "options": {"alpha": 1}}, r"objective\.options.*alpha"),
        ({"name": "distillation"}, r"objective\.name.*distillation.*supervised"),
    ],
)
def test_unsuitable_objective_is_refused_by_name(tmp_path: Path, objective: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_objective(make_recipe(tmp_path, objective=objective), None)


def test_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, training={"trackers": ["tensorbord"]})
    with pytest.raises(UserError, match=r"training\.trackers.*tensorbord.*tensorboard"):
        RunLog(recipe, 0)
    assert not recipe.run_dir.exists()
