"""Sentences on the results of one or several models, derived from the numbers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from karmma_dist.evaluation.metrics import ACTION, find_figure
from karmma_dist.evaluation.report.model import interval, p_equals
from karmma_dist.evaluation.results import DropCurve, Results
from karmma_dist.evaluation.statistics.compare import Comparison, ConditionTest, FigureTest, PairTests
from karmma_dist.evaluation.summary import LEVEL, METRIC, fullest, mean_over_seeds
from karmma_dist.modalities import letters

FIGURE_NAMES = {
    "subset_average": "average over subsets",
    "drop_curve_area": "mean height of the drop curve",
    "drop_curve_fall": "fall of the drop curve",
}
"""Figures over several conditions by which pairs are tested, in words."""

FALL = "drop_curve_fall"
"""The only one of these figures for which lower is better."""

_TIE = 0.005
"""Difference in points below which two figures count as equal; the report shows two decimals."""

Models = Mapping[str, Results]


def headline(models: Models, comparison: Comparison | None = None) -> str:
    """Return the main result in one sentence: accuracy with all modalities present, and with modalities missing.

    Args:
        models: Results per model name.
        comparison: Paired tests between the models; None: the differences are not tested.
    """
    full = _known_values({name: mean_over_seeds(fullest(results.rows)) for name, results in models.items()})
    if not full:
        return "No clip could be evaluated."
    top, condition = f"{max(full.values()):.2f} % {compared_heading()}", fullest_name(models)
    missing, over = _with_missing(models)
    is_poor = len(against_majority(models)) == len(models)
    doubt = ", no better than always predicting the most frequent action" if is_poor else ""
    if len(models) == 1:
        return f"{next(iter(full))} reaches {top} with {condition}{_one_missing(models, missing, over)}{doubt}."
    best, robust = _leaders(full), _leaders(missing)
    certainty = _certainty(best, full, comparison, lambda pair: _full_test(pair, models))
    sentence = f"Of {len(models)} models, {_are_best(best)} with {condition} ({top}{certainty})"
    if robust:
        subject = " and" if robust == best else f", and {_are_best(robust)}"
        certainty = _certainty(robust, missing, comparison, lambda pair: pair.drop_curve_area or pair.subset_average)
        sentence += f"{subject} when modalities are missing ({max(missing.values()):.2f} % {over}{certainty})"
    return f"{sentence}{doubt}."


def compared_heading() -> str:
    """Return the heading of the figure by which models are compared."""
    return find_figure(METRIC).heading


def fullest_name(models: Models) -> str:
    """Return a description of the rows with the fewest modalities missing, over all models."""
    is_full = all(
        row.drop_prob == 0 and row.modalities == results.summary.modalities
        for results in models.values()
        for row in fullest(results.rows)
    )
    return "all modalities present" if is_full else "the fewest modalities missing"


def _are_best(names: Sequence[str]) -> str:
    return f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} best"


def _with_missing(models: Models) -> tuple[dict[str, float], str]:
    """Return a figure per model with modalities missing, and its description.

    The figure is the mean height of the drop curve if all models have one, else the average over subsets.
    """
    curves = {name: results.summary.drop_curve for name, results in models.items()}
    if all(curves.values()):
        areas = {name: curve.area[METRIC] for name, curve in curves.items() if curve is not None}
        return _known_values(areas), "on average over the drop probabilities"
    subsets = {name: results.summary.subsets for name, results in models.items()}
    if all(subsets.values()):
        averages = {name: summary.average[METRIC] for name, summary in subsets.items() if summary is not None}
        return _known_values(averages), "on average over the subsets"
    return {}, ""


def _known_values(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _leaders(values: Mapping[str, float]) -> list[str]:
    """Return the models with the highest figure, compared to two decimals."""
    return [name for name, value in values.items() if max(values.values()) - value < _TIE]


def _one_missing(models: Models, missing: Mapping[str, float], over: str) -> str:
    """Return the second half of the headline of a single model."""
    (name,) = models
    curve = models[name].summary.drop_curve
    last = None if curve is None else curve.mean[METRIC][-1]
    if curve is not None and last is not None:
        return f", and {last:.2f} % when each modality is missing with probability {curve.drop_prob[-1]:g}"
    return f", and {missing[name]:.2f} % {over}" if name in missing else ""


def _certainty(
    leaders: Sequence[str],
    values: Mapping[str, float],
    comparison: Comparison | None,
    test_of: Callable[[PairTests], FigureTest | ConditionTest | None],
) -> str:
    """Return whether the lead over the second best is significant, in words; empty without a test."""
    others = {name: value for name, value in values.items() if name not in leaders}
    if comparison is None or len(leaders) > 1 or not others:
        return ""
    second = max(others, key=lambda name: others[name])
    test = test_of(next(pair for pair in comparison.pairs if {*pair.models} == {leaders[0], second}))
    if test is None:
        return ""
    return lead(second, test.p_holm)


def lead(second: str, p_holm: float) -> str:
    """Return whether the lead over the second best is significant, in words that end a sentence."""
    certainty = "is not significant" if p_holm >= LEVEL else "is significant"
    return f"; its lead over {second} {certainty}, {p_equals(p_holm)}"


def _full_test(pair: PairTests, models: Models) -> ConditionTest | None:
    """Return the test under the condition with the fewest modalities missing, if both models have the same one."""
    rows = [fullest(models[name].rows) for name in pair.models]
    if any(len(seeds) != 1 for seeds in rows):
        return None
    conditions = {(row.modalities, row.drop_prob) for seeds in rows for row in seeds}
    plain = [test for test in pair.conditions if test.condition.is_plain]
    return next((test for test in plain if conditions == {(test.modalities, test.drop_prob)}), None)


def result_sentences(models: Models, comparison: Comparison | None = None) -> list[str]:
    """Return sentences on each model's curve and average, and on every pair of models.

    Args:
        models: Results per model name.
        comparison: Paired tests between the models. Intervals per model cannot replace them, since all models saw the
            same clips.
    """
    return [*against_majority(models), *_curves(models, comparison), *_subsets(models)]


def against_majority(models: Models) -> list[str]:
    """Return a sentence on each model that is no better than always predicting the most frequent action."""
    sentences = []
    for name, results in models.items():
        majority = results.summary.majority_top1[ACTION]
        best = max((value for row in results.rows if (value := row.figures[METRIC]) is not None), default=None)
        if best is not None and majority is not None and best <= majority:
            sentences.append(
                f"{name} is never better than always predicting the most frequent action ({best:.2f} % against "
                f"{majority:.2f} %), so a slow fall of its curve means nothing."
            )
    return sentences


def _curves(models: Models, comparison: Comparison | None) -> list[str]:
    curves = {name: curve for name, results in models.items() if (curve := results.summary.drop_curve) is not None}
    curves = {name: curve for name, curve in curves.items() if None not in curve.mean[METRIC]}
    sentences = [_curve(name, curve) for name, curve in curves.items()]
    tests = {} if comparison is None else {frozenset(pair.models): pair.drop_curve_fall for pair in comparison.pairs}
    pairs = list(itertools.combinations(curves, 2))
    sentences += [_pair(first, second, curves, tests.get(frozenset((first, second)))) for first, second in pairs]
    if comparison is None and any(_comparable([curves[name] for name in pair]) for pair in pairs):
        sentences.append(
            "These differences are not tested for significance here; karmma-dist eval RUN RUN tests them."
        )
    if len(curves) > 2 and _comparable(list(curves.values())):
        slowest = min(curves, key=lambda name: _known(curves[name].fall))
        highest = max(curves, key=lambda name: _known(curves[name].area))
        subject = "" if slowest == highest else f"{highest} "
        sentences.append(
            f"Of all {len(curves)} models, {slowest} loses the fewest points and {subject}has the highest curve."
        )
    return sentences


def _curve(name: str, curve: DropCurve) -> str:
    mean, share = curve.mean[METRIC], curve.relative_fall[METRIC]
    fall, area = _known(curve.fall), _known(curve.area)
    relative = "" if share is None else f" ({abs(share):.1f} % of the initial value)"
    return (
        f"{name} ({letters(curve.modalities)}) goes from {mean[0]:.2f} % at drop probability {curve.drop_prob[0]:g} to "
        f"{mean[-1]:.2f} % at {curve.drop_prob[-1]:g}, a {'fall' if fall >= 0 else 'rise'} of {abs(fall):.2f} "
        f"points{relative}; the mean height of its curve is {area:.2f} %."
    )


def _pair(first: str, second: str, curves: Mapping[str, DropCurve], test: FigureTest | None) -> str:
    pair = [curves[first], curves[second]]
    if not _comparable(pair):
        return (
            f"{second} and {first} were swept over different modalities or probabilities, so they are not compared."
        )
    falls = [_known(curve.fall) for curve in pair]
    shares = [curve.relative_fall[METRIC] for curve in pair]
    heights = zip(*(curve.mean[METRIC] for curve in pair), strict=True)
    above = sum(b > a for a, b in heights if a is not None and b is not None)
    relative = "" if None in shares else f", or {shares[1]:.1f} % of its initial value against {shares[0]:.1f} %"
    doubt = ""
    if test is not None and test.p_holm >= LEVEL:
        doubt = f"; the difference is not significant ({p_equals(test.p_holm)})"
    return (
        f"{second} {_verdict(falls, shares)} {first}: {falls[1]:.2f} points against {falls[0]:.2f}{relative}{doubt}. "
        f"It is above {first} at {above} of {len(pair[0].drop_prob)} drop probabilities."
    )


def _verdict(falls: Sequence[float], shares: Sequence[float | None]) -> str:
    """Return how the second of two models falls against the first, in points and relative to the initial value."""
    in_points = _sign(falls[1] - falls[0])
    in_share = in_points if shares[0] is None or shares[1] is None else _sign(shares[1] - shares[0])
    if in_points == in_share == 0:
        return "falls as fast as"
    if in_points <= 0 and in_share <= 0:
        return "falls more slowly than"
    if in_points >= 0 and in_share >= 0:
        return "falls faster than"
    if in_points < 0:
        return "falls by fewer points but a larger share than"
    return "falls by more points but a smaller share than"


def _sign(difference: float) -> int:
    return 0 if abs(difference) < _TIE else int(math.copysign(1, difference))


def _known(values: Mapping[str, float | None]) -> float:
    """Return the compared figure of a curve without missing points."""
    value = values[METRIC]
    assert value is not None
    return value


def _comparable(curves: Sequence[DropCurve]) -> bool:
    return all(c.modalities == curves[0].modalities and c.drop_prob == curves[0].drop_prob for c in curves)


def _subsets(models: Models) -> list[str]:
    sentences = []
    for name, results in models.items():
        subsets = results.summary.subsets
        if subsets is None or (mean := subsets.average[METRIC]) is None:
            continue
        drop = subsets.relative_drop[METRIC]
        full = letters(subsets.full or ())
        loss = "" if drop is None else f"; its smaller subsets are on average {drop:.1f} % below {full}"
        sentences.append(f"{name} averages {mean:.2f} % over {subsets.num_subsets} subsets{loss}.")
    return sentences


def verdicts(pair: PairTests) -> list[str]:
    """Return sentences on the tests of a pair over several conditions."""
    return [_tested(pair.models, name, test) for name in FIGURE_NAMES if (test := pair.test(name)) is not None]


def _tested(models: tuple[str, str], name: str, test: FigureTest) -> str:
    (first, second), (low, high) = models, test.ci
    if test.p_holm >= LEVEL:
        certainty = f"{test.difference:+.2f} points {interval(test.ci)}, {p_equals(test.p_holm)}"
        return f"{second} and {first} do not differ significantly in the {FIGURE_NAMES[name]}: {certainty}."
    size = f"{abs(test.difference):.2f}"
    ends = (low, high) if test.difference > 0 else (-high, -low)
    certainty = f"{interval(ends)}, {p_equals(test.p_holm)}"
    if name == FALL:
        return f"{second} falls by {size} {'more' if test.difference > 0 else 'fewer'} points than {first} {certainty}."
    verdict = "better" if test.difference > 0 else "worse"
    return f"{second} is {verdict} than {first} in the {FIGURE_NAMES[name]} by {size} points {certainty}."
