"""Bootstrap percentile intervals of the figures over other samples of clips (Efron and Tibshirani, ch. 13).

Each draw samples N of the N clips with replacement and recomputes every figure. A draw takes the same clips under every
condition and, for the same seed and clips, for every model: differences between two models are paired.

Legend: N clips, K conditions, D draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from karmma_dist.evaluation.metrics import Figure
from karmma_dist.evaluation.results import ClipResults, Interval, ResultRow, Results
from karmma_dist.evaluation.summary import by_drop_prob, by_subset
from karmma_dist.seeding import bootstrap_generator

NUM_DRAWS = 1000
LEVEL = 95.0
"""Percentage of the draws that an interval contains."""

_DRAWS_AT_ONCE = 100


def add_intervals(results: Results, num_draws: int = NUM_DRAWS, seed: int = 0) -> Results:
    """Return the results with 95 % intervals [low, high] of every figure whose metric has intervals.

    Rows get the intervals of their figures, the summary's `subsets` gets `average_ci`, and its `drop_curve` gets
    `area_ci` and, per drop probability, `mean_ci`. The interval is None if the figure is None. Intervals cover the
    choice of clips; the spread over seeds covers the random drops.

    Args:
        results: Results with `clips`.
        num_draws: Number of draws D.
        seed: Seed of the draws.
    """
    rows, summary = results.rows, results.summary
    drawn = {
        figure.name: resampled(results.per_clip, figure, num_draws, seed)
        for figure in results.figures
        if figure.metric.has_interval
    }
    if summary.subsets is not None:
        average = {name: interval(subset_average(top_DK, rows)) for name, top_DK in drawn.items()}
        summary = replace(summary, subsets=replace(summary.subsets, average_ci=average))
    if summary.drop_curve is not None:
        has_area = summary.drop_curve.area.keys()
        area = {name: interval(drop_curve_area(top_DK, rows)) for name, top_DK in drawn.items() if name in has_area}
        mean = {
            name: [interval(weighted(top_DK, weights_K)) for weights_K in probability_weights(rows)]
            for name, top_DK in drawn.items()
        }
        summary = replace(summary, drop_curve=replace(summary.drop_curve, area_ci=area, mean_ci=mean))
    rows = [
        replace(row, intervals={name: interval(top_DK[:, k]) for name, top_DK in drawn.items()})
        for k, row in enumerate(rows)
    ]
    return Results(rows, summary, results.clips)


def resampled(clips: ClipResults, figure: Figure, num_draws: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:
    """Return the percentage per draw and condition, float64 (D, K); nan if a draw has no clip that can be shown.

    Args:
        clips: Results per clip.
        figure: Figure of a metric with `is_per_clip`.
        num_draws: Number of draws D.
        seed: Seed of the draws.
    """
    right_NK, shown_NK = right_and_shown(clips, figure)
    parts = [percent_right(times_DN, right_NK, shown_NK) for times_DN in _draws(len(shown_NK), num_draws, seed)]
    return np.concatenate(parts)


def right_and_shown(clips: ClipResults, figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 (N, K): 1 where a clip is right, and 1 where a clip can be shown."""
    assert figure.metric.right is not None, figure.name
    ranks_NK = clips.ranks[figure.scored]
    shown_NK = ranks_NK >= 0
    return (shown_NK & figure.metric.right(ranks_NK)).astype(np.float32), shown_NK.astype(np.float32)


def percent_right(times_DN: np.ndarray, right_NK: np.ndarray, shown_NK: np.ndarray) -> np.ndarray:
    """Return the percentage of the shown clips that are right, float64 (D, K), weighted by how often each was drawn.

    Args:
        times_DN: Number of times that each clip was drawn, float32.
        right_NK: 1 where a clip is right, float32.
        shown_NK: 1 where a clip can be shown, float32.
    """
    num_right_DK, num_shown_DK = times_DN @ right_NK, times_DN @ shown_NK  # whole numbers < 2^24: exact in float32
    with np.errstate(invalid="ignore"):
        percent_DK: np.ndarray = 100.0 * num_right_DK.astype(np.float64) / num_shown_DK
    return percent_DK


def _draws(num_clips: int, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the number of times that each clip is drawn, float32 (some draws, N)."""
    random = bootstrap_generator(seed)
    for first in range(0, num_draws, _DRAWS_AT_ONCE):
        num = min(_DRAWS_AT_ONCE, num_draws - first)
        places = random.integers(num_clips, size=(num, num_clips)) + num_clips * np.arange(num)[:, None]
        yield np.bincount(places.ravel(), minlength=num * num_clips).reshape(num, num_clips).astype(np.float32)


def interval(draws_D: np.ndarray) -> Interval | None:
    """Return the percentile interval of a figure over the draws in which it is not nan; None: it is nan in all."""
    known = draws_D[~np.isnan(draws_D)]
    if not len(known):
        return None
    tail = (100.0 - LEVEL) / 2
    low, high = np.percentile(known, [tail, 100.0 - tail])
    return float(low), float(high)


def weighted(draws_DK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Return the weighted mean (D,) over the conditions that are not nan in the draw."""
    known_DK = ~np.isnan(draws_DK)
    with np.errstate(invalid="ignore"):
        result: np.ndarray = (np.where(known_DK, draws_DK, 0.0) @ weights_K) / (known_DK @ weights_K)
    return result


def subset_average(draws_DK: np.ndarray, rows: Sequence[ResultRow]) -> np.ndarray:
    """Return the summary's average over subsets in each draw, (D,); nan if it has none."""
    return weighted(draws_DK, average_weights(rows))


def drop_curve_area(draws_DK: np.ndarray, rows: Sequence[ResultRow]) -> np.ndarray:
    """Return the area under the summary's drop curve in each draw, (D,); nan if it has none."""
    return weighted(draws_DK, area_weights(rows))


def drop_curve_fall(draws_DK: np.ndarray, rows: Sequence[ResultRow]) -> np.ndarray:
    """Return the fall of the summary's drop curve in each draw, in points, (D,); nan if it has none."""
    weights = probability_weights(rows)
    if not weights:
        return np.full(len(draws_DK), np.nan)
    return weighted(draws_DK, weights[0]) - weighted(draws_DK, weights[-1])


def average_weights(rows: Sequence[ResultRow]) -> np.ndarray:
    """Return the weight of each row (K,) in the summary's average over subsets; all 0 if it has none."""
    grouped = by_subset(rows)
    groups = [] if grouped is None else list(grouped[1].values())
    return _weights(rows, [(seeds, 1 / len(groups)) for seeds in groups])


def area_weights(rows: Sequence[ResultRow]) -> np.ndarray:
    """Return the weight of each row (K,) in the area under the summary's drop curve; all 0 if it has none."""
    grouped = by_drop_prob(rows)
    if grouped is None:
        return np.zeros(len(rows))
    probabilities = np.array(list(grouped[1]))
    half_widths = np.diff(probabilities) / (2 * (probabilities[-1] - probabilities[0]))
    heights = np.concatenate([half_widths, [0.0]]) + np.concatenate([[0.0], half_widths])
    return _weights(rows, list(zip(grouped[1].values(), heights.tolist(), strict=True)))


def probability_weights(rows: Sequence[ResultRow]) -> list[np.ndarray]:
    """Return the weights (K,) of the mean over seeds at each drop probability of the curve; empty without a curve."""
    grouped = by_drop_prob(rows)
    return [] if grouped is None else [_weights(rows, [(seeds, 1.0)]) for seeds in grouped[1].values()]


def _weights(rows: Sequence[ResultRow], groups: Sequence[tuple[list[ResultRow], float]]) -> np.ndarray:
    """Return the weight of each row (K,); the weight of a group is shared equally among its rows (its seeds)."""
    places = {id(row): k for k, row in enumerate(rows)}
    weights_K = np.zeros(len(rows))
    for seeds, weight in groups:
        for row in seeds:
            weights_K[places[id(row)]] += weight / len(seeds)
    return weights_K
