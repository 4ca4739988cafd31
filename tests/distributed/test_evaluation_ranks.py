"""Ranks that share the clips of an evaluation come to the figures of one alone: real processes, gloo."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from karmma_dist.launching.local import rank_command, rank_environments
from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.ranks import RECIPE, karmma_dist

CONDITIONS = ["--subsets", "--sweep", "--seeds", "2", "--corrupt", "audio:noise:5"]


@pytest.fixture
def folder(shards: Path, tmp_path: Path) -> Path:
    """Two runs that were never trained; 10 clips that no number of ranks here divides into their batches of 2."""
    classes = ShardFolder(shards).classes
    for seed, name in enumerate(["one", "two"]):
        data = {**RECIPE["data"], "shards": str(shards)}
        recipe = Recipe.model_validate({**RECIPE, "name": name, "seed": seed, "data": data})
        run = tmp_path / "runs" / name
        save_model(build_model(recipe, classes), run, classes=classes)
        tree = {**RECIPE, "name": name, "data": data, "evaluation": {"batch_size": 2}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_three_ranks_and_one_say_the_same(folder: Path) -> None:
    """The third rank's last batches are padding alone."""
    found = {}
    for num in (1, 3):
        places = ["--out", f"out{num}", "--predictions", f"{num}.npz"]
        karmma_dist(folder, "eval", "runs/one", *CONDITIONS, *places, "--local", str(num))
        found[num] = json.loads((folder / f"out{num}" / "results.json").read_text())
        assert (folder / f"out{num}" / "report.html").is_file()
    assert found[1]["summary"]["num_clips"] == 10
    assert len(found[1]["rows"]) > 40
    _same(found[1], found[3])
    with np.load(folder / "1.npz") as alone, np.load(folder / "3.npz") as shared:
        assert set(alone) == set(shared)
        for name in alone:
            if alone[name].dtype.kind == "f":
                np.testing.assert_allclose(shared[name], alone[name], atol=1e-5)
            else:
                np.testing.assert_array_equal(shared[name], alone[name])


def test_two_ranks_compare_two_runs(folder: Path) -> None:
    karmma_dist(folder, "eval", "runs/one", "runs/two", "--subsets", "--local=2")
    comparison = json.loads((folder / "runs" / "comparison" / "comparison.json").read_text())
    assert comparison["comparison"]["num_clips"] == 10
    assert all((folder / "runs" / name / "eval" / "results.json").is_file() for name in ("one", "two"))


def test_ranks_that_were_given_different_runs_are_refused(folder: Path) -> None:
    """As under `srun bash -c 'karmma-dist eval $MY_RUN'`: their clips must not be mixed."""
    ranks = [
        subprocess.Popen(
            rank_command(["eval", f"runs/{name}"]), cwd=folder, env={**os.environ, **environment},
            stderr=subprocess.PIPE, text=True,
        )
        for name, environment in zip(["one", "two"], rank_environments(2), strict=True)
    ]  # fmt: skip
    said = [rank.communicate(timeout=HANGS_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert all("rank 1 was given two on split 'validation'" in text for text in said)
    assert not list(folder.glob("runs/*/eval"))


def _same(one: Any, other: Any) -> None:
    """Equal but for the rounding of sums over other batches."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            _same(first, second)
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=1e-3)
    else:
        assert one == other
