"""A study file is fully checked, and its plan trains every run once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_dist.cli import main
from karmma_dist.errors import UserError
from karmma_dist.models.model_card import CARD, ModelCard
from karmma_dist.recipe import load_chain, load_recipe, save_recipe
from karmma_dist.runs.folder import write_state
from karmma_dist.settings import dump
from karmma_dist.studies.costs import plan_costs
from karmma_dist.studies.jobs import recipe_file, write_recipe
from karmma_dist.studies.plan import StudyPlan, plan_study
from karmma_dist.studies.slurm import plan_arrays, shown_arrays
from karmma_dist.studies.study import load_study
from kits.studies import STUDY, write_study

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(f"{path.parent.parent.name}/{path.stem}" for path in ROOT.glob("recipes/*/studies/*.yaml"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(*changed: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the tiny study, with the given changes to each row in turn."""
    return {"rows": [{**row, **change} for row, change in zip(STUDY["rows"], changed, strict=True)]}


def plan(home: Path, changes: dict[str, Any] | None = None, **choices: Any) -> StudyPlan:
    write_study(home, changes)
    return plan_study(load_study("tiny/tab0"), **choices)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_study_that_ships_has_a_plan(name: str) -> None:
    file = load_study(name)
    planned = plan_study(file, num_seeds=2)
    assert set(planned.cells) == {(row.label, seed) for row in file.study.rows for seed in (0, 1)}


def test_every_table_of_the_paper_has_a_study() -> None:
    assert {f"epic_kitchens/{name}" for name in ("tab1", "tab2", "tab3", "tab4", "tab5", "tab6", "fig6")} <= {*SHIPPED}
    assert {"epic_kitchens_star/tab1", "something_something/tab1", "grid_epic/tab1"} <= {*SHIPPED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": []}, r"unknown key 'row' \(did you mean 'rows'\?\)"),
        (rows({"lable": "x"}, {}), r"unknown key 'rows\.0\.lable' \(did you mean 'label'\?\)"),
        (rows({"label": "student"}, {}), "two rows are called 'student'"),
        (rows({"published": {"al": 1.0}}, {}), r"row 'teacher': published: no column 'al' \(did you mean 'all'"),
        (rows({}, {"set": ["data.shards=null", "data.mixture={a: {shards: x, weight: 1}}"]}),
         "row 'student': tiny/student trains on data.mixture, but a study evaluates all of its runs on one dataset"),
        (rows({}, {"recipe": "tiny/studnt"}), r"row 'student': tiny/studnt: no such file \(did you mean"),
        (rows({}, {"set": ["distill.alhpa=1"]}), r"row 'student': .*'distill\.alhpa' \(did you mean 'alpha'"),
        (rows({}, {"set_of": {"tiny/techer": ["seed=1"]}}), "row 'student': set_of names 'tiny/techer'"),
        (rows({"suffix": "a b"}, {}), r"rows\.0\.suffix"),
        ({"columns": [{"name": "x"}, {"name": "x"}]}, "two columns are called 'x'"),
        ({"columns": [{"name": "all", "metric": "gflop"}]}, r"metric 'gflop' .*did you mean 'gflops'"),
        ({"columns": [{"name": "all", "at": "V+X"}]}, r"at 'V\+X' is not"),
        ({"columns": [{"name": "all", "at": "drop 1.5"}]}, "at 'drop 1.5' is not"),
        ({"columns": [{"name": "all", "at": "V"}], "evaluate": {}}, "needs evaluate.subsets: true"),
        ({"columns": [{"name": "all", "at": "area"}], "evaluate": {}}, "needs evaluate.sweep: true"),
        ({"columns": [{"name": "all", "at": "missing A:0.5"}], "evaluate": {}}, "needs evaluate.missing: .audio:0.5."),
        ({"columns": [{"name": "all", "at": "missing A:2"}], "evaluate": {}}, "audio:2: the share"),
        ({"columns": [{"name": "all"}], "evaluate": {"missing": ["X:0.5"]}}, "unknown modality 'X'"),
        ({"columns": [{"name": "all", "metric": "params", "tested": True}]}, "a cost"),
        ({"tests": [["teacher", "studend"]]}, r"tests: no row 'studend' \(did you mean 'student'"),
    ],
)
def test_an_invalid_study_is_one_line_with_its_file(
    home: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(home, changes)
    assert main(["study", "tiny/tab0", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert str(path.relative_to(home)) in error


def test_an_unknown_row_or_study_suggests_the_nearest(home: Path) -> None:
    write_study(home)
    with pytest.raises(UserError, match=r"no row 'studnt' \(did you mean 'student'"):
        plan_study(load_study("tiny/tab0"), only=("studnt",))
    with pytest.raises(UserError, match=r"did you mean 'tiny/studies/tab0'"):
        load_study("tiny/tab1")


@pytest.mark.parametrize("how", [["--dry-run"], ["--slurm", "--dry-run"], ["--slurm"], []])
def test_a_teacher_of_other_classes_is_refused_before_training(
    home: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    write_study(home, rows({}, {"set": ["distill.teacher=other", "after=[]"]}))
    recipe = load_recipe("tiny/teacher")
    heads = {"verb": 4, "noun": 7}
    card = ModelCard(modalities=recipe.data.modalities, heads=heads, model=recipe.model, inputs=recipe.inputs)
    (home / "other").mkdir()
    (home / "other" / CARD).write_text(dump(card))
    assert main(["study", "tiny/tab0", *how]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "its teacher other has the classes noun 7, verb 4, but the clips have noun 6, verb 4" in error
    assert not (home / "runs").exists()


def test_a_study_is_found_by_name_and_path(home: Path) -> None:
    path = write_study(home)
    assert load_study("tiny/tab0").name == load_study(str(path)).name == "tiny/tab0"


def test_all_rows_share_one_teacher_per_seed(home: Path) -> None:
    three = [*STUDY["rows"], {"label": "other student", "recipe": "tiny/student"}]
    planned = plan(home, {"rows": three})
    teachers = [run for run in planned.runs.values() if run.name.startswith("tiny/teacher")]
    assert [run.name for run in teachers] == ["tiny/teacher@seed0", "tiny/teacher@seed1"]
    assert len(planned.runs) == 6
    assert teachers[0].labels == ["teacher", "student", "other student"]
    for seed in (0, 1):
        run = planned.runs[planned.cells["student", seed]]
        assert re.fullmatch(rf"tiny/student\+alpha0\.4-[0-9a-f]{{4}}@seed{seed}", run.name)
        assert run.recipe.seed == seed
        assert run.recipe.distill is not None
        assert run.recipe.distill.teacher == f"tiny/teacher@seed{seed}"
        assert run.needs == (f"tiny/teacher@seed{seed}",)


def test_runs_come_after_their_dependencies(home: Path) -> None:
    planned = plan(home, {"rows": STUDY["rows"][::-1]})
    seen: set[str] = set()
    for run in planned.runs.values():
        assert seen >= set(run.needs)
        seen.add(run.name)


def test_two_rows_of_the_same_training_are_one_run(home: Path) -> None:
    again = {"label": "again", "recipe": "tiny/student", "set": ["distill.alpha=0.40"], "suffix": "b"}
    twice = [STUDY["rows"][1], again]
    planned = plan(home, {"rows": twice}, num_seeds=1)
    assert len(planned.runs) == 2
    assert planned.cells["student", 0] == planned.cells["again", 0]


def test_one_name_for_two_trainings_is_refused(home: Path) -> None:
    clash = rows({"recipe": "tiny/student", "suffix": "a", "set": ["distill.alpha=0.1"]}, {"suffix": "a"})
    with pytest.raises(UserError, match=r"row 'student': row 'teacher' has a run of .* tiny/student\+a@seed0"):
        plan(home, clash)


def test_global_overrides_change_names_only_if_they_affect_learning(home: Path) -> None:
    places = plan(home, num_seeds=1, overrides=["data.num_workers=1", "runs_dir=elsewhere", "training.threads=2"])
    assert "tiny/teacher@seed0" in places.runs
    assert places.out == Path("elsewhere/studies/tiny/tab0")
    longer = plan(home, num_seeds=1, overrides=["training.epochs=3"])
    assert all(run.recipe.training.epochs == 3 for run in longer.runs.values())
    assert all("epochs3" in name for name in longer.runs)
    assert not set(longer.runs) & set(places.runs)


def test_another_teacher_makes_another_teacher_and_student_run(home: Path) -> None:
    other = rows({}, {"set": [], "set_of": {"tiny/teacher": ["training.epochs=2"]}})
    planned = plan(home, other, num_seeds=1)
    student = planned.runs[planned.cells["student", 0]]
    assert student.name.startswith("tiny/student+below-")
    assert student.needs != (planned.cells["teacher", 0],)
    assert planned.runs[student.needs[0]].recipe.training.epochs == 2


def test_a_written_recipe_equals_the_run_and_finds_its_dependencies(home: Path) -> None:
    planned = plan(home, num_seeds=1)
    for run in planned.runs.values():  # as for training
        assert load_chain(str(write_recipe(home, run)))[-1] == run.recipe
        run.recipe.run_dir.mkdir(parents=True)
        save_recipe(run.recipe, run.recipe.run_dir / "recipe.yaml")
    assert recipe_file(home, run) == home / "recipes" / f"{run.name}.yaml"


def test_a_finished_run_of_another_recipe_is_refused(home: Path) -> None:
    run = plan(home, num_seeds=1).runs["tiny/teacher@seed0"]
    assert run.state() == "to train"
    run.recipe.run_dir.mkdir(parents=True)
    save_recipe(run.recipe, run.recipe.run_dir / "recipe.yaml")
    write_state(run.recipe.run_dir, "running")
    assert run.state() == "to train"
    (run.recipe.run_dir / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert run.state() == "to resume"
    write_state(run.recipe.run_dir, "finished")
    assert run.state() == "finished"
    changed = run.recipe.model_copy(update={"training": run.recipe.training.model_copy(update={"epochs": 2})})
    save_recipe(changed, run.recipe.run_dir / "recipe.yaml")
    with pytest.raises(UserError, match="holds a run of another recipe"):
        run.state()


def test_the_option_only_restricts_training(home: Path) -> None:
    planned = plan(home, only=("teacher",))
    assert {run.name for run in planned.chosen_runs} == {"tiny/teacher@seed0", "tiny/teacher@seed1"}


def test_the_plan_is_printed_with_costs_without_shards_or_weights(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = {cost.run.name: cost for cost in plan_costs(plan(home, num_seeds=1)).runs}
    teacher, student = costs["tiny/teacher@seed0"], next(costs[name] for name in costs if "student" in name)
    assert teacher.clips == student.clips == 30
    assert teacher.flops is not None
    assert student.flops is not None
    assert 1.2 < student.flops / teacher.flops < 1.5  # the teacher's forward pass is a third of its training
    assert main(["study", "tiny/tab0", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "1 x 30" in shown
    assert "study " in shown
    assert not (home / "runs").exists()


def test_slurm_jobs_are_arrays_with_one_task_per_seed(home: Path) -> None:
    write_study(home)
    (home / "slurm").symlink_to(ROOT / "slurm")
    planned = plan_study(load_study("tiny/tab0"), overrides=["slurm.gpus_per_node=5"])
    teacher, student, report = shown_arrays(plan_arrays(planned, Path("out"), ["tiny/tab0"]))
    assert teacher.startswith("job1=$(sbatch --parsable ")
    assert "--array=0-1" in teacher
    assert "study.sh" in teacher
    assert "out/recipes/tiny/teacher@seed0.yaml out/recipes/tiny/teacher@seed1.yaml" in teacher
    assert '--dependency=aftercorr:"$job1" --kill-on-invalid-dep=yes' in student
    assert '--dependency=afterok:"$job1":"$job2"' in report
    assert report.endswith("report tiny/tab0")
    assert not (home / "out").exists()


def test_a_study_with_indivisible_batches_is_not_submitted(home: Path) -> None:
    write_study(home)
    (home / "slurm").symlink_to(ROOT / "slurm")
    planned = plan_study(load_study("tiny/tab0"), overrides=["slurm.gpus_per_node=3"])
    with pytest.raises(UserError, match=r"tiny/teacher@seed0: training.batch_size 10 .* 6 ranks .* 6 or 12 .* 5 or 10"):
        plan_arrays(planned, Path("out"), ["tiny/tab0"])


def test_a_recipe_of_a_study_may_be_a_path(home: Path) -> None:
    write_study(home)
    moved = home / "mine.yaml"
    moved.write_text((home / "recipes/tiny/teacher.yaml").read_text())
    content = yaml.safe_load((home / "recipes/tiny/studies/tab0.yaml").read_text())
    content["rows"][0]["recipe"] = "mine.yaml"
    (home / "recipes/tiny/studies/tab0.yaml").write_text(yaml.safe_dump(content))
    assert len(plan_study(load_study("tiny/tab0"), num_seeds=1).runs) == 2


def test_recipes_that_many_come_after_are_planned_once(home: Path) -> None:
    write_study(home, {"rows": [{"label": "last", "recipe": "tiny/r15"}], "seeds": 1})
    teacher = yaml.safe_load((home / "recipes" / "tiny" / "teacher.yaml").read_text())
    for number in range(16):
        after = [f"tiny/r{number - step}" for step in (1, 2, 3) if number >= step]
        content = {**teacher, "name": f"tiny/r{number}", "after": after}
        (home / "recipes" / "tiny" / f"r{number}.yaml").write_text(yaml.safe_dump(content))
    assert len(plan_study(load_study("tiny/tab0")).runs) == 16


def test_a_run_inside_of_another_is_refused_before_anything_is_written(home: Path) -> None:
    planned = plan(home)
    run = next(iter(planned.runs.values()))
    outer = run.recipe.run_dir.parent
    outer.mkdir(parents=True)
    write_state(outer, "finished")
    with pytest.raises(UserError, match="would be inside of the run"):
        run.state()
    assert [path.name for path in outer.iterdir()] == ["state.json"]
