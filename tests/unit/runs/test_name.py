"""No run inside of another: looked for on disk, before anything is written or removed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import karmma_dist
from karmma_dist.distributed import collectives
from karmma_dist.distributed.world import ALONE
from karmma_dist.errors import UserError
from karmma_dist.models.model_card import CARD
from karmma_dist.models.weights import WEIGHTS
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.recipe.name import OWN_NAMES
from karmma_dist.runs.folder import BEST, ENSEMBLE, METRICS, STATE, write_state
from karmma_dist.runs.name import check_place, is_run, read_written_recipe
from karmma_dist.studies.jobs import LOCK
from karmma_dist.training.checkpoint import resume as preparation
from karmma_dist.training.checkpoint.resume import own_run_dir, prepare_run_dir
from karmma_dist.training.fault_tolerance.preemption import STOP_FILE

PACKAGE = Path(karmma_dist.__file__).parent


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "gather", list)
    monkeypatch.setattr(collectives, "gather", list)


def recipe(runs: Path, name: str) -> Recipe:
    tree: dict[str, Any] = {
        "name": "r", "runs_dir": str(runs), "stage": "supervised", "data": {"shards": "s", "modalities": ["audio"]},
        "model": {"encoders": {"audio": {"name": "small_audio"}}},
    }  # fmt: skip
    return Recipe.model_validate(tree).model_copy(update={"name": name})  # as studies name their runs


def prepare(run: Recipe, resume: str) -> str:
    """Own and prepare the folder of a run as a training does."""
    with own_run_dir(run, ALONE):
        return prepare_run_dir(run, ALONE, resume)


def make_run(runs: Path, name: str) -> dict[str, bytes]:
    """Make the folder of a run with checkpoints and best weights, and return its files."""
    folder = runs / name
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    (folder / "best").mkdir()
    (folder / "eval").mkdir()
    save_recipe(recipe(runs, name), folder / "recipe.yaml")
    save_recipe(recipe(runs, name), folder / "checkpoints" / "step-3" / "recipe.yaml")
    write_state(folder, "preempted")
    write_state(folder / "best", "best")
    return files(runs)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("there", "name"),
    [
        ("exp", "exp/best"), ("exp", "exp/checkpoints"), ("exp", "exp/other"), ("exp", "exp/a/b"), ("a/b", "a"),
        ("a/b/c", "a"), ("exp/best", "exp"), ("exp", ""), ("exp", "."), ("exp", "exp/"), ("exp", "a/../exp"),
        ("exp", "exp/checkpoints/step-3"), ("exp", "exp/eval"), ("exp", "x" * 300), ("exp", "a\0b"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_nothing_is_written_or_removed_for_a_run_inside_or_around_another(
    tmp_path: Path, there: str, name: str, resume: str
) -> None:
    before = make_run(tmp_path / "runs", there)
    with pytest.raises(UserError) as caught:
        prepare(recipe(tmp_path / "runs", name), resume)
    assert files(tmp_path / "runs") == before
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_is_prepared_in_its_own_folder_and_beside_others(tmp_path: Path, resume: str) -> None:
    make_run(tmp_path, "a/b")
    for name in ("a/b2", "a/c", "ab", "b"):
        assert prepare(recipe(tmp_path, name), resume) == ""
    check_place(recipe(tmp_path, "a/b"))


@pytest.mark.parametrize("inside", ["", "sub", "deep/er"])
def test_runs_dir_is_not_inside_a_run(tmp_path: Path, inside: str) -> None:
    make_run(tmp_path, "exp")
    with pytest.raises(UserError, match=r"would be inside of the run .*/exp"):
        check_place(recipe(tmp_path / "exp", f"{inside}/x".lstrip("/")))


def test_a_recipe_of_the_user_makes_no_run_of_its_folder(tmp_path: Path) -> None:
    save_recipe(recipe(tmp_path, "mine"), tmp_path / "recipe.yaml")
    (tmp_path / "notes").mkdir()
    assert not is_run(tmp_path)
    check_place(recipe(tmp_path, "mine"))
    check_place(recipe(tmp_path, "a/mine"))


@pytest.mark.parametrize("own", ["state.json", "weights.safetensors", "checkpoints"])
def test_a_damaged_run_is_still_one(tmp_path: Path, own: str) -> None:
    (tmp_path / "exp" / own).mkdir(parents=True) if own == "checkpoints" else (tmp_path / "exp").mkdir()
    if own != "checkpoints":
        (tmp_path / "exp" / own).write_text("")
    (tmp_path / "exp" / "recipe.yaml").write_text("name: [")
    assert is_run(tmp_path / "exp")


def test_names_that_runs_use_are_no_names_of_runs() -> None:
    assert {BEST, STATE, ENSEMBLE, METRICS, CARD, WEIGHTS, STOP_FILE} <= OWN_NAMES
    written = re.findall(r"run_dir / \"([^\"]+)\"", "".join(path.read_text() for path in PACKAGE.rglob("*.py")))
    assert {"checkpoints", "trace", "recipe.yaml"} <= set(written) <= OWN_NAMES
    assert LOCK.startswith(".")


def test_too_long_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too long a path"):
        check_place(recipe(tmp_path, "a").model_copy(update={"runs_dir": "/".join(["x" * 199] * 20)}))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("name: 2024\ntraining: {epochs: 3}", "2024"), ("name: a/b", "a/b"), ("name: 12:00", "12:00"),
        ("name: [a]", None), ("name: a\ntraining: 3", None), ("name: a\ntraining: {epochs: many}", None),
        ("name: ~", None), ("nam: a", None),
        ("name: a\nname: b", None), ("- a", None), ("name: a\nruns_dir: {}", None), ("\0", None),
    ],
)  # fmt: skip
def test_a_written_recipe_is_listed_or_damaged(tmp_path: Path, text: str, name: str | None) -> None:
    from karmma_dist.runs.listing import find_runs

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(text)
    (folder / "state.json").write_text(json.dumps({"state": "failed", "time": 0}))
    written = read_written_recipe(folder)
    assert (written or {}).get("name") == name
    assert [run.state for run in find_runs(tmp_path)] == ["damaged" if name is None else "failed"]
