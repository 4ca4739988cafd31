"""What the figures of several models say, in sentences that follow from the numbers alone, whichever way they fall."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.summary import LEVEL, METRIC
from karmma_dist.modalities import letters

_TIE = 0.005
"""Points below which two figures are the same to the report's two digits."""


def findings(models: Mapping[str, dict[str, Any]], comparison: dict[str, Any] | None = None) -> list[str]:
    """Sentences on each model's curve and average, and on every pair of models.

    Args:
        models: Results (the object of results.json) per model name.
        comparison: What `compare` says of them: figures per model do not tell how far a difference is down to the
            clips, since all models saw the same ones.
    """
    return [*_against_majority(models), *_curves(models, comparison), *_subsets(models)]


def _against_majority(models: Mapping[str, dict[str, Any]]) -> list[str]:
    sentences = []
    for name, results in models.items():
        majority = results["summary"]["majority_top1"]["action"]
        best = max((row[METRIC] for row in results["rows"] if row[METRIC] is not None), default=None)
        if best is not None and best <= majority:
            sentences.append(
                f"{name} is nowhere better than naming the most frequent action each time ({best:.2f} % against "
                f"{majority:.2f} %): how slowly it falls says nothing."
            )
    return sentences


def _curves(models: Mapping[str, dict[str, Any]], comparison: dict[str, Any] | None) -> list[str]:
    curves = {n: r["summary"]["drop_curve"] for n, r in models.items() if r["summary"]["drop_curve"] is not None}
    curves = {name: curve for name, curve in curves.items() if None not in curve["mean"][METRIC]}
    sentences = []
    for name, curve in curves.items():
        mean, probabilities = curve["mean"][METRIC], curve["drop_prob"]
        fall, share = curve["fall"][METRIC], curve["relative_fall"][METRIC]
        of_start = "" if share is None else f" ({abs(share):.1f} % of the start)"
        sentences.append(
            f"{name} ({letters(curve['modalities'])}) goes from {mean[0]:.2f} % at drop probability "
            f"{probabilities[0]:g} to {mean[-1]:.2f} % at {probabilities[-1]:g}, a "
            f"{'fall' if fall >= 0 else 'rise'} of {abs(fall):.2f} points{of_start}; the mean height of its curve is "
            f"{curve['area'][METRIC]:.2f} %."
        )
    tests = {} if comparison is None else {frozenset(of["models"]): of["drop_curve_fall"] for of in comparison["pairs"]}
    pairs = list(itertools.combinations(curves, 2))
    sentences += [_pair(first, second, curves, tests.get(frozenset((first, second)))) for first, second in pairs]
    if comparison is None and any(_comparable([curves[name] for name in pair]) for pair in pairs):
        sentences.append(
            "Whether these differences would hold on other clips is not tested here: karmma-dist eval RUN RUN tests it."
        )
    if len(curves) > 2 and _comparable(list(curves.values())):
        slowest = min(curves, key=lambda name: curves[name]["fall"][METRIC])
        highest = max(curves, key=lambda name: curves[name]["area"][METRIC])
        also = "" if slowest == highest else f"{highest} "
        sentences.append(f"Of all {len(curves)} models, {slowest} loses the fewest points and {also}is the highest.")
    return sentences


def _pair(first: str, second: str, curves: Mapping[str, dict[str, Any]], test: dict[str, Any] | None) -> str:
    one, two = curves[first], curves[second]
    if not _comparable([one, two]):
        return f"{second} and {first} were swept over other modalities or probabilities: not compared."
    fall = [curve["fall"][METRIC] for curve in (one, two)]
    share = [curve["relative_fall"][METRIC] for curve in (one, two)]
    above = sum(b > a for a, b in zip(one["mean"][METRIC], two["mean"][METRIC], strict=True))
    shares = "" if None in share else f", {share[1]:.1f} % of its start against {share[0]:.1f} %"
    doubt = ""
    if test is not None and test["p_holm"] >= LEVEL:
        doubt = f"; the difference is within the sampling error ({markdown.p_value(test['p_holm'])})"
    return (
        f"{second} {_verdict(fall, share)} {first}: {fall[1]:.2f} points against {fall[0]:.2f}{shares}{doubt}. "
        f"It is above {first} at {above} of {len(one['drop_prob'])} drop probabilities."
    )


def _verdict(fall: Sequence[float], share: Sequence[float | None]) -> str:
    """How the second of two models falls, in points and as a share of where it starts."""
    in_points = _sign(fall[1] - fall[0])
    in_share = in_points if share[0] is None or share[1] is None else _sign(share[1] - share[0])
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


def _comparable(curves: Sequence[dict[str, Any]]) -> bool:
    return all(c["modalities"] == curves[0]["modalities"] and c["drop_prob"] == curves[0]["drop_prob"] for c in curves)


def _subsets(models: Mapping[str, dict[str, Any]]) -> list[str]:
    sentences = []
    for name, results in models.items():
        subsets = results["summary"]["subsets"]
        if subsets is None or subsets["average"][METRIC] is None:
            continue
        drop = subsets["relative_drop"][METRIC]
        lost = "" if drop is None else f", on average {drop:.1f} % below all of {letters(subsets['full'])}"
        mean = subsets["average"][METRIC]
        sentences.append(f"{name} averages {mean:.2f} % over {subsets['num_subsets']} subsets{lost}.")
    return sentences
