"""What a recipe names as its objective is built or refused by name, and without one its stage decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.training.objectives import CrossEntropy, Distillation, build_objective
from karmma_dist.training.trackers import RunLog
from kits.experts import make_recipe


def test_without_an_objective_the_stage_decides(tmp_path: Path) -> None:
    assert isinstance(build_objective(make_recipe(tmp_path), None), CrossEntropy)
    student = make_recipe(tmp_path, distill={"teacher": "t", "alpha": 0.2})
    objective = build_objective(student, lambda _batch: {})
    assert isinstance(objective, Distillation)
    assert objective.recipe.alpha == 0.2


def test_a_student_may_learn_from_labels_alone_although_it_has_a_teacher(tmp_path: Path) -> None:
    student = make_recipe(tmp_path, distill={"teacher": "t"}, objective={"name": "cross_entropy"})
    assert isinstance(build_objective(student, lambda _batch: {}), CrossEntropy)


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"name": "cross_entropi"}, r"objective\.name.*cross_entropi.*cross_entropy"),
        ({"name": "cross_entropy", "options": {"alpha": 1}}, r"objective\.options.*alpha"),
        ({"name": "distillation"}, r"objective\.name.*distillation.*supervised"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_by_name(tmp_path: Path, objective: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_objective(make_recipe(tmp_path, objective=objective), None)


def test_an_unknown_tracker_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, training={"trackers": ["tensorbord"]})
    with pytest.raises(UserError, match=r"training\.trackers.*tensorbord.*tensorboard"):
        RunLog(recipe, 0)
    assert not recipe.run_dir.exists()
