"""How far the figures would move with other clips: the bootstrap's percentile intervals (Efron and Tibshirani, ch. 13).

Clips are drawn with replacement, as many as there are, and every figure is computed anew. A draw takes the same clips
under every condition, and, with the same seed and clips, for every model: differences between two models are paired.

Legend: N clips, K conditions, D draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from karmma_dist.evaluation.scores import Outcomes, Results
from karmma_dist.evaluation.summary import Row, by_drop_prob, by_subset
from karmma_dist.seeding import bootstrap_generator

NUM_DRAWS = 1000
LEVEL = 95.0
"""Percent of the draws that an interval holds."""

_DRAWS_AT_ONCE = 100


def add_intervals(results: Results, num_draws: int = NUM_DRAWS, seed: int = 0) -> Results:
    """Return the results with 95 % intervals [low, high] of every top-1 percentage.

    Rows get action_top1_ci and the same per head; the summary's `subsets` gets `average_ci`, its `drop_curve` gets
    `area_ci` and, per drop probability, `mean_ci`. An interval is None where its figure is. They say what other clips
    would change; that other random drops would change something too is in the spread over the seeds.

    Args:
        results: With their outcomes.
        num_draws: D.
        seed: Of the draws.
    """
    rows = results.rows
    subsets, curve = (None if (of := results.summary[key]) is None else dict(of) for key in ("subsets", "drop_curve"))
    found = {name: resampled_top1(results.per_clip, name, num_draws, seed) for name in results.per_clip.ranks}
    ends = {f"{name}_top1": [interval(of_D) for of_D in top1_DK.T] for name, top1_DK in found.items()}
    if subsets is not None:
        subsets["average_ci"] = {
            f"{name}_top1": interval(subset_average(top1_DK, rows)) for name, top1_DK in found.items()
        }
    if curve is not None:
        curve["area_ci"] = {
            f"{name}_top1": interval(drop_curve_area(top1_DK, rows)) for name, top1_DK in found.items()
        }
        curve["mean_ci"] = {
            f"{name}_top1": [interval(weighted(top1_DK, of_K)) for of_K in probability_weights(rows)]
            for name, top1_DK in found.items()
        }
    rows = [_with_intervals(row, {name: of[k] for name, of in ends.items()}) for k, row in enumerate(rows)]
    return Results(rows, results.summary | {"subsets": subsets, "drop_curve": curve}, results.outcomes)


def _with_intervals(row: Row, intervals: dict[str, list[float] | None]) -> Row:
    """The row with each interval behind its figure."""
    return {
        key: value
        for name, figure in row.items()
        for key, value in ((name, figure), *([(f"{name}_ci", intervals[name])] if name in intervals else []))
    }


def resampled_top1(outcomes: Outcomes, name: str, num_draws: int = NUM_DRAWS, seed: int = 0) -> np.ndarray:
    """Top-1 percentage per draw and condition, float64 (D, K); nan where a draw holds no clip that can be shown."""
    ranks_NK = outcomes.ranks[name]
    right_NK, shown_NK = ((of_NK).astype(np.float32) for of_NK in (ranks_NK == 0, ranks_NK >= 0))
    parts = []
    for times_DN in _draws(len(ranks_NK), num_draws, seed):
        parts.append(percent_right(times_DN, right_NK, shown_NK))
    return np.concatenate(parts)


def percent_right(times_DN: np.ndarray, right_NK: np.ndarray, shown_NK: np.ndarray) -> np.ndarray:
    """Return the percentage that is right of the clips shown, float64 (D, K), with each clip as often as it was drawn.

    Args:
        times_DN: How often, float32.
        right_NK: 1 where a clip is right, float32.
        shown_NK: 1 where it can be shown, float32.
    """
    num_right_DK, num_shown_DK = times_DN @ right_NK, times_DN @ shown_NK  # whole numbers < 2^24: exact in float32
    with np.errstate(invalid="ignore"):
        percent_DK: np.ndarray = 100.0 * num_right_DK.astype(np.float64) / num_shown_DK
    return percent_DK


def _draws(num_clips: int, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each clip is in each draw, float32 (some draws, N)."""
    random = bootstrap_generator(seed)
    for first in range(0, num_draws, _DRAWS_AT_ONCE):
        num = min(_DRAWS_AT_ONCE, num_draws - first)
        places = random.integers(num_clips, size=(num, num_clips)) + num_clips * np.arange(num)[:, None]
        yield np.bincount(places.ravel(), minlength=num * num_clips).reshape(num, num_clips).astype(np.float32)


def interval(draws_D: np.ndarray) -> list[float] | None:
    """The percentile interval of a figure, over the draws in which it exists."""
    known = draws_D[~np.isnan(draws_D)]
    if not len(known):
        return None
    tail = (100.0 - LEVEL) / 2
    return [float(end) for end in np.percentile(known, [tail, 100.0 - tail])]


def weighted(draws_DK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """Weighted mean over the conditions, (D,), of those with a figure in the draw."""
    there_DK = ~np.isnan(draws_DK)
    with np.errstate(invalid="ignore"):
        result: np.ndarray = (np.where(there_DK, draws_DK, 0.0) @ weights_K) / (there_DK @ weights_K)
    return result


def subset_average(draws_DK: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """The summary's average over subsets in each draw, (D,); nan where it has none."""
    return weighted(draws_DK, average_weights(rows))


def drop_curve_area(draws_DK: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """The area under the summary's drop curve in each draw, (D,); nan where it has none."""
    return weighted(draws_DK, area_weights(rows))


def drop_curve_fall(draws_DK: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
    """The fall of the summary's drop curve in each draw, in points, (D,); nan where it has none."""
    weights = probability_weights(rows)
    if not weights:
        return np.full(len(draws_DK), np.nan)
    return weighted(draws_DK, weights[0]) - weighted(draws_DK, weights[-1])


def average_weights(rows: Sequence[Row]) -> np.ndarray:
    """Weight of each row (K,) in the summary's average over subsets; all 0 where there is none."""
    found = by_subset(rows)
    groups = [] if found is None else list(found[1].values())
    return _weights(rows, [(of, 1 / len(groups)) for of in groups])


def area_weights(rows: Sequence[Row]) -> np.ndarray:
    """Weight of each row (K,) in the area under the summary's drop curve; all 0 where there is none."""
    found = by_drop_prob(rows)
    if found is None:
        return np.zeros(len(rows))
    probabilities = np.array(list(found[1]))
    half_widths = np.diff(probabilities) / (2 * (probabilities[-1] - probabilities[0]))
    heights = np.concatenate([half_widths, [0.0]]) + np.concatenate([[0.0], half_widths])
    return _weights(rows, list(zip(found[1].values(), heights.tolist(), strict=True)))


def probability_weights(rows: Sequence[Row]) -> list[np.ndarray]:
    """Per drop probability of the summary's curve, the weights (K,) of its mean over seeds; empty: there is none."""
    found = by_drop_prob(rows)
    return [] if found is None else [_weights(rows, [(of, 1.0)]) for of in found[1].values()]


def _weights(rows: Sequence[Row], groups: Sequence[tuple[list[dict[str, Any]], float]]) -> np.ndarray:
    """Each group's weight shared evenly among its rows (its seeds)."""
    places = {id(row): k for k, row in enumerate(rows)}
    weights_K = np.zeros(len(rows))
    for of, weight in groups:
        for row in of:
            weights_K[places[id(row)]] += weight / len(of)
    return weights_K
