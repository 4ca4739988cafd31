"""Results of one or several models in sentences that follow from the numbers alone, whichever way they fall."""

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
"""The figures over several conditions that pairs are tested by, in words."""

FALL = "drop_curve_fall"
"""The figure among them of which less is better."""

_TIE = 0.005
"""Points below which two figures are the same to the report's two digits."""

Models = Mapping[str, Results]


def headline(models: Models, comparison: Comparison | None = None) -> str:
    """Return what came out in one sentence: how good with everything present, and how good with modalities missing.

    Args:
        models: Results per model name.
        comparison: Tests of these models; None: their differences are not tested.
    """
    full = _known_values({name: mean_over_seeds(fullest(results.rows)) for name, results in models.items()})
    if not full:
        return "No clip could be evaluated."
    height, there = f"{max(full.values()):.2f} % {compared_heading()}", fullest_name(models)
    missing, over = _with_missing(models)
    doubt = ", no more than naming the most frequent action" if len(against_majority(models)) == len(models) else ""
    if len(models) == 1:
        return f"{next(iter(full))} reaches {height} with {there}{_one_missing(models, missing, over)}{doubt}."
    best, robust = _leaders(full), _leaders(missing)
    verb = "are" if len(best) > 1 else "is"
    certainty = _certainty(best, full, comparison, lambda pair: _full_test(pair, models))
    said = f"Of {len(models)} models, {' and '.join(best)} {verb} the best with {there} ({height}{certainty})"
    if robust:
        subject = " and" if robust == best else f", {' and '.join(robust)}"
        certainty = _certainty(robust, missing, comparison, lambda pair: pair.drop_curve_area or pair.subset_average)
        said += f"{subject} where modalities are missing ({max(missing.values()):.2f} % {over}{certainty})"
    return f"{said}{doubt}."


def compared_heading() -> str:
    """Return the words for the figure that models are compared by."""
    return find_figure(METRIC).heading


def fullest_name(models: Models) -> str:
    """Return what the rows of all models that lack the least have in common."""
    is_full = all(
        row.drop_prob == 0 and row.modalities == results.summary.modalities
        for results in models.values()
        for row in fullest(results.rows)
    )
    return "everything present" if is_full else "least missing"


def _with_missing(models: Models) -> tuple[dict[str, float], str]:
    """Of each model the mean height of its drop curve, or where one has none the average over subsets; in words."""
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
    """The models with the highest figure, to the report's two digits."""
    return [name for name, value in values.items() if max(values.values()) - value < _TIE]


def _one_missing(models: Models, missing: Mapping[str, float], over: str) -> str:
    """The second half of one model's sentence."""
    (name,) = models
    curve = models[name].summary.drop_curve
    last = None if curve is None else curve.mean[METRIC][-1]
    if curve is not None and last is not None:
        return f", and {last:.2f} % where each modality is missing with probability {curve.drop_prob[-1]:g}"
    return f", and {missing[name]:.2f} % {over}" if name in missing else ""


def _certainty(
    leaders: Sequence[str],
    values: Mapping[str, float],
    comparison: Comparison | None,
    test_of: Callable[[PairTests], FigureTest | ConditionTest | None],
) -> str:
    """Whether the lead over the second best would hold on other clips."""
    others = {name: value for name, value in values.items() if name not in leaders}
    if comparison is None or len(leaders) > 1 or not others:
        return ""
    second = max(others, key=lambda name: others[name])
    test = test_of(next(pair for pair in comparison.pairs if {*pair.models} == {leaders[0], second}))
    if test is None:
        return ""
    hold = "is within the sampling error" if test.p_holm >= LEVEL else "would hold on other clips"
    return f"; its lead over {second} {hold}, {p_equals(test.p_holm)}"


def _full_test(pair: PairTests, models: Models) -> ConditionTest | None:
    """The test under the condition that lacks the least, where it is one and the same of both models."""
    rows = [fullest(models[name].rows) for name in pair.models]
    if any(len(own) != 1 for own in rows):
        return None
    conditions = {(row.modalities, row.drop_prob) for own in rows for row in own}
    whole_sensors = [test for test in pair.conditions if test.corrupt is None]
    return next((test for test in whole_sensors if conditions == {(test.modalities, test.drop_prob)}), None)


def findings(models: Models, comparison: Comparison | None = None) -> list[str]:
    """Return sentences on each model's curve and average, and on every pair of models.

    Args:
        models: Results per model name.
        comparison: Tests of these models: figures per model do not tell how far a difference is down to the clips,
            since all models saw the same ones.
    """
    return [*against_majority(models), *_curves(models, comparison), *_subsets(models)]


def against_majority(models: Models) -> list[str]:
    """Return a sentence on each model that is no better than naming the most frequent action."""
    sentences = []
    for name, results in models.items():
        majority = results.summary.majority_top1[ACTION]
        best = max((value for row in results.rows if (value := row.figures[METRIC]) is not None), default=None)
        if best is not None and majority is not None and best <= majority:
            sentences.append(
                f"{name} is nowhere better than naming the most frequent action each time ({best:.2f} % against "
                f"{majority:.2f} %): how slowly it falls says nothing."
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
            "Whether these differences would hold on other clips is not tested here: karmma-dist eval RUN RUN tests it."
        )
    if len(curves) > 2 and _comparable(list(curves.values())):
        slowest = min(curves, key=lambda name: _known(curves[name].fall))
        highest = max(curves, key=lambda name: _known(curves[name].area))
        also = "" if slowest == highest else f"{highest} "
        sentences.append(f"Of all {len(curves)} models, {slowest} loses the fewest points and {also}is the highest.")
    return sentences


def _curve(name: str, curve: DropCurve) -> str:
    mean, share = curve.mean[METRIC], curve.relative_fall[METRIC]
    fall, area = _known(curve.fall), _known(curve.area)
    of_start = "" if share is None else f" ({abs(share):.1f} % of the start)"
    return (
        f"{name} ({letters(curve.modalities)}) goes from {mean[0]:.2f} % at drop probability {curve.drop_prob[0]:g} to "
        f"{mean[-1]:.2f} % at {curve.drop_prob[-1]:g}, a {'fall' if fall >= 0 else 'rise'} of {abs(fall):.2f} "
        f"points{of_start}; the mean height of its curve is {area:.2f} %."
    )


def _pair(first: str, second: str, curves: Mapping[str, DropCurve], test: FigureTest | None) -> str:
    own = [curves[first], curves[second]]
    if not _comparable(own):
        return f"{second} and {first} were swept over other modalities or probabilities: not compared."
    falls = [_known(curve.fall) for curve in own]
    shares = [curve.relative_fall[METRIC] for curve in own]
    heights = zip(*(curve.mean[METRIC] for curve in own), strict=True)
    above = sum(b > a for a, b in heights if a is not None and b is not None)
    said = "" if None in shares else f", {shares[1]:.1f} % of its start against {shares[0]:.1f} %"
    doubt = ""
    if test is not None and test.p_holm >= LEVEL:
        doubt = f"; the difference is within the sampling error ({p_equals(test.p_holm)})"
    return (
        f"{second} {_verdict(falls, shares)} {first}: {falls[1]:.2f} points against {falls[0]:.2f}{said}{doubt}. "
        f"It is above {first} at {above} of {len(own[0].drop_prob)} drop probabilities."
    )


def _verdict(falls: Sequence[float], shares: Sequence[float | None]) -> str:
    """How the second of two models falls, in points and as a share of where it starts."""
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
    """The figure that models are compared by, of a curve that has no gap."""
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
        lost = "" if drop is None else f", on average {drop:.1f} % below all of {letters(subsets.full or ())}"
        sentences.append(f"{name} averages {mean:.2f} % over {subsets.num_subsets} subsets{lost}.")
    return sentences


def verdicts(pair: PairTests) -> list[str]:
    """Return what the tests over several conditions say of a pair."""
    return [_tested(pair.models, name, test) for name in FIGURE_NAMES if (test := pair.test(name)) is not None]


def _tested(models: tuple[str, str], name: str, test: FigureTest) -> str:
    (first, second), (low, high) = models, test.ci
    if test.p_holm >= LEVEL:
        certainty = f"{test.difference:+.2f} points {interval(test.ci)}, {p_equals(test.p_holm)}"
        return f"{second} and {first} cannot be told apart by the {FIGURE_NAMES[name]}: {certainty}."
    size = f"{abs(test.difference):.2f}"
    ends = (low, high) if test.difference > 0 else (-high, -low)
    certainty = f"{interval(ends)}, {p_equals(test.p_holm)}"
    if name == FALL:
        return f"{second} falls by {size} {'more' if test.difference > 0 else 'fewer'} points than {first} {certainty}."
    verdict = "better" if test.difference > 0 else "worse"
    return f"{second} is {verdict} than {first} in the {FIGURE_NAMES[name]} by {size} points {certainty}."
