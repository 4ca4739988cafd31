"""Several models on the same clips: is one better than another, or would other clips say otherwise?

Per condition an exact McNemar test on the clips that exactly one of two models gets right; for averages over subsets
and for area and fall of the drop curve a paired bootstrap of the difference: every draw takes the same clips for both
models. p-values are corrected for their number by Holm.

Legend: N clips, K conditions, D draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.scores import Results
from karmma_dist.evaluation.statistics import bootstrap
from karmma_dist.evaluation.summary import METRIC, Row, model_ranks

FIGURES = {
    "subset_average": bootstrap.subset_average,
    "drop_curve_area": bootstrap.drop_curve_area,
    "drop_curve_fall": bootstrap.drop_curve_fall,
}
"""Over several conditions: given top-1 per draw and condition (D, K) and the K rows, the figure of each draw (D,)."""

NUM_DRAWS = 10_000
"""Draws of a paired bootstrap: its p-values are multiples of 2 / 10,001, small enough to stand a correction."""

_NAME = METRIC.removesuffix("_top1")


def compare(models: Mapping[str, Results], num_draws: int = NUM_DRAWS, seed: int = 0) -> dict[str, Any]:
    """Compare every pair of models on action top-1 under the conditions both were evaluated under.

    Returns:
        `num_clips`; `average_rank` per model over the subsets that all have (None: there are none); and `pairs`, one
        per pair of models in the order of `models`: `models` [first, second]; `conditions`, each with modalities,
        drop_prob, seed, corrupt, num_clips (shown to both), `difference` (second minus first, in points),
        `only_first` and `only_second` (clips that this one alone gets right), `p` and `p_holm` (over all pairs and
        conditions with whole sensors, or all with a broken one); and `subset_average`, `drop_curve_area` and
        `drop_curve_fall` (the more, the worse), each None or with `difference`, its 95 % interval `ci`, `p` and
        `p_holm` (over all pairs). These are of whole sensors, and of the conditions that both models were evaluated
        under.

    Raises:
        UserError: fewer than two models, other clips or classes, or a pair without a common condition.
    """
    if len(models) < 2:
        raise UserError("one model is no comparison: name at least two runs")
    check_same_clips(models)
    draws = {
        name: bootstrap.resampled_top1(results.per_clip, _NAME, num_draws, seed) for name, results in models.items()
    }
    pairs = [_pair(names, models, draws) for names in itertools.combinations(models, 2)]
    tests = [test for pair in pairs for test in pair["conditions"]]
    for is_broken in (False, True):
        _correct([test for test in tests if (test["corrupt"] is not None) == is_broken])
    for figure in FIGURES:
        _correct([pair[figure] for pair in pairs if pair[figure] is not None])
    return {
        "num_clips": next(iter(models.values())).summary["num_clips"],
        "average_rank": model_ranks({name: results.to_dict() for name, results in models.items()}),
        "pairs": pairs,
    }


def check_same_clips(models: Mapping[str, Results]) -> None:
    """Paired figures need the same clips of the same classes.

    Raises:
        UserError: a model was evaluated on others than the first.
    """
    (first, expected), *others = models.items()
    for name, results in others:
        if results.summary["num_classes"] != expected.summary["num_classes"]:
            raise UserError(
                f"{name} and {first} know other classes ({results.summary['num_classes']} and "
                f"{expected.summary['num_classes']}): only models of one dataset can be compared"
            )
        check_same_keys((name, results.per_clip.keys), (first, expected.per_clip.keys))


def check_shared(names: Sequence[str], shared: Collection[Condition]) -> None:
    """Check that two models have conditions in common, those in `shared`.

    Raises:
        UserError: there is none.
    """
    if not shared:
        raise UserError(f"{' and '.join(names)} have no condition in common: choose --modalities that both have")


def check_same_keys(one: tuple[str, Sequence[str]], other: tuple[str, Sequence[str]]) -> None:
    """Of two models, each its name and the keys of its clips in their order.

    Raises:
        UserError: they are not the same.
    """
    (name, keys), (first, known) = one, other
    if keys == known:
        return
    odd = min(set(keys) ^ set(known))
    owner = name if odd in set(keys) else first
    raise UserError(
        f"{name} is evaluated on {len(keys)} clips, {first} on {len(known)}: clip {odd} is only {owner}'s. "
        "Give all runs the same --shards and --split, the same drop_nouns, and clips that all of them can read"
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two models are equally often right alone (McNemar 1947, binomial form).

    Args:
        only_first: Clips that only the first gets right.
        only_second: Clips that only the second gets right.
    """
    num, fewer = only_first + only_second, min(only_first, only_second)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    below = np.arange(fewer + 1)
    log_terms = log_factorials[num] - log_factorials[below] - log_factorials[num - below] - num * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(log_terms).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of any false finding among them stays below the level (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors))
    return adjusted.tolist()


def _correct(tests: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm` to each."""
    for test, adjusted in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted


def _pair(names: Sequence[str], models: Mapping[str, Results], draws: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """All tests of the second against the first."""
    outcomes = [models[name].per_clip for name in names]
    shared = [condition for condition in outcomes[0].conditions if condition in outcomes[1].conditions]
    check_shared(names, shared)
    places = [[of.conditions.index(condition) for condition in shared] for of in outcomes]
    ranks = [of.ranks[_NAME][:, at] for of, at in zip(outcomes, places, strict=True)]
    rows = [[models[name].rows[k] for k in at] for name, at in zip(names, places, strict=True)]
    draws_DK = [draws[name][:, at] for name, at in zip(names, places, strict=True)]
    return {
        "models": list(names),
        "conditions": [_condition(condition, ranks[0][:, k], ranks[1][:, k]) for k, condition in enumerate(shared)],
        **{name: _test(figure, rows, draws_DK) for name, figure in FIGURES.items()},
    }


def _condition(condition: Condition, first_N: np.ndarray, second_N: np.ndarray) -> dict[str, Any]:
    both_N = (first_N >= 0) & (second_N >= 0)
    right, other = first_N[both_N] == 0, second_N[both_N] == 0
    only_first, only_second = int((right & ~other).sum()), int((other & ~right).sum())
    num = int(both_N.sum())
    return {
        "modalities": list(condition.modalities),
        "drop_prob": condition.drop_prob,
        "seed": condition.seed,
        "corrupt": condition.corrupt,
        "num_clips": num,
        "difference": 100.0 * (only_second - only_first) / num if num else None,
        "only_first": only_first,
        "only_second": only_second,
        "p": mcnemar(only_first, only_second),
    }


def _test(
    figure: Callable[[np.ndarray, Sequence[Row]], np.ndarray], rows: list[list[Row]], draws: list[np.ndarray]
) -> dict[str, Any] | None:
    """The paired bootstrap of a figure over the conditions both models have; None: they do not make one."""
    values = []
    for of in rows:
        top1_1K = np.array([[np.nan if row[METRIC] is None else row[METRIC] for row in of]])
        values.append(float(figure(top1_1K, of)[0]))
    differences_D = figure(draws[1], rows[1]) - figure(draws[0], rows[0])
    ends = bootstrap.interval(differences_D)
    if ends is None or np.isnan(values).any():
        return None
    known = differences_D[~np.isnan(differences_D)]
    fewer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p = min(1.0, 2.0 * (fewer + 1) / (len(known) + 1))
    return {"difference": values[1] - values[0], "ci": ends, "p": p}
