"""Figures over seeds and clips: known values, and the coverage of intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.results import ClipResults
from karmma_dist.evaluation.summary import summarise
from karmma_dist.studies.results import read_outcomes, write_outcomes
from karmma_dist.studies.statistics import Resampled, curve_points, incomplete_beta, paired_t, student_t_p
from karmma_dist.studies.study import Column
from kits.reports import row_of

MODALITIES = ("video", "flow", "audio")


def outcomes(
    accuracy: float, random: np.random.Generator, difficulty_N: np.ndarray, subsets: bool = False
) -> ClipResults:
    """Return a model that is right on `accuracy` of the clips, more often on easier clips."""
    missing = ["audio:0.5", "video:0.9"] if subsets else []
    num_seeds = 2 if subsets else 1
    conditions = build_conditions(MODALITIES, subsets=subsets, sweep=subsets, num_seeds=num_seeds, missing=missing)
    shape = (len(difficulty_N), len(conditions))
    right_NK = random.uniform(size=shape) < np.clip(accuracy + difficulty_N[:, None], 0, 1)
    ranks = {"action": np.where(right_NK, 0, random.integers(1, 9, shape)).astype(np.int32)}
    return ClipResults([f"clip{n:04d}" for n in range(len(difficulty_N))], conditions, ranks)


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [
        (0.0, 4, 1.0), (2.7764451, 4, 0.05), (4.6040949, 4, 0.01), (12.7062047, 1, 0.05), (2.2281389, 10, 0.05),
        (-2.2281389, 10, 0.05), (1.9623391, 1000, 0.05), (8.610302, 4, 0.001),
    ],
)  # fmt: skip
def test_students_t_matches_published_tables(t: float, degrees: int, p: float) -> None:
    assert student_t_p(t, degrees) == pytest.approx(p, rel=1e-5)


@pytest.mark.parametrize("t", [0.1, 0.7, 1.0, 3.0, 25.0])
def test_students_t_has_its_closed_forms(t: float) -> None:
    assert student_t_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-10)
    assert student_t_p(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-10)


def test_the_incomplete_beta_function_is_symmetric() -> None:
    for a, b, x in ((2.0, 3.0, 0.3), (0.5, 0.5, 0.9), (20.0, 1.5, 0.95)):
        assert incomplete_beta(a, b, x) + incomplete_beta(b, a, 1 - x) == pytest.approx(1.0, abs=1e-12)
    assert incomplete_beta(2.0, 3.0, 0.3) == pytest.approx(0.3483, abs=1e-10)  # 6x^2 - 8x^3 + 3x^4
    assert (incomplete_beta(2.0, 3.0, 0.0), incomplete_beta(2.0, 3.0, 1.0)) == (0.0, 1.0)


def test_a_paired_t_test_matches_a_hand_calculation() -> None:
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]  # mean 3, sd sqrt(2.5): t = 4.2426, 4 degrees of freedom
    assert paired_t(differences) == pytest.approx(0.013236, abs=1e-5)
    assert paired_t([1.0]) is None
    assert paired_t([2.0, 2.0, 2.0]) is None


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def test_means_equal_those_of_the_evaluation(random: np.random.Generator) -> None:
    one = outcomes(0.5, random, random.normal(0, 0.2, 300), subsets=True)
    ranks_NK = one.ranks["action"]
    rows = [
        row_of(condition, {"action_top1": 100.0 * float((ranks_NK[:, k] == 0).mean())})
        for k, condition in enumerate(one.conditions)
    ]
    _, subsets, curve = summarise(rows)
    assert subsets is not None
    assert curve is not None
    whole = [row for row in rows if row.drop_prob == 0 and row.missing is None]
    lacking = [row for row in rows if row.missing == "audio:0.5" and len(row.modalities) == 3]
    wanted = {
        "average": subsets.average["action_top1"],
        "relative drop": subsets.relative_drop["action_top1"],
        "area": curve.area["action_top1"],
        "fall": curve.fall["action_top1"],
        "drop 0.5": curve.mean["action_top1"][5],
        "missing A:0.5": np.mean([row.figures["action_top1"] for row in lacking]),
        "V+A": next(row.figures["action_top1"] for row in rows if row.modalities == ("video", "audio")),
        "all": next(row.figures["action_top1"] for row in whole if len(row.modalities) == 3),
    }
    resampled = Resampled({"x": {0: one}}, [Column(name=at, at=at) for at in wanted], num_draws=100)
    for at, value in wanted.items():
        assert resampled.summary("x", at).mean == pytest.approx(value, abs=1e-9)
    assert curve_points(one.conditions) == pytest.approx([k / 10 for k in range(10)])


def test_top5_is_counted_from_ranks_below_five(random: np.random.Generator) -> None:
    one = outcomes(0.3, random, np.zeros(200))
    resampled = Resampled({"x": {0: one}}, [Column(name="top5", metric="action_top5")], num_draws=100)
    assert resampled.summary("x", "top5").mean == pytest.approx(100 * float((one.ranks["action"] < 5).mean()))


def test_one_seed_has_an_interval_over_clips_and_no_spread(random: np.random.Generator) -> None:
    one = outcomes(0.5, random, np.zeros(400))
    resampled = Resampled({"x": {0: one}}, [Column(name="all")]).summary("x", "all")
    assert resampled.sd is None
    assert resampled.ci is not None
    assert resampled.mean is not None
    half = 1.96 * math.sqrt(resampled.mean * (100 - resampled.mean) / 400)
    assert resampled.ci[0] == pytest.approx(resampled.mean - half, abs=1.0)
    assert resampled.ci[1] == pytest.approx(resampled.mean + half, abs=1.0)


def test_an_interval_includes_the_variance_between_trainings(random: np.random.Generator) -> None:
    steady = {seed: outcomes(0.5, random, np.zeros(2000)) for seed in range(5)}
    shaky = {seed: outcomes(0.3 + 0.1 * seed, random, np.zeros(2000)) for seed in range(5)}
    resampled = Resampled({"steady": steady, "shaky": shaky}, [Column(name="all")])
    widths = {}
    for label in ("steady", "shaky"):
        summary = resampled.summary(label, "all")
        assert summary.ci is not None
        widths[label] = summary.ci[1] - summary.ci[0]
    assert widths["shaky"] > 4 * widths["steady"]
    # The seeds' standard deviation is 15.8, that of their mean 7.07; 3.92 times the latter is 27.7 points.
    assert widths["shaky"] == pytest.approx(27.7, abs=4)


def test_intervals_have_about_their_nominal_coverage(random: np.random.Generator) -> None:
    num_held, num_worlds = 0, 120
    for _ in range(num_worlds):
        difficulty_N = random.normal(0, 0.2, 150)
        seeds = {seed: outcomes(0.5 + random.normal(0, 0.04), random, difficulty_N) for seed in range(5)}
        ends = Resampled({"x": seeds}, [Column(name="all")], num_draws=300, seed=int(random.integers(2**31))).summary(
            "x", "all"
        )
        assert ends.ci is not None
        num_held += ends.ci[0] <= 50.0 <= ends.ci[1]
    assert num_held / num_worlds >= 0.88


def test_differences_are_paired_over_clips_and_seeds(random: np.random.Generator) -> None:
    difficulty_N = random.normal(0, 0.4, 500)
    first, second = {}, {}
    for seed in range(4):
        base = outcomes(0.4 + 0.1 * seed, random, difficulty_N)
        better_NK = np.where(random.uniform(size=base.ranks["action"].shape) < 0.05, 0, base.ranks["action"])
        first[seed] = base
        second[seed] = ClipResults(base.keys, base.conditions, {"action": better_NK.astype(np.int32)})
    resampled = Resampled({"a": first, "b": second}, [Column(name="all")])
    (test,) = resampled.tests([("a", "b")], ["all"])
    single = resampled.summary("a", "all")
    assert test.ci is not None
    assert single.ci is not None
    assert test.ci[0] > 0
    assert test.ci[1] - test.ci[0] < 0.3 * (single.ci[1] - single.ci[0])
    assert test.num_seeds == 4
    assert test.p is not None
    assert test.p < 0.01
    assert test.t_p is not None
    assert test.t_p == test.t_p_holm  # the only test of the study


def test_p_values_are_corrected_for_all_tests_of_the_study(random: np.random.Generator) -> None:
    models = {name: {s: outcomes(0.5, random, np.zeros(200)) for s in range(3)} for name in "abc"}
    tests = Resampled(models, [Column(name="all")]).tests([("a", "b"), ("a", "c"), ("b", "c")], ["all"])
    smallest = min(tests, key=lambda test: test.p or 1)
    assert smallest.p is not None
    assert smallest.p_holm == pytest.approx(min(1.0, 3 * smallest.p))


def test_missing_clips_count_as_not_shown(random: np.random.Generator) -> None:
    whole = outcomes(0.5, random, np.zeros(100))
    half = ClipResults(whole.keys[:50], whole.conditions, {"action": np.zeros((50, 1), dtype=np.int32)})
    resampled = Resampled({"whole": {0: whole}, "half": {0: half}}, [Column(name="all")], num_draws=100)
    assert resampled.summary("half", "all").mean == 100.0
    assert resampled.num_clips == 100


def test_missing_seeds_are_left_out_of_figures_and_tests(random: np.random.Generator) -> None:
    models = {
        "a": {s: outcomes(0.5, random, np.zeros(200)) for s in range(3)},
        "b": {s: outcomes(0.6, random, np.zeros(200)) for s in (0, 2)},
    }
    resampled = Resampled(models, [Column(name="all")], num_draws=100)
    assert set(resampled.summary("b", "all").per_seed) == {0, 2}
    assert resampled.tests([("a", "b")], ["all"])[0].num_seeds == 2


def test_outcomes_are_read_back_as_they_were(random: np.random.Generator, tmp_path: object) -> None:
    from pathlib import Path

    one = outcomes(0.5, random, np.zeros(30), subsets=True)
    path = Path(str(tmp_path)) / "new" / "outcomes.npz"
    write_outcomes(path, one)
    read = read_outcomes(path)
    assert (read.keys, read.conditions) == (one.keys, one.conditions)
    assert (read.ranks["action"] == one.ranks["action"]).all()
