"""Figures over the rows of one model, and the standing of several models to each other.

Averages over subsets, relative drop, the curve over the drop probability; average rank between models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from karmma_dist.evaluation import metrics

METRIC = "action_top1"
"""The percentage that models are compared by."""

LEVEL = 0.05
"""Corrected p-values below it are called significant."""


def subset_values(models: Mapping[str, dict[str, Any]]) -> tuple[float, dict[str, dict[tuple[str, ...], float | None]]]:
    """Drop probability of the subset table, and per model the percentage of every subset, mean over seeds."""
    found = {name: by_subset(results["rows"]) for name, results in models.items()}
    probability = min((of[0] for of in found.values() if of is not None), default=0.0)
    values: dict[str, dict[tuple[str, ...], float | None]] = {}
    for name, results in models.items():
        rows: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in whole_sensors(results["rows"]):
            if row["drop_prob"] == probability:
                rows.setdefault(tuple(row["modalities"]), []).append(row)
        values[name] = {subset: mean_over_seeds(of, METRIC) for subset, of in rows.items()}
    return probability, values


def model_ranks(models: Mapping[str, dict[str, Any]]) -> dict[str, float | None]:
    """Average place of each model over the subsets that all of them were evaluated on."""
    values = subset_values(models)[1]
    common = [subset for subset in next(iter(values.values())) if all(subset in of for of in values.values())]
    return metrics.average_ranks({name: [of[subset] for subset in common] for name, of in values.items()})


Row = dict[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return `seeds`, and where the rows with whole sensors allow them `subsets` and `drop_curve` (else None).

    * `subsets`: over the rows of the lowest drop probability at which there are several subsets, mean over seeds
      first: `average` (all of them, the full set too) and `relative_drop` (percent lost against the full set,
      averaged over the proper subsets; None where the largest subset is not the union of all).
    * `drop_curve`: over the rows of the modalities swept at the most probabilities: `mean` and `std` (population)
      over seeds at each of `drop_prob`, `area` (mean height in percent, trapezoid rule), `fall` (points lost from the
      first probability to the last) and `relative_fall` (the same as a percentage of the first).

    Of calibration errors there are `average`, `mean` and `std` only.
    """
    names, errors = metric_names(rows), error_names(rows)
    return {
        "seeds": sorted({row["seed"] for row in rows}),
        "subsets": _over_subsets(rows, names, errors),
        "drop_curve": _over_drop_probs(rows, names, errors),
    }


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Keys of a row that are accuracies in percent."""
    endings = ("_top1", "_top5", "_mean_class", "_top1_tail", "_top1_unseen")
    return [key for key in rows[0] if key.endswith(endings)] if rows else []


def error_names(rows: Sequence[Row]) -> list[str]:
    """Keys of a row that are calibration errors in percent: the lower the better."""
    return [key for key in rows[0] if key.endswith("_ece")] if rows else []


def whole_sensors(rows: Sequence[Row]) -> list[Row]:
    """The rows in which no sensor is broken."""
    return [row for row in rows if row.get("corrupt") is None]


def mean_over_seeds(rows: Sequence[Row], name: str) -> float | None:
    """Mean of one percentage over rows that differ in their seed."""
    return metrics.average([row[name] for row in rows])


def by_subset(rows: Sequence[Row]) -> tuple[float, dict[tuple[str, ...], list[Row]]] | None:
    """The lowest drop probability at which several subsets were evaluated, and its rows per subset (one per seed)."""
    rows = whole_sensors(rows)
    for probability in sorted({row["drop_prob"] for row in rows}):
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            if row["drop_prob"] == probability:
                groups.setdefault(tuple(row["modalities"]), []).append(row)
        if len(groups) > 1:
            return probability, groups
    return None


def by_drop_prob(rows: Sequence[Row]) -> tuple[tuple[str, ...], dict[float, list[Row]]] | None:
    """The modalities evaluated at the most drop probabilities (at least two), and their rows per probability."""
    groups: dict[tuple[str, ...], dict[float, list[Row]]] = {}
    for row in whole_sensors(rows):
        groups.setdefault(tuple(row["modalities"]), {}).setdefault(row["drop_prob"], []).append(row)
    swept = max(groups, key=lambda names: (len(groups[names]), len(names)), default=None)
    if swept is None or len(groups[swept]) < 2:
        return None
    return swept, dict(sorted(groups[swept].items()))


def _over_subsets(rows: Sequence[Row], names: list[str], errors: list[str]) -> dict[str, Any] | None:
    found = by_subset(rows)
    if found is None:
        return None
    probability, groups = found
    full = max(groups, key=len)
    has_full = all(set(subset) <= set(full) for subset in groups)
    values = {name: {subset: mean_over_seeds(of, name) for subset, of in groups.items()} for name in names + errors}
    return {
        "drop_prob": probability,
        "num_subsets": len(groups),
        "full": list(full) if has_full else None,
        "average": {name: metrics.average(list(of.values())) for name, of in values.items()},
        "relative_drop": {
            name: _relative_drop(values[name], full) if has_full else None for name in names
        },
    }


def _over_drop_probs(rows: Sequence[Row], names: list[str], errors: list[str]) -> dict[str, Any] | None:
    found = by_drop_prob(rows)
    if found is None:
        return None
    modalities, groups = found
    probabilities = list(groups)
    mean = {name: [mean_over_seeds(of, name) for of in groups.values()] for name in names + errors}
    return {
        "modalities": list(modalities),
        "drop_prob": probabilities,
        "num_seeds": max(len(of) for of in groups.values()),
        "mean": mean,
        "std": {name: [_std([row[name] for row in of]) for of in groups.values()] for name in names + errors},
        "area": {name: metrics.curve_area(probabilities, mean[name]) for name in names},
        "fall": {name: _difference(mean[name]) for name in names},
        "relative_fall": {name: metrics.relative_drop(mean[name][0], mean[name][-1]) for name in names},
    }


def _relative_drop(values: dict[tuple[str, ...], float | None], full: tuple[str, ...]) -> float | None:
    return metrics.average_relative_drop(values[full], [value for subset, value in values.items() if subset != full])


def _std(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, dtype=np.float64)) if known else None


def _difference(values: list[float | None]) -> float | None:
    return None if values[0] is None or values[-1] is None else values[0] - values[-1]
