"""Figures over the rows of one model, and the ranking of several models.

They are the averages over subsets, the relative drop, the curve over the drop probability, and the average rank among
models. All of them use the plain rows only: those without a broken sensor or a modality that a share of clips lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.results import Curves, DropCurve, Interval, ResultRow, Results, SubsetSummary, Values

METRIC = "action_top1"
"""Percentage by which models are compared."""

LEVEL = 0.05
"""Significance level: corrected p-values below it are called significant."""

Subset = tuple[str, ...]


def summarise(rows: Sequence[ResultRow]) -> tuple[list[int], SubsetSummary | None, DropCurve | None]:
    """Return the seeds, the figures over subsets, and the drop curve; None for what the plain rows do not contain.

    * Subsets use the rows at the lowest drop probability with several subsets, averaged over seeds first. They have
      `average` (over all subsets, including the full set) and `relative_drop` (loss against the full set in percent,
      averaged over the proper subsets; None if the largest subset is not the union of all).
    * The drop curve uses the rows of the modalities that were swept at the most probabilities. It has `mean` and `std`
      (population) over seeds at each `drop_prob`, `area` (mean height in percent, trapezoid rule), `fall` (points lost
      from the first probability to the last) and `relative_fall` (the fall as a percentage of the first value).

    Both contain percentages only; metrics for which lower is better have only `average`, `mean` and `std`.
    """
    gains, errors = _percentages(rows)
    return sorted({row.seed for row in rows}), _over_subsets(rows, gains, errors), _over_drop_probs(rows, gains, errors)


def _percentages(rows: Sequence[ResultRow]) -> tuple[list[str], list[str]]:
    """Return the names of the percentages for which higher is better, and of those for which lower is better."""
    known = [find_figure(name) for name in rows[0].figures] if rows else []
    percentages = [figure for figure in known if figure.metric.is_percent]
    errors = [figure.name for figure in percentages if figure.metric.lower_is_better]
    return [figure.name for figure in percentages if figure.name not in errors], errors


def plain_rows(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the rows whose conditions consist of modalities and a drop probability only."""
    return [row for row in rows if row.is_plain]


def rows_of(rows: Iterable[ResultRow], modalities: Sequence[str], drop_prob: float) -> list[ResultRow]:
    """Return the plain rows of one set of modalities and drop probability, one per seed."""
    wanted = (tuple(modalities), drop_prob)
    return [row for row in plain_rows(rows) if (row.modalities, row.drop_prob) == wanted]


def fullest(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the plain rows (one per seed) with the lowest drop probability, and among them the most modalities."""
    rows = plain_rows(rows)
    first = min(rows, key=lambda row: (row.drop_prob, -len(row.modalities)), default=None)
    return [] if first is None else rows_of(rows, first.modalities, first.drop_prob)


def mean_over_seeds(rows: Iterable[ResultRow], name: str = METRIC) -> float | None:
    """Return the mean of one figure over rows that differ only in their seed."""
    return metrics.average([row.figures[name] for row in rows])


def interval_of(rows: Sequence[ResultRow], name: str = METRIC) -> Interval | None:
    """Return the interval of the mean over seeds; it is known only for a single row."""
    return rows[0].intervals.get(name) if len(rows) == 1 else None


def by_subset(rows: Sequence[ResultRow]) -> tuple[float, dict[Subset, list[ResultRow]]] | None:
    """Return the lowest drop probability at which several subsets were evaluated, and its rows per subset."""
    rows = plain_rows(rows)
    for probability in sorted({row.drop_prob for row in rows}):
        groups: dict[Subset, list[ResultRow]] = {}
        for row in rows:
            if row.drop_prob == probability:
                groups.setdefault(row.modalities, []).append(row)
        if len(groups) > 1:
            return probability, groups
    return None


def by_drop_prob(rows: Sequence[ResultRow]) -> tuple[Subset, dict[float, list[ResultRow]]] | None:
    """Return the modalities evaluated at the most drop probabilities (at least two), and their rows per probability."""
    groups: dict[Subset, dict[float, list[ResultRow]]] = {}
    for row in plain_rows(rows):
        groups.setdefault(row.modalities, {}).setdefault(row.drop_prob, []).append(row)
    swept = max(groups, key=lambda names: (len(groups[names]), len(names)), default=None)
    if swept is None or len(groups[swept]) < 2:
        return None
    return swept, dict(sorted(groups[swept].items()))


def subset_rows(models: Mapping[str, Results]) -> tuple[float, dict[str, dict[Subset, list[ResultRow]]]]:
    """Return the drop probability at which subsets are compared, and per model its rows (one per seed) per subset."""
    grouped = {name: by_subset(results.rows) for name, results in models.items()}
    probability = min((group[0] for group in grouped.values() if group is not None), default=0.0)
    rows: dict[str, dict[Subset, list[ResultRow]]] = {name: {} for name in models}
    for name, results in models.items():
        for row in plain_rows(results.rows):
            if row.drop_prob == probability:
                rows[name].setdefault(row.modalities, []).append(row)
    return probability, rows


def model_ranks(models: Mapping[str, Results], name: str = METRIC) -> dict[str, float | None]:
    """Return the average rank of each model by one figure over the subsets that all models have, 1 = best."""
    rows = subset_rows(models)[1]
    common = [subset for subset in next(iter(rows.values())) if all(subset in groups for groups in rows.values())]
    values = {model: [mean_over_seeds(groups[subset], name) for subset in common] for model, groups in rows.items()}
    return metrics.average_ranks(values)


def broken_condition(results: Results) -> tuple[Subset, float] | None:
    """Return the largest set of modalities with a broken sensor, and its lowest drop probability; None: no such row."""
    rows = [row for row in results.rows if row.corrupt is not None]
    if not rows:
        return None
    modalities = max((row.modalities for row in rows), key=len)
    return modalities, min(row.drop_prob for row in rows if row.modalities == modalities)


def by_corruption(rows: Iterable[ResultRow], condition: tuple[Subset, float]) -> dict[str | None, list[ResultRow]]:
    """Return the rows (one per seed) of one condition by corruption; the first key is None, for intact sensors."""
    groups: dict[str | None, list[ResultRow]] = {None: []}
    for row in rows:
        if (row.modalities, row.drop_prob) == condition and row.missing is None:
            groups.setdefault(row.corrupt, []).append(row)
    return groups


def by_missing(rows: Iterable[ResultRow]) -> dict[tuple[Subset, str], list[ResultRow]]:
    """Return the rows (one per seed) in which a share of the clips lacks one modality, by modalities and `missing`."""
    groups: dict[tuple[Subset, str], list[ResultRow]] = {}
    for row in rows:
        if row.missing is not None:
            groups.setdefault((row.modalities, row.missing), []).append(row)
    return groups


def _over_subsets(rows: Sequence[ResultRow], gains: list[str], errors: list[str]) -> SubsetSummary | None:
    grouped = by_subset(rows)
    if grouped is None:
        return None
    probability, groups = grouped
    full = max(groups, key=len)
    has_full = all(set(subset) <= set(full) for subset in groups)
    names = gains + errors
    values = {name: {subset: mean_over_seeds(seeds, name) for subset, seeds in groups.items()} for name in names}
    return SubsetSummary(
        drop_prob=probability,
        num_subsets=len(groups),
        full=full if has_full else None,
        average={name: metrics.average(list(by_name.values())) for name, by_name in values.items()},
        relative_drop={name: _relative_drop(values[name], full) if has_full else None for name in gains},
    )


def _over_drop_probs(rows: Sequence[ResultRow], gains: list[str], errors: list[str]) -> DropCurve | None:
    grouped = by_drop_prob(rows)
    if grouped is None:
        return None
    modalities, groups = grouped
    probabilities, names = list(groups), gains + errors
    mean: Curves = {name: [mean_over_seeds(seeds, name) for seeds in groups.values()] for name in names}
    area: Values = {name: metrics.curve_area(probabilities, mean[name]) for name in gains}
    return DropCurve(
        modalities=modalities,
        drop_prob=probabilities,
        num_seeds=max(map(len, groups.values())),
        mean=mean,
        std={name: [_std([row.figures[name] for row in seeds]) for seeds in groups.values()] for name in names},
        area=area,
        fall={name: _difference(mean[name]) for name in gains},
        relative_fall={name: metrics.relative_drop(mean[name][0], mean[name][-1]) for name in gains},
    )


def _relative_drop(values: dict[Subset, float | None], full: Subset) -> float | None:
    return metrics.average_relative_drop(values[full], [value for subset, value in values.items() if subset != full])


def _std(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.std(known, dtype=np.float64)) if known else None


def _difference(values: list[float | None]) -> float | None:
    return None if values[0] is None or values[-1] is None else values[0] - values[-1]
