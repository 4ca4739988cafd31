"""How several models stand to each other: the figure they are compared by, subset by subset, and their average rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.summary import by_subset, mean_over_seeds, whole_sensors

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
