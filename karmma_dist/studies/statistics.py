"""Over seeds and clips: how far a table's figures would move with other trainings and other clips, and paired tests.

Seeds and clips are crossed: every training of every row is evaluated on the same clips. A draw of the bootstrap takes
seeds with replacement and, independently, clips with replacement, the same ones for every row, so differences between
rows are paired on both (the two-way bootstrap of Owen 2007, arXiv 0712.1111). S seeds drawn from S vary by (S - 1) / S
of what S other trainings would; the part of the seeds is widened by the square root of the inverse. What depends on
seed and clip together is counted in both draws: intervals err on the wide side (in simulated worlds of 150 clips and 2
to 10 seeds they held the truth in 97 to 99 of 100).

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
"""Given accuracy per draw and condition (D, K) and the K conditions, the figure of each draw (D,)."""


@dataclass(frozen=True)
class Summary:
    """A row's figure in one column."""

    mean: float | None
    """Over seeds, of all clips."""
    ci: Interval | None
    """95 % interval over seeds and clips; with one seed over clips only."""
    sd: float | None
    """Standard deviation over seeds (S - 1); None: fewer than two."""
    per_seed: dict[int, float | None]


@dataclass(frozen=True)
class Test:
    """One row against another in one column."""

    column: str
    first: str
    second: str
    difference: float | None
    """Second minus first, mean over the seeds that both have."""
    ci: Interval | None
    """95 % interval of the difference."""
    num_seeds: int
    """Seeds that both have."""
    p: float | None
    """Two-sided, of the bootstrap over seeds and clips (with one seed over clips only)."""
    p_holm: float | None
    """The same, corrected for all tests of the study."""
    t_p: float | None
    """Two-sided paired t-test over the seeds' differences; None: fewer than two seeds, or no spread."""
    t_p_holm: float | None


class Resampled:
    """Figures of several rows and seeds, on all clips and on the same draws of clips and seeds.

    Args:
        outcomes: Clip by clip results per label and seed. Clips that one of them lacks count as not shown to it.
        columns: Columns to resample; `accuracy_figure` must have one for each.
        num_draws: D.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        outcomes: Mapping[str, Mapping[int, ClipResults]],
        columns: Sequence[Column],
        num_draws: int = NUM_DRAWS,
        seed: int = 0,
    ) -> None:
        self.seeds = sorted({seed for of in outcomes.values() for seed in of})
        keys = sorted({key for of in outcomes.values() for one in of.values() for key in one.keys})
        self.num_clips = len(keys)
        random = bootstrap_generator(seed)
        num_S = len(self.seeds)
        self._seeds_DS = random.multinomial(num_S, np.full(num_S, 1 / max(1, num_S)), num_draws) if num_S else None
        metrics = list(dict.fromkeys(column.metric for column in columns))
        counts = [
            (label, seed, metric, _counts(one, metric, keys), one.conditions)
            for label, of in outcomes.items()
            for seed, one in of.items()
            for metric in metrics
            if find_figure(metric).scored in one.ranks
        ]
        self.values: dict[tuple[str, str], dict[int, float | None]] = {}
        """Per label and column: the figure of each seed on all clips."""
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
        for (label, seed, name), of in parts.items():
            value = float(of[0][0])
            self.values.setdefault((label, name), {})[seed] = None if math.isnan(value) else value
            self._draws.setdefault((label, name), {})[seed] = np.concatenate(of[1:])

    def summary(self, label: str, column: str) -> Summary:
        """Return mean, interval and spread of a row's figure."""
        per_seed = self.values.get((label, column), {})
        known = [value for value in per_seed.values() if value is not None]
        if not known:
            return Summary(None, None, None, per_seed)
        draws_D = self._over_seeds(self._draws[label, column])
        sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return Summary(float(np.mean(known)), interval(draws_D), sd, per_seed)

    def tests(self, pairs: Sequence[tuple[str, str]], columns: Sequence[str]) -> list[Test]:
        """Test the second row of each pair against the first, p-values corrected by Holm over all of them."""
        found = [self._test(pair, column) for column in columns for pair in pairs]
        p_holm, t_p_holm = (_corrected([getattr(test, name) for test in found]) for name in ("p", "t_p"))
        return [
            Test(**{**test.__dict__, "p_holm": p, "t_p_holm": t_p})
            for test, p, t_p in zip(found, p_holm, t_p_holm, strict=True)
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
        of_first, of_second = (self._draws[label, column] for label in pair)
        draws_D = self._over_seeds({seed: of_second[seed] - of_first[seed] for seed in differences})
        known = draws_D[~np.isnan(draws_D)]
        fewer = min(int((known <= 0).sum()), int((known >= 0).sum()))
        p = min(1.0, 2.0 * (fewer + 1) / (len(known) + 1))
        values = list(differences.values())
        return Test(
            column, *pair, float(np.mean(values)), interval(draws_D), len(values), p, None, paired_t(values), None
        )

    def _over_seeds(self, draws: Mapping[int, np.ndarray]) -> np.ndarray:
        """Mean over the drawn seeds (D,), of those that there are."""
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
    """Return what a column shows, as a function of the accuracy under each condition; nan where there is none."""
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
    return lambda top1_DK, conditions: _of_subset(top1_DK, conditions, column.subset or _full(conditions))


def curve_points(conditions: Sequence[Condition]) -> list[float]:
    """Return the drop probabilities that all modalities were evaluated at."""
    full = _full(conditions)
    return sorted({one.drop_prob for one in conditions if one.modalities == full})


def paired_t(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a paired t-test; None: fewer than two pairs, or they do not differ in spread."""
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
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
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
    """Holm's correction of those that there are."""
    known = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(known) for p in p_values]


def _counts(outcomes: ClipResults, metric: str, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """right_NK and shown_NK, float32, over all clips of the study."""
    figure = find_figure(metric)
    place = {key: n for n, key in enumerate(keys)}
    ranks_NK = np.full((len(keys), len(outcomes.conditions)), -1, dtype=np.int32)
    ranks_NK[[place[key] for key in outcomes.keys]] = outcomes.ranks[figure.scored]
    return right_and_shown(ClipResults(list(keys), outcomes.conditions, {figure.scored: ranks_NK}), figure)


def _clip_draws(num_clips: int, num_draws: int, random: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each clip is in each draw, float32 (some draws, N)."""
    for first in range(0, num_draws if num_clips else 0, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, num_draws - first)
        yield random.multinomial(num_clips, np.full(num_clips, 1 / num_clips), size).astype(np.float32)


def _full(conditions: Sequence[Condition]) -> tuple[str, ...]:
    return max((one.modalities for one in conditions), key=len)


def _subsets(conditions: Sequence[Condition]) -> dict[tuple[str, ...], int]:
    """Places of the subsets with nothing dropped at random."""
    return {one.modalities: k for k, one in enumerate(conditions) if one.drop_prob == 0 and one.corrupt is None}


def _none(top1_DK: np.ndarray) -> np.ndarray:
    return np.full(len(top1_DK), np.nan)


def _of_subset(top1_DK: np.ndarray, conditions: Sequence[Condition], subset: tuple[str, ...]) -> np.ndarray:
    place = _subsets(conditions).get(subset)
    return _none(top1_DK) if place is None else top1_DK[:, place]


def _mean(columns: Sequence[np.ndarray], top1_DK: np.ndarray) -> np.ndarray:
    """Mean of those with a figure, draw by draw."""
    if not columns:
        return _none(top1_DK)
    return weighted(np.stack(columns, axis=1), np.ones(len(columns)))


def _relative_drop(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    full, places = _full(conditions), _subsets(conditions)
    if full not in places:
        return _none(top1_DK)
    whole_D = top1_DK[:, places[full]]
    with np.errstate(invalid="ignore", divide="ignore"):
        drops = [100.0 * (whole_D - top1_DK[:, k]) / whole_D for subset, k in places.items() if subset != full]
    return _mean([np.where(np.isfinite(drop), drop, np.nan) for drop in drops], top1_DK)


def _curve(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> dict[float, np.ndarray]:
    """Mean over the random draws at each drop probability."""
    full = _full(conditions)
    places: dict[float, list[int]] = {}
    for k, one in enumerate(conditions):
        if one.modalities == full and one.corrupt is None:
            places.setdefault(one.drop_prob, []).append(k)
    return {p: _mean([top1_DK[:, k] for k in of], top1_DK) for p, of in sorted(places.items())}


def _area(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    curve = _curve(top1_DK, conditions)
    if len(curve) < 2:
        return _none(top1_DK)
    return curve_areas(list(curve), np.stack(list(curve.values()), axis=1))


def _fall(top1_DK: np.ndarray, conditions: Sequence[Condition]) -> np.ndarray:
    curve = list(_curve(top1_DK, conditions).values())
    return curve[0] - curve[-1] if len(curve) > 1 else _none(top1_DK)
