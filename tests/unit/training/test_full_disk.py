"""Training on a disk that takes no more ends with one line that names the file, and goes on to the same weights."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.evaluation.run import validate
from karmma_dist.io.disk_errors import DiskError
from karmma_dist.recipe import Recipe
from karmma_dist.runs.folder import read_state
from karmma_dist.training.checkpoint.checkpoint import checkpoints, find_damage
from karmma_dist.training.trainer import train
from kits.disk_writers import file_limit
from kits.recipes import tiny_recipe

KEPT = ("weights.safetensors", "model.yaml", "best/weights.safetensors", "best/model.yaml")


def recipe_in(folder: Path, shards: Path, **training: Any) -> Recipe:
    training = {
        "batch_size": 10, "epochs": 2, "log_every_steps": 1, "validate_every_epochs": 1, "threads": 1,
        "checkpoint_every_steps": 2, **training,
    }  # fmt: skip
    tree = tiny_recipe(["audio"], name="run", runs_dir=str(folder), data={"shards": str(shards)}, training=training)
    return Recipe.model_validate(tree)


def weights(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in KEPT}


@pytest.fixture(scope="module")
def finished(world: World, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that had room for everything."""
    recipe = recipe_in(tmp_path_factory.mktemp("reference"), shards)
    train(recipe, world, validate)
    return recipe.run_dir


def limits(run: Path) -> list[int]:
    """Return limits by which each file of a run is in turn the smallest that does not fit."""
    sizes = sorted({path.stat().st_size for path in run.rglob("*") if path.is_file()})
    return [1, *(size - 1 for size in sizes)]


def test_each_file_in_turn_does_not_fit_and_the_run_goes_on_to_the_same_weights(
    world: World, shards: Path, finished: Path, tmp_path: Path
) -> None:
    named = set()
    for limit in limits(finished):
        recipe = recipe_in(tmp_path / str(limit), shards)
        with file_limit(limit), pytest.raises(UserError) as caught:
            train(recipe, world, validate)
        message = str(caught.value)
        assert "File too large" in message, limit
        assert "then run the same command again to resume" in message, limit
        assert ".partial" not in message, limit
        named.add(Path(message.split(": ")[0]).relative_to(recipe.runs_dir).as_posix())
        for checkpoint in checkpoints(recipe.run_dir):
            assert find_damage(checkpoint) is None, limit
        train(recipe, world, validate)
        assert read_state(recipe.run_dir)["state"] == "finished"
        assert weights(recipe.run_dir) == weights(finished), limit
        assert not list(recipe.run_dir.rglob("*.partial*")), limit
    assert "run/weights.safetensors" in named
    assert any("checkpoints/step-" in name for name in named)


def test_a_trace_that_does_not_fit_is_named_and_hides_no_other_error(
    world: World, shards: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_in(tmp_path, shards, profile_steps=[1, 2])
    largest = limits(finished)[-1] + 1
    with file_limit(largest), pytest.raises(DiskError, match=r"trace/rank0\.json\.gz: File too large: ") as caught:
        train(recipe, world, validate)
    assert caught.value.errno == errno.EFBIG
    train(recipe, world, validate)
    assert weights(recipe.run_dir) == weights(finished)
    recipe = recipe_in(tmp_path / "second", shards, profile_steps=[0, 9])
    with file_limit(5_000), pytest.raises(UserError, match=r"run/weights\.safetensors: File too large: "):
        train(recipe, world, validate)
    assert "no trace: " in caplog.text
