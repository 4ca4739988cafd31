"""The report's section on which model is better than which, with what certainty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.report.html.tables import Cell, Table
from karmma_dist.evaluation.summary import LEVEL
from karmma_dist.modalities import letters

_FALL = "drop_curve_fall"
_FIGURES = {
    "subset_average": "average over subsets",
    "drop_curve_area": "mean height of the drop curve",
    _FALL: "fall of the drop curve",
}

_NAMES = frozenset({1, 2})
"""Columns of the HTML tables that hold names of models."""


def comparison_section(comparison: dict[str, Any]) -> str:
    """What `compare` found, as Markdown: a sentence and a line per pair and figure, a table of all conditions."""
    pairs = comparison["pairs"]
    lines = [
        "## Which differences would hold on other clips: action top-1\n",
        f"Paired tests on the same {comparison['num_clips']:,} clips; second model minus first, in points. Averages "
        "and falls: paired bootstrap, 95 % interval. Single conditions: exact McNemar test. p-values are corrected by "
        "Holm for the number of pairs, and of conditions where there are several (those with broken sensors apart).\n",
    ]
    figures = [_figure_line(pair, figure) for figure in _FIGURES for pair in pairs if pair[figure] is not None]
    if figures:
        lines += [*(f"* {sentence}" for pair in pairs for sentence in sentences(pair)), ""]
        lines += [markdown.table(["figure", "models", "difference", "95 % interval", "p"], figures), ""]
    conditions = list(dict.fromkeys(_condition(test) for pair in pairs for test in pair["conditions"]))
    header = ["present", "drop %", "seed", *(_names(pair["models"]) for pair in pairs)]
    tests = [{_condition(test): test for test in pair["conditions"]} for pair in pairs]
    body = [[*condition, *(_cell(of.get(condition)) for of in tests)] for condition in conditions]
    return "\n".join([*lines, markdown.table(header, body), ""])


def comparison_tables(comparison: dict[str, Any]) -> list[tuple[str, Table]]:
    """The same for the HTML report: paired tests of averages and falls, and of single conditions."""
    pairs = comparison["pairs"]
    several = [
        [_label(figure), second, first, _html_difference(pair[figure]), *_html_interval(pair[figure])]
        for figure in _FIGURES
        for pair in pairs
        for first, second in [pair["models"]]
        if pair[figure] is not None
    ]
    single = [
        [f"{shown} at {drop} %, seed {seed}", second, first, _html_difference(test), f"{test['p_holm']:.3f}"]
        for pair in pairs
        for first, second in [pair["models"]]
        for test in pair["conditions"]
        if test["difference"] is not None
        for shown, drop, seed in [_condition(test)]
    ]
    columns = ["model", "against", "difference"]
    found: list[tuple[str, list[str], list[list[Cell | str]]]] = [
        ("Paired tests of averages and falls", ["figure", *columns, "low", "high", "p"], several),
        ("Paired tests of single conditions", ["present", *columns, "p"], single),
    ]
    return [
        (heading, Table(f"{heading}: action top-1", header, body, text_columns=_NAMES))
        for heading, header, body in found
        if body
    ]


def sentences(pair: dict[str, Any]) -> list[str]:
    """What the figures over several conditions say of a pair, in words."""
    return [_sentence(pair, figure) for figure in _FIGURES if pair[figure] is not None]


def _sentence(pair: dict[str, Any], figure: str) -> str:
    first, second = map(markdown.text, pair["models"])
    test = pair[figure]
    difference, (low, high) = test["difference"], test["ci"]
    if test["p_holm"] >= LEVEL:
        certainty = f"{difference:+.2f} points {markdown.interval([low, high])}, {_p(test)}"
        return f"{second} and {first} cannot be told apart by the {_FIGURES[figure]}: {certainty}."
    size = f"{abs(difference):.2f}"
    certainty = f"{markdown.interval([low, high] if difference > 0 else [-high, -low])}, {_p(test)}"
    if figure == _FALL:
        return f"{second} falls by {size} {'more' if difference > 0 else 'fewer'} points than {first} {certainty}."
    verdict = "better" if difference > 0 else "worse"
    return f"{second} is {verdict} than {first} in the {_FIGURES[figure]} by {size} points {certainty}."


def _label(figure: str) -> str:
    """What a line of a table is of; the reader of a table expects more to be better."""
    return f"{_FIGURES[figure]} (less is better)" if figure == _FALL else _FIGURES[figure]


def _figure_line(pair: dict[str, Any], figure: str) -> list[str]:
    test = pair[figure]
    return [
        _label(figure), _names(pair["models"]), _difference(test), markdown.interval(test["ci"]), _p(test)
    ]  # fmt: skip


def _html_difference(test: dict[str, Any]) -> Cell:
    return Cell(f"{test['difference']:+.2f}", best=test["p_holm"] < LEVEL)


def _html_interval(test: dict[str, Any]) -> list[str]:
    low, high = test["ci"]
    return [f"{low:.2f}", f"{high:.2f}", f"{test['p_holm']:.3f}"]


def _names(models: Sequence[str]) -> str:
    first, second = map(markdown.text, models)
    return f"{second} – {first}"


def _condition(test: dict[str, Any]) -> tuple[str, str, str]:
    broken = f" {test['corrupt']}" if test.get("corrupt") else ""
    return letters(test["modalities"]) + broken, f"{100 * test['drop_prob']:g}", f"{test['seed']}"


def _cell(test: dict[str, Any] | None) -> str:
    return "–" if test is None or test["difference"] is None else f"{_difference(test)} ({_p(test)})"


def _difference(test: dict[str, Any]) -> str:
    """In bold where it is significant."""
    text = f"{test['difference']:+.2f}"
    return f"**{text}**" if test["p_holm"] < LEVEL else text


def _p(test: dict[str, Any]) -> str:
    return markdown.p_value(test["p_holm"])
