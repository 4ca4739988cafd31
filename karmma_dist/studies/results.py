"""Evaluate the runs of a study under its conditions, each run once: earlier results are read from disk.

    RUN/eval-study/KEY/      KEY: a hash of conditions, split and views
      results.json           the format of `karmma-dist eval`
      outcomes.npz           results per clip, needed for intervals over seeds and clips
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.plan import default_split, plan_evaluation
from karmma_dist.evaluation.report.write import write_results
from karmma_dist.evaluation.results import ClipResults
from karmma_dist.evaluation.run import carry_out
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import write_whole
from karmma_dist.io.json_fields import JsonObject, parse_strictly
from karmma_dist.modalities import parse_modalities
from karmma_dist.models.weights import own_weights
from karmma_dist.progress import Report
from karmma_dist.recipe import Recipe
from karmma_dist.studies.study import Evaluate, Study

FOLDER = "eval-study"
OUTCOMES = "outcomes.npz"


def evaluate_run(weights: Path, recipe: Recipe, study: Study, report: Report) -> ClipResults:
    """Evaluate a finished run, or read the stored results if they are newer than its weights.

    Args:
        weights: Run folder, or its best/ folder.
        recipe: Recipe of the run.
        study: Study that defines the conditions.
        report: Called with the progress.

    Raises:
        UserError: see `plan_evaluation` and `carry_out`.
    """
    split = default_split(recipe.data)
    chosen = partial(conditions, study.evaluate)
    options = [study.evaluate.model_dump(mode="json"), split, recipe.data.drop_nouns, recipe.data.shards,
               recipe.evaluation.views.model_dump(mode="json")]  # fmt: skip
    folder = weights / FOLDER / hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    stored = folder / OUTCOMES
    if stored.is_file() and stored.stat().st_mtime_ns >= own_weights(weights).stat().st_mtime_ns:
        with contextlib.suppress(OSError, KeyError, ValueError, zipfile.BadZipFile):  # cut or outdated: evaluate again
            return read_outcomes(stored)
    plan = plan_evaluation(weights, chosen, shards=recipe.data.shards, split=split, out=folder)
    results = carry_out(plan, report).results
    write_results(results, folder)
    write_outcomes(stored, results.per_clip)
    return results.per_clip


def conditions(evaluate: Evaluate, available: Sequence[str]) -> list[Condition]:
    """Return the conditions for a model with the modalities `available`; all modalities present is always included."""
    names = evaluate.modalities
    shown = None if names is None else parse_modalities(",".join(names), available)
    used = shown or tuple(available)
    shares = [share for share in evaluate.missing_shares if share.modality in used and len(used) > 1]
    built = build_conditions(
        available, modalities=shown, subsets=evaluate.subsets, sweep=evaluate.sweep and len(used) > 1,
        num_seeds=evaluate.drop_seeds if evaluate.sweep or shares else 1, missing=list(map(str, shares)),
    )  # fmt: skip
    return list(dict.fromkeys([*built, Condition(used)]))


def write_outcomes(path: Path, outcomes: ClipResults) -> None:
    """Write the results per clip, whole or not at all."""
    listed = json.dumps([_without_missing(asdict(condition)) for condition in outcomes.conditions])
    arrays: dict[str, Any] = {f"ranks_{name}": ranks_NK for name, ranks_NK in outcomes.ranks.items()}
    arrays |= {"keys": np.array(outcomes.keys), "conditions": np.array(listed)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    make_folder(path.parent)
    write_whole(path, write)


def _without_missing(condition: dict[str, Any]) -> dict[str, Any]:
    """Return the condition without a `missing` of None, as in results.json."""
    return {name: value for name, value in condition.items() if name != "missing" or value is not None}


def _condition(fields: JsonObject) -> Condition:
    corrupt = None if fields.is_null("corrupt") else fields.text("corrupt")
    missing = fields.text("missing") if "missing" in fields else None
    drop_prob = float(fields.number("drop_prob"))
    return Condition(tuple(fields.texts("modalities")), drop_prob, fields.whole("seed"), corrupt, missing)


def read_outcomes(path: Path) -> ClipResults:
    """Read the results per clip that `write_outcomes` wrote.

    Raises:
        OSError: the file cannot be read.
        KeyError: an array is missing.
        ValueError: the file, or its list of conditions, is damaged.
        zipfile.BadZipFile: the file is cut.
    """
    with np.load(path, allow_pickle=False) as file:
        stored = JsonObject({"conditions": parse_strictly(str(file["conditions"]))}).objects("conditions")
        listed = [_condition(fields) for fields in stored]
        ranks = {name.removeprefix("ranks_"): file[name] for name in file.files if name.startswith("ranks_")}
        return ClipResults([str(key) for key in file["keys"]], listed, ranks)
