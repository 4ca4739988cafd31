"""Intervals of a study's figures over seeds (other trainings) and clips, and paired tests between its rows.

Seeds and clips are crossed: every training of every row is evaluated on the same clips. Each bootstrap draw samples
seeds with replacement and, independently, clips with replacement, the same ones for every row, so differences between
rows are paired on both (the two-way bootstrap of Owen 2007, arXiv 0712.1111). The variance of S seeds drawn from S is
(S - 1) / S of that of S new trainings, so the deviation due to seeds is scaled by the square root of S / (S - 1).
Effects that depend on seed and clip together are counted in both draws, so intervals are conservative (in simulations
with 150 clips and 2 to 10 seeds, 97 to 99 of 100 intervals contained the true value).

Legend: N clips, K conditions, D draws, S seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.metrics import curve_areas, find_figure
from karmma_dist.evaluation.results import ClipResults, Interval
from karmma_dist.evaluation.statistics.bootstrap import interval, percent_right, right_and_shown, weighted
from karmma_dist.evaluation.statistics.compare import holm
from karmma_dist.seeding import bootstrap_generator
from karmma_dist.studies.study import Column

NUM_DRAWS = 2000

_DRAWS_AT_ONCE = 100

Figure = Callable[[np.ndarray, Sequence[Condition]], np.ndarray]
"""Function of accuracy per draw and condition (D, K) and the K conditions that returns the figure of each draw (D,)."""


@dataclass(frozen=True)
class Summary:
    """The figure of a row in one column."""

    mean: float | None
    """Mean over seeds, on all clips."""
    ci: Interval | None
    """95 % interval over seeds and clips; with one seed over clips only."""
    sd: float | None
    """Standard deviation over seeds (with S - 1); None: fewer than two seeds."""
    per_seed: dict[int, float | None]


@dataclass(frozen=True)
class Test:
    """The tests of one row against another in one column."""

    column: str
    first: str
    second: str
    difference: float | None
    """Second minus first, averaged over the seeds that both rows have."""
    ci: Interval | None
    """95 % interval of the difference."""
    num_seeds: int
    """Number of seeds that both rows have."""
    p: float | None
    """Two-sided p-value of the bootstrap over seeds and clips (with one seed over clips only)."""
    p_holm: float | None
    """Bootstrap p-value corrected for all tests of the study."""
    t_p: float | None
    """Two-sided p-value of the paired t-test over seeds; None: fewer than two seeds, or all differences are equal."""
    t_p_holm: float | None
    """p-value of the t-test corrected for all tests of the study."""


class Resampled:
    """The figures of several rows and seeds, on all clips and on shared draws of clips and seeds.

    Args:
        outcomes: Results per clip, by label and seed. A clip that a result lacks counts as not shown.
        columns: Columns to resample, all of them accuracies (see `figure_of`).
        num_draws: Number of draws D.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        outcomes: Mapping[str, Mapping[int, ClipResults]],
        columns: Sequence[Column],
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
    ) -> None:
        self.seeds = sorted({seed for by_seed in outcomes.values() for seed in by_seed})
        keys = sorted({key for by_seed in outcomes.values() for clips in by_seed.values() for key in clips.keys})
        self.num_clips = len(keys)
        random = bootstrap_generator(seed)
        num_S = len(self.seeds)
        self._seeds_DS = random.multinomial(num_S, np.full(num_S, 1 / max(1, num_S)), num_draws) if num_S else None
        metrics = list(dict.fromkeys(column.metric for column in columns))
        counts = [
            (label, seed, metric, _counts(clips, metric, keys), clips.conditions)
            for label, by_seed in outcomes.items()
            for seed, clips in by_seed.items()
            for metric in metrics
            if find_figure(metric).scored in clips.ranks
        ]
        self.values: dict[tuple[str, str], dict[int, float | None]] = {}
        """Figure of each seed on all clips, by label and column."""
        self._draws: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        parts: dict[tuple[str, int, str], list[np.ndarray]] = {}
        all_1N = np.ones((1, len(keys)), dtype=np.float32)
        for times_DN in itertools.chain([all_1N], _clip_draws(len(keys), num_draws, random)):
            for label, seed, metric, (right_NK, shown_NK), conditions in counts:
                accuracy_DK = percent_right(times_DN, right_NK, shown_NK)
                for column in columns:
                    if column.metric == metric:
                        figure_D = figure_of(column)(accuracy_DK, conditions)
                        parts.setdefault((label, seed, column.name), []).append(figure_D)
        for (label, seed, name), (all_clips, *draws) in parts.items():
            value = float(all_clips[0])
            self.values.setdefault((label, name), {})[seed] = None if math.isnan(value) else value
            self._draws.setdefault((label, name), {})[seed] = np.concatenate(draws)

    def summary(self, label: str, column: str) -> Summary:
        """Return mean, interval and standard deviation of a row's figure."""
        per_seed = self.values.get((label, column), {})
        known = [value for value in per_seed.values() if value is not None]
        if not known:
            return Summary(None, None, None, per_seed)
        draws_D = self._over_seeds(self._draws[label, column])
        sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return Summary(float(np.mean(known)), interval(draws_D), sd, per_seed)

    def tests(self, pairs: Sequence[tuple[str, str]], columns: Sequence[str]) -> list[Test]:
        """Test the second row of each pair against the first; p-values are corrected with Holm over all tests."""
        tests = [self._test(pair, column) for column in columns for pair in pairs]
        p_holm, t_p_holm = (_corrected([getattr(test, name) for test in tests]) for name in ("p", "t_p"))
        return [
            Test(**{**test.__dict__, "p_holm": p, "t_p_holm": t_p})
            for test, p, t_p in zip(tests, p_holm, t_p_holm, strict=True)
        ]

    def _test(self, pair: tuple[str, str], column: str) -> Test:
        first, second = (self.values.get((label, column), {}) for label in pair)
        differences = {
            seed: b - a
            for seed in self.seeds
            if (a := first.get(seed)) is not None and (b := second.get(seed)) is not None
        }
        if not differences:
            return Test(column, *pair, None, None, 0, None, None, None, None)
        first_draws, second_draws = (self._draws[label, column] for label in pair)
        draws_D = self._over_seeds({seed: second_draws[seed] - first_draws[seed] for seed in differences})
        known = draws_D[~np.isnan(draws_D)]
        fewer = min(int((known <= 0).sum()), int((known >= 0).sum()))
        p = min(1.0, 2.0 * (fewer + 1) / (len(known) + 1))
        values = list(differences.values())
        return Test(
            column, *pair, float(np.mean(values)), interval(draws_D), len(values), p, None, paired_t(values), None
        )

    def _over_seeds(self, draws: Mapping[int, np.ndarray]) -> np.ndarray:
        """Return the mean over the drawn seeds (D,), out of the seeds in `draws`."""
        places = [self.seeds.index(seed) for seed in draws]
        figures_DS = np.stack(list(draws.values()), axis=1)
        num_S = figures_DS.shape[1]
        if num_S == 1:
            return figures_DS[:, 0]
        assert self._seeds_DS is not None
        weights_DS = self._seeds_DS[:, places].astype(np.float64)
        weights_DS[weights_DS.sum(axis=1) == 0] = 1.0
        weights_DS /= weights_DS.sum(axis=1, keepdims=True)
        centre_D = figures_DS.mean(axis=1)
        drawn_D = (weights_DS * figures_DS).sum(axis=1)
        widened_D: np.ndarray = centre_D + (drawn_D - centre_D) * math.sqrt(num_S / (num_S - 1))
        return widened_D


def figure_of(column: Column) -> Figure:
    """Return the function that computes a column's figure from the accuracies; nan if conditions are missing."""
    if column.at == "average":
        return lambda top1_DK, conditions: _mean([top1_DK[:, k] for k in _subsets(conditions).values()], top1_DK)
    if column.at == "relative drop":
        return _relative_drop
    if column.at == "area":
        return _area
    if column.at == "fall":
        return _fall
    if column.drop_prob is not None:
        return lambda top1_DK, conditions: _curve(top1_DK, conditions).get(column.drop_prob or 0.0, _none(top1_DK))
    if column.missing is not None:
        return lambda top1_DK, conditions: _of_missing(top1_DK, conditions, str(column.missing))
    return lambda top1_DK, conditions: _of_subset(top1_DK, conditions, column.subset or _full(conditions))


def curve_points(conditions: Sequence[Condition]) -> list[float]:
    """Return the drop probabilities at which the full set of modalities was evaluated."""
    full = _full(conditions)
    return sorted({c.drop_prob for c in conditions if c.modalities == full and c.is_plain})


def paired_t(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a paired t-test; None: fewer than two pairs, or all differences are equal."""
    num = len(differences)
    if num < 2:
        return None
    mean, sd = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if sd <= 1e-12 * max(1.0, abs(mean)):
        return None
    return student_t_p(mean / (sd / math.sqrt(num)), num - 1)


def student_t_p(t: float, degrees: int) -> float:
    """Return P(|T| >= |t|) of Student's t with `degrees` of freedom."""
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below this point
        return 1.0 - incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or tiny)
            c = 1.0 + term / c or tiny
            step = c * d
            value *= step
        if abs(step - 1.0) < 1e-15:
            break
    return math.exp(log_front) * value / a


def _corrected(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's correction of all p-values that are not None."""
    known = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(known) for p in p_values]


def _counts(outcomes: ClipResults, metric: str, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return right_NK and shown_NK, float32, over all clips of the study."""
    figure = find_figure(metric)
    place = {key: n for n, key in enumerate(keys)}
    ranks_NK = np.full((len(keys), len(outcomes.conditions)), -1, dtype=np.int32)
    ranks_NK[[place[key] for key in outcomes.keys]] = outcomes.ranks[figure.scored]
    return right_and_shown(ClipResults(list(keys), outcomes.conditions, {figure.scored: ranks_NK}), figure)


def _clip_draws(num_clips: int, num_draws: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the number of times that each clip is drawn, float32 (some draws, N)."""
    for first in range(0, num_draws if num_clips else 0, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, num_draws - first)
        yield random.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size).astype(np.float32)


def _full(conditions: Sequence[Condition]) -> tuple[str, ...]:
    return max((condition.modalities for condition in conditions), key=len)


def _subsets(conditions: Sequence[Condition]) -> dict[tuple[str, ...], int]:
    """Return the column of each subset without random drops."""
    return {c.modalities: k for k, c in enumerate(conditions) if c.drop_prob == 0 and c.is_plain}


def _none(top1_DK: np.ndarray) -> np.ndarray:
    return np.full(len(top1_DK), np.nan)


def _of_subset(top1_DK: np.ndarray, conditions: Sequence[Condition], subset: tuple[str, ...]) -> np.ndarray:
    place = _subsets(conditions).get(subset)
    return _none(top1_DK) if place is None else top1_DK[:, place]


def _of_missing(top1_DK: np.ndarray, conditions: Sequence[Condition], missing: str) -> np.ndarray:
    """Return the mean over the random draws in which a share of the clips lacks one modality."""
    full = _full(conditions)
    places = [k for k, c in enumerate(conditions) if (c.modalities, c.missing) == (full, missing)]
    return _mean([top1_DK[:, k] for k in places], top1_DK)


def _mean(columns: Sequence[np.ndarray], top1_DK: np.ndarray) -> np.ndarray:
    """Return the mean over the columns that are not nan, per draw."""
    if not columns:
        return _none(top1_DK)
    return weighted(np.stack(columns, axis=1), np.ones(len(columns)))


def _relative_drop(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    full, places = _full(conditions), _subsets(conditions)
    if full not in places:
        return _none(top1_DK)
    full_D = top1_DK[:, places[full]]
    with np.errstate(invalid="ignore", divide="ignore"):
        drops = [100.0 * (full_D - top1_DK[:, k]) / full_D for subset, k in places.items() if subset != full]
    return _mean([np.where(np.isfinite(drop), drop, np.nan) for drop in drops], top1_DK)


def _curve(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> dict[float, np.ndarray]:
    """Return the mean over the random draws at each drop probability."""
    full = _full(conditions)
    places: dict[float, list[int]] = {}
    for k, condition in enumerate(conditions):
        if condition.modalities == full and condition.is_plain:
            places.setdefault(condition.drop_prob, []).append(k)
    return {p: _mean([top1_DK[:, k] for k in columns], top1_DK) for p, columns in sorted(places.items())}


def _area(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    curve = _curve(top1_DK, conditions)
    if len(curve) < 2:
        return _none(top1_DK)
    return curve_areas(list(curve), np.stack(list(curve.values()), axis=1))


def _fall(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    curve = list(_curve(top1_DK, conditions).values())
    return curve[0] - curve[-1] if len(curve) > 1 else _none(top1_DK)
