"""Rows of results.json as the report reads them, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.metrics import find_figure, known_figure
from karmma_dist.evaluation.summary import METRIC

Row = dict[str, Any]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Return the keys of a row that are percentages of which more is better."""
    return [name for name in _percentages(rows) if not find_figure(name).metric.lower_is_better]


def error_names(rows: Sequence[Row]) -> list[str]:
    """Return the keys of a row that are percentages of which less is better."""
    return [name for name in _percentages(rows) if find_figure(name).metric.lower_is_better]


def _percentages(rows: Sequence[Row]) -> list[str]:
    figures = {key: known_figure(key) for key in (rows[0] if rows else {})}
    return [key for key, figure in figures.items() if figure is not None and figure.metric.is_percent]


def whole_sensors(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which no sensor is broken."""
    return [row for row in rows if row.get("corrupt") is None]


def mean_over_seeds(rows: Sequence[Row], name: str) -> float | None:
    """Return the mean of one percentage over rows that differ in their seed."""
    return metrics.average([row[name] for row in rows])


def subset_values(models: Mapping[str, dict[str, Any]]) -> tuple[float, dict[str, dict[tuple[str, ...], float | None]]]:
    """Return the drop probability of the subset table, and per model the percentage of every subset."""
    probability = min((p for results in models.values() for p in _several_subsets(results["rows"])), default=0.0)
    values: dict[str, dict[tuple[str, ...], float | None]] = {}
    for name, results in models.items():
        rows: dict[tuple[str, ...], list[Row]] = {}
        for row in whole_sensors(results["rows"]):
            if row["drop_prob"] == probability:
                rows.setdefault(tuple(row["modalities"]), []).append(row)
        values[name] = {subset: mean_over_seeds(seeds, METRIC) for subset, seeds in rows.items()}
    return probability, values


def _several_subsets(rows: Sequence[Row]) -> list[float]:
    """Drop probabilities at which there are several subsets."""
    subsets: dict[float, set[tuple[str, ...]]] = {}
    for row in whole_sensors(rows):
        subsets.setdefault(row["drop_prob"], set()).add(tuple(row["modalities"]))
    return [probability for probability, names in subsets.items() if len(names) > 1]


def model_ranks(models: Mapping[str, dict[str, Any]]) -> dict[str, float | None]:
    """Return the average place of each model over the subsets that all of them were evaluated on."""
    values = subset_values(models)[1]
    common = [subset for subset in next(iter(values.values())) if all(subset in own for own in values.values())]
    return metrics.average_ranks({name: [own[subset] for subset in common] for name, own in values.items()})
