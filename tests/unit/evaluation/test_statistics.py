"""Calibration follows its definition, intervals have nominal coverage, tests are exact and reject at the level."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.metrics import calibration_error, find_figure
from karmma_dist.evaluation.results import ClipResults, ResultRow
from karmma_dist.evaluation.statistics import bootstrap
from karmma_dist.evaluation.statistics.compare import holm, mcnemar
from karmma_dist.evaluation.summary import summarise
from kits.reports import row_of

MODALITIES = ["video", "flow", "audio"]
TOP1 = find_figure("action_top1")


def outcomes_of(right_NK: np.ndarray, conditions: list[Condition]) -> ClipResults:
    ranks_NK = np.where(right_NK, 0, 3).astype(np.int32)
    return ClipResults([f"clip_{n:05d}" for n in range(len(ranks_NK))], conditions, {"action": ranks_NK})


def naive_calibration_error(confidence, right) -> float:
    """Compute the error bin by bin, as written in the paper."""
    total = 0.0
    for b in range(15):
        inside = [n for n, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15 or (b == 0 and c == 0)]
        if inside:
            accuracy = sum(right[n] for n in inside) / len(inside)
            mean = sum(confidence[n] for n in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean)
    return 100 * total


away_from_edges = st.floats(0, 1).filter(lambda c: c == 0 or abs(c * 15 - round(c * 15)) > 1e-6)


@given(st.lists(st.tuples(away_from_edges, st.booleans()), min_size=1, max_size=60))
def test_calibration_error_is_the_weighted_gap_of_fifteen_bins(clips):
    confidence, right = ([clip[place] for clip in clips] for place in (0, 1))
    actual = calibration_error(np.array(confidence), np.array(right))
    assert actual == pytest.approx(naive_calibration_error(confidence, right), abs=1e-9)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    confidence, right = np.array([0.125, 0.25, 0.5, 1.0]), np.array([True, False, True, False])
    gaps = [abs(1 - 0.375), abs(1 - 0.5), 0, abs(0 - 1.0)]  # (0, 1/4] contains the first two, (1/4, 1/2] the third
    assert calibration_error(confidence, right, num_bins=4) == pytest.approx(100 * sum(gaps) / 4)


def test_calibration_error_is_zero_if_calibrated_and_maximal_if_overconfident():
    confidence = np.full(10, 0.7)
    assert calibration_error(confidence, np.arange(10) < 7) == pytest.approx(0, abs=1e-9)
    assert calibration_error(np.ones(10), np.zeros(10, dtype=bool)) == 100.0
    assert calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) is None


def curve_rows(values: dict[tuple[str, float], list[float]]) -> list[ResultRow]:
    """Return rows for (letters of modalities, drop probability), one per seed."""
    names = {name[0].upper(): name for name in MODALITIES}
    return [
        row_of(Condition(tuple(names[m] for m in letters), p, seed), {"action_top1": value})
        for (letters, p), by_seed in values.items()
        for seed, value in enumerate(by_seed)
    ]


def test_a_curves_figures_are_those_of_its_definition():
    rows = curve_rows({("VFA", 0.0): [80.0], ("VFA", 0.5): [60.0, 40.0], ("VFA", 0.9): [30.0, 20.0]})
    _, _, curve = summarise(rows)
    assert curve.drop_prob == [0.0, 0.5, 0.9]
    assert curve.num_seeds == 2
    actual = {name: getattr(curve, name)["action_top1"] for name in ("mean", "std", "area", "fall", "relative_fall")}
    assert actual == {
        "mean": [80.0, 50.0, 25.0],
        "std": [0.0, 10.0, 5.0],  # population deviation over the given seeds
        "area": pytest.approx((0.5 * 65 + 0.4 * 37.5) / 0.9),
        "fall": 55.0,
        "relative_fall": 68.75,
    }


def test_subsets_are_averaged_at_the_lowest_probability_that_has_several():
    rows = curve_rows({
        ("VFA", 0.0): [90.0], ("V", 0.3): [20.0], ("VF", 0.3): [40.0, 60.0], ("V", 0.6): [1.0], ("VF", 0.6): [2.0],
    })  # fmt: skip
    _, subsets, _ = summarise(rows)
    assert (subsets.drop_prob, subsets.num_subsets, subsets.full) == (0.3, 2, ("video", "flow"))
    assert subsets.average["action_top1"] == 35.0
    assert subsets.relative_drop["action_top1"] == 60.0
    _, apart, _ = summarise(curve_rows({("V", 0.0): [20.0], ("FA", 0.0): [40.0]}))
    assert (apart.full, apart.relative_drop["action_top1"]) == (None, None)


def test_an_interval_cuts_a_fortieth_on_each_side():
    draws = np.random.default_rng(0).permutation(np.arange(1001) / 10)
    assert bootstrap.interval(np.append(draws, np.nan)) == pytest.approx([2.5, 97.5])


def test_intervals_contain_the_truth_in_95_of_100_samples():
    """Draw 300 samples of 400 clips; the number of covering intervals is within 4 standard deviations of 95 %."""
    truth, num_samples, covered = 0.3, 300, 0
    for sample in range(num_samples):
        right_NK = np.random.default_rng(sample).random((400, 1)) < truth
        draws = bootstrap.resampled(outcomes_of(right_NK, [Condition(("video",))]), TOP1, 400, sample)
        low, high = bootstrap.interval(draws[:, 0])
        covered += low <= 100 * truth <= high
    spread = 4 * math.sqrt(0.95 * 0.05 / num_samples)
    assert 0.95 - spread <= covered / num_samples <= 0.95 + spread


def test_draws_share_clips_across_conditions_and_models():
    right_N1 = np.random.default_rng(0).random((50, 1)) < 0.5
    both = outcomes_of(np.hstack([right_N1, right_N1, ~right_N1]), [Condition(("video",), p) for p in (0.0, 0.1, 0.2)])
    draws = bootstrap.resampled(both, TOP1, 70, 3)
    assert np.array_equal(draws[:, 0], draws[:, 1])
    assert np.allclose(draws[:, 0] + draws[:, 2], 100)
    alone = outcomes_of(right_N1, [Condition(("video",))])
    assert np.array_equal(bootstrap.resampled(alone, TOP1, 70, 3)[:, 0], draws[:, 0])


def test_a_draw_counts_only_clips_that_can_be_shown():
    ranks_NK = np.array([[0, -1], [0, -1], [5, 0], [5, -1]], dtype=np.int32)
    outcomes = ClipResults(list("abcd"), [Condition(("video",)), Condition(("audio",))], {"action": ranks_NK})
    draws = bootstrap.resampled(outcomes, TOP1, 200, 0)
    known = draws[~np.isnan(draws[:, 1]), 1]
    assert set(known.tolist()) == {100.0}
    assert 0 < len(known) < 200
    assert bootstrap.interval(np.array([np.nan, np.nan])) is None


@given(st.integers(1, 3), st.lists(st.floats(0, 100), min_size=60, max_size=60), st.booleans())
def test_a_draw_has_the_summarys_average_area_and_fall(num_seeds, values, sweep):
    conditions = build_conditions(MODALITIES, subsets=True, sweep=sweep, num_seeds=num_seeds)
    rows = [row_of(condition, {"action_top1": value}) for condition, value in zip(conditions, values, strict=False)]
    _, subsets, curve = summarise(rows)
    draws = np.array([[row.figures["action_top1"] for row in rows]])
    average = bootstrap.subset_average(draws, rows)[0]
    assert average == pytest.approx(subsets.average["action_top1"])
    if sweep:
        area, fall = (compute(draws, rows)[0] for compute in (bootstrap.drop_curve_area, bootstrap.drop_curve_fall))
        assert area == pytest.approx(curve.area["action_top1"])
        assert fall == pytest.approx(curve.fall["action_top1"], abs=1e-9)
    else:
        assert curve is None
        assert np.isnan(bootstrap.drop_curve_area(draws, rows)).all()
        assert np.isnan(bootstrap.drop_curve_fall(draws, rows)).all()


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_two_sided_binomial_probability_in_exact_fractions(first, second):
    num = first + second
    tail = sum(Fraction(math.comb(num, k), 2**num) for k in range(min(first, second) + 1))
    assert mcnemar(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_stays_within_bounds_on_a_full_split():
    assert mcnemar(4822, 4822) == 1.0
    assert 0 < mcnemar(4500, 5144) < 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_exactly_what_its_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    for level in (0.01, 0.05, 0.5):
        rejected = set()
        for step, place in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
            if p_values[place] * (len(p_values) - step) > level:
                break
            rejected.add(place)
        assert {k for k, p in enumerate(adjusted) if p <= level} == rejected
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))


def test_equal_models_are_rejected_at_most_at_the_level():
    """Test 500 pairs of models that are independently right on the same share of 200 clips."""
    rejected = 0
    for sample in range(500):
        first, second = np.random.default_rng(sample).random((2, 200)) < 0.4
        rejected += mcnemar(int((first & ~second).sum()), int((second & ~first).sum())) < 0.05
    assert rejected / 500 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 500)
