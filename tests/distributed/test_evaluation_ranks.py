"""Ranks that share the clips of an evaluation arrive at the figures of a single process: processes, gloo."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from karmma_dist.models.model_card import save_model
from karmma_dist.models.weights import build_model
from karmma_dist.recipe import Recipe
from karmma_dist.shards.folder import ShardFolder
from kits.patience import HANGS_S
from kits.ranks import RECIPE, karmma_dist, run_ranks

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


def test_three_ranks_and_one_find_the_same_figures(folder: Path) -> None:
    """The last batches of the third rank are padding only."""
    results = {}
    for num in (1, 3):
        places = ["--out", f"out{num}", "--predictions", f"{num}.npz"]
        karmma_dist(folder, "eval", "runs/one", *CONDITIONS, *places, num_ranks=num)
        results[num] = json.loads((folder / f"out{num}" / "results.json").read_text())
        assert (folder / f"out{num}" / "report.html").is_file()
    assert results[1]["summary"]["num_clips"] == 10
    assert len(results[1]["rows"]) > 40
    _check_equal(results[1], results[3])
    with np.load(folder / "1.npz") as alone, np.load(folder / "3.npz") as shared:
        assert set(alone) == set(shared)
        for name in alone:
            if alone[name].dtype.kind == "f":
                np.testing.assert_allclose(shared[name], alone[name], atol=1e-5)
            else:
                np.testing.assert_array_equal(shared[name], alone[name])


def test_two_launched_ranks_compare_two_runs(folder: Path) -> None:
    command = [sys.executable, "-m", "karmma_dist", "eval", "runs/one", "runs/two", "--subsets", "--local=2"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=HANGS_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    comparison = json.loads((folder / "runs" / "comparison" / "comparison.json").read_text())
    assert comparison["comparison"]["num_clips"] == 10
    assert all((folder / "runs" / name / "eval" / "results.json").is_file() for name in ("one", "two"))


def test_ranks_that_evaluate_different_runs_are_refused(folder: Path) -> None:
    """`srun bash -c 'karmma-dist eval $MY_RUN'` must not mix the clips of two runs."""
    ended = run_ranks(folder, ["eval", "runs/one"], ["eval", "runs/two"])
    for code, _, errors in ended:
        assert code == 2, errors
        assert re.search("rank 1 .*two.*validation", errors)
    assert not list(folder.glob("runs/*/eval"))


def _check_equal(alone: Any, shared: Any) -> None:
    """Check that results are equal up to the rounding of sums over other batches."""
    if isinstance(alone, dict):
        assert alone.keys() == shared.keys()
        for key in alone:
            _check_equal(alone[key], shared[key])
    elif isinstance(alone, list):
        assert len(alone) == len(shared)
        for entry, other in zip(alone, shared, strict=True):
            _check_equal(entry, other)
    elif isinstance(alone, float):
        assert shared == pytest.approx(alone, abs=1e-3)
    else:
        assert alone == shared
