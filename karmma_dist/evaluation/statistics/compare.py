"""Paired tests of several models on the same clips: would a difference between two models hold on other clips?

Each condition gets an exact McNemar test on the clips that exactly one of the two models gets right. The average over
subsets and the area and fall of the drop curve get a paired bootstrap of the difference: every draw takes the same
clips for both models. p-values are corrected for their number with Holm's method.

Legend: N clips, K conditions, D draws.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.metrics import Figure, find_figure
from karmma_dist.evaluation.results import STRICT, Interval, ResultRow, Results, as_json, checked
from karmma_dist.evaluation.statistics import bootstrap
from karmma_dist.evaluation.summary import METRIC, model_ranks

FIGURES = {
    "subset_average": bootstrap.subset_average,
    "drop_curve_area": bootstrap.drop_curve_area,
    "drop_curve_fall": bootstrap.drop_curve_fall,
}
"""Figures over several conditions: functions of top-1 per draw and condition (D, K) and the K rows that return (D,)."""

NUM_DRAWS = 10_000
"""Draws of a paired bootstrap; its p-values are multiples of 2 / 10,001, fine enough for Holm's correction."""


@dataclass(frozen=True)
class ConditionTest:
    """The exact McNemar test of the second model of a pair against the first under one condition."""

    __pydantic_config__ = STRICT

    modalities: tuple[str, ...]
    drop_prob: float
    seed: int
    corrupt: str | None
    num_clips: int
    """Number of clips shown to both models."""
    difference: float | None
    """Second minus first, in points; None: no clip was shown to both models."""
    only_first: int
    """Number of clips that only the first model gets right."""
    only_second: int
    p: float
    p_holm: float = math.nan
    """p-value corrected over all pairs and all conditions of the same kind: plain ones, those with a broken sensor, and
    those in which a share of the clips lacks one modality."""
    missing: str | None = None

    @property
    def condition(self) -> Condition:
        """The condition of the test."""
        return Condition(self.modalities, self.drop_prob, self.seed, self.corrupt, self.missing)


@dataclass(frozen=True)
class FigureTest:
    """The paired bootstrap test of the second model against the first by a figure over several conditions."""

    __pydantic_config__ = STRICT

    difference: float
    """Second minus first, in points."""
    ci: Interval
    """95 % interval of the difference."""
    p: float
    p_holm: float = math.nan
    """p-value corrected over all pairs."""


@dataclass(frozen=True)
class PairTests:
    """All tests of a pair of models; figures over several conditions use the conditions that both models have."""

    __pydantic_config__ = STRICT

    models: tuple[str, str]
    conditions: list[ConditionTest]
    subset_average: FigureTest | None
    drop_curve_area: FigureTest | None
    drop_curve_fall: FigureTest | None
    """Test of the fall, for which lower is better."""

    def test(self, figure: str) -> FigureTest | None:
        """Return the test by one of `FIGURES`."""
        test: FigureTest | None = getattr(self, figure)
        return test


@dataclass(frozen=True)
class Comparison:
    """The part of comparison.json with the tests between models."""

    __pydantic_config__ = STRICT

    num_clips: int
    average_rank: dict[str, float | None]
    """Average rank of each model over the subsets that all models have; None: they have none in common."""
    pairs: list[PairTests]
    """Tests of each pair of models, in the order of the models."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        content: dict[str, Any] = as_json(self)
        return content


def parse_comparison(value: object, where: str) -> Comparison:
    """Parse the comparison of a comparison.json.

    Args:
        value: Parsed JSON.
        where: Name of the file, for messages.

    Raises:
        UserError: a field is missing, unknown or of another type.
    """
    return checked(Comparison, value, f"{where}: comparison")


def compare(
    models: Mapping[str, Results], num_draws: int = NUM_DRAWS, seed: int = 0, metric: str = METRIC
) -> Comparison:
    """Compare every pair of models by one figure under their common conditions.

    Args:
        models: Results with `clips`, by name.
        num_draws: Number of draws D.
        seed: Seed of the draws.
        metric: Figure of a metric with `is_per_clip`, such as `action_top1`.

    Raises:
        UserError: fewer than two models are given, their clips or classes differ, a pair has no condition in common,
            or the metric is unknown or not `is_per_clip`.
    """
    if len(models) < 2:
        raise UserError("a comparison needs at least two models: name two runs or more")
    figure = find_figure(metric)
    if not figure.metric.is_per_clip:
        raise UserError(f"models cannot be compared by {metric}: it does not tell for each clip whether it is right")
    check_same_clips(models)
    draws = {
        name: bootstrap.resampled(results.per_clip, figure, num_draws, seed) for name, results in models.items()
    }
    pairs = [_pair(pair, models, draws, figure) for pair in itertools.combinations(models, 2)]
    return Comparison(
        num_clips=next(iter(models.values())).summary.num_clips,
        average_rank=model_ranks(models, metric),
        pairs=_corrected(pairs),
    )


def check_same_clips(models: Mapping[str, Results]) -> None:
    """Check that all models have the same classes and were evaluated on the same clips, as paired tests require.

    Raises:
        UserError: a model differs from the first in its clips or classes.
    """
    (first, expected), *others = models.items()
    for name, results in others:
        if results.summary.num_classes != expected.summary.num_classes:
            raise UserError(
                f"{name} and {first} have different classes ({results.summary.num_classes} and "
                f"{expected.summary.num_classes}): only models of one dataset can be compared"
            )
        check_same_keys((name, results.per_clip.keys), (first, expected.per_clip.keys))


def check_shared(names: Sequence[str], shared: Collection[Condition]) -> None:
    """Check that two models share at least one condition.

    Raises:
        UserError: `shared` is empty.
    """
    if not shared:
        raise UserError(f"{' and '.join(names)} have no condition in common: choose --modalities that both have")


def check_same_keys(second: tuple[str, Sequence[str]], first: tuple[str, Sequence[str]]) -> None:
    """Check that two models, each given as name and sorted clip keys, have the same clips.

    Raises:
        UserError: the clips differ.
    """
    (second_name, second_keys), (first_name, first_keys) = second, first
    if second_keys == first_keys:
        return
    odd = min(set(second_keys) ^ set(first_keys))
    owner = second_name if odd in set(second_keys) else first_name
    raise UserError(
        f"{second_name} is evaluated on {len(second_keys)} clips, {first_name} on {len(first_keys)}: only {owner} has "
        f"clip {odd}. Give all runs the same --shards, --split and drop_nouns, and clips that all of them can read"
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided exact p-value of McNemar's test (McNemar 1947, binomial form).

    The null hypothesis is that a clip right for only one model is equally likely to be right for either.

    Args:
        only_first: Number of clips that only the first model gets right.
        only_second: Number of clips that only the second model gets right.
    """
    num, fewer = only_first + only_second, min(only_first, only_second)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    below = np.arange(fewer + 1)
    log_terms = log_factorials[num] - log_factorials[below] - log_factorials[num - below] - num * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(log_terms).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected so that the family-wise error rate stays below the level (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors))
    return adjusted.tolist()


def _corrected(pairs: Sequence[PairTests]) -> list[PairTests]:
    """Return the tests with p-values corrected over all pairs; see `ConditionTest.p_holm`."""
    tests = [test for pair in pairs for test in pair.conditions]
    adjusted: dict[int, float] = {}
    for kind in {_kind(test) for test in tests}:
        adjusted |= _holm([test for test in tests if _kind(test) == kind])
    for figure in FIGURES:
        adjusted |= _holm([test for pair in pairs if (test := pair.test(figure)) is not None])
    corrected = []
    for pair in pairs:
        conditions = [replace(test, p_holm=adjusted[id(test)]) for test in pair.conditions]
        over = {
            figure: None if (test := pair.test(figure)) is None else replace(test, p_holm=adjusted[id(test)])
            for figure in FIGURES
        }
        corrected.append(PairTests(pair.models, conditions, **over))
    return corrected


def _kind(test: ConditionTest) -> tuple[bool, bool]:
    return test.corrupt is not None, test.missing is not None


def _holm(tests: Sequence[ConditionTest | FigureTest]) -> dict[int, float]:
    """Return corrected p-values by the identity of their tests."""
    return dict(zip(map(id, tests), holm([test.p for test in tests]), strict=True))


def _pair(
    names: tuple[str, str], models: Mapping[str, Results], draws: Mapping[str, np.ndarray], figure: Figure
) -> PairTests:
    """Carry out all tests of the second model against the first."""
    clips = [models[name].per_clip for name in names]
    shared = [condition for condition in clips[0].conditions if condition in clips[1].conditions]
    check_shared(names, shared)
    columns = [[model_clips.conditions.index(condition) for condition in shared] for model_clips in clips]
    rows = [[models[name].rows[k] for k in ks] for name, ks in zip(names, columns, strict=True)]
    draws_DK = [draws[name][:, ks] for name, ks in zip(names, columns, strict=True)]
    right_NK, shown_NK = (
        [values_NK[:, ks] > 0 for values_NK, ks in zip(values, columns, strict=True)]
        for values in zip(*(bootstrap.right_and_shown(model_clips, figure) for model_clips in clips), strict=True)
    )
    both_NK = shown_NK[0] & shown_NK[1]
    tests = [
        _condition(condition, *(values_NK[both_NK[:, k], k] for values_NK in right_NK))
        for k, condition in enumerate(shared)
    ]
    over = {name: _test(compute, rows, draws_DK, figure.name) for name, compute in FIGURES.items()}
    return PairTests(names, tests, **over)


def _condition(condition: Condition, first_N: np.ndarray, second_N: np.ndarray) -> ConditionTest:
    """Test one condition on the N clips shown to both models; bool, True = right."""
    only_first, only_second = int((first_N & ~second_N).sum()), int((second_N & ~first_N).sum())
    num = len(first_N)
    return ConditionTest(
        modalities=condition.modalities,
        drop_prob=condition.drop_prob,
        seed=condition.seed,
        corrupt=condition.corrupt,
        missing=condition.missing,
        num_clips=num,
        difference=100.0 * (only_second - only_first) / num if num else None,
        only_first=only_first,
        only_second=only_second,
        p=mcnemar(only_first, only_second),
    )


def _test(
    compute: Callable[[np.ndarray, Sequence[ResultRow]], np.ndarray],
    rows: list[list[ResultRow]],
    draws: list[np.ndarray],
    metric: str,
) -> FigureTest | None:
    """Return the paired bootstrap test of a figure over the common conditions; None: they do not define the figure."""
    values = []
    for model_rows in rows:
        top1_1K = np.array([[np.nan if row.figures[metric] is None else row.figures[metric] for row in model_rows]])
        values.append(float(compute(top1_1K.astype(np.float64), model_rows)[0]))
    differences_D = compute(draws[1], rows[1]) - compute(draws[0], rows[0])
    ends = bootstrap.interval(differences_D)
    if ends is None or np.isnan(values).any():
        return None
    known = differences_D[~np.isnan(differences_D)]
    fewer = min(int((known <= 0).sum()), int((known >= 0).sum()))
    p = min(1.0, 2.0 * (fewer + 1) / (len(known) + 1))
    return FigureTest(values[1] - values[0], ends, p)
