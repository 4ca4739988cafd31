"""The content of an evaluation's report, and the part of it that somebody would read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.results import ResultRow, Results
from karmma_dist.evaluation.statistics.compare import Comparison
from karmma_dist.evaluation.summary import broken_condition
from karmma_dist.modalities import letters

MOST_BROKEN = 200
"""Rows of a model with a broken sensor that a report shows under all their conditions."""


@dataclass(frozen=True)
class ReportContent:
    """Everything that the report of one or several evaluated models shows.

    Raises:
        UserError: `models` is empty.
    """

    title: str
    """First line."""
    models: Mapping[str, Results]
    """Results per model name, in the order of the columns."""
    notes: Sequence[str] = ()
    """Sentences of the caller, for what the numbers cannot tell."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step."""
    comparison: Comparison | None = None
    """Tests of these models."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no results to report: evaluate at least one model")


def condense(content: ReportContent) -> ReportContent:
    """Leave out what nobody would read: of many rows with a broken sensor those under all but one condition.

    A suite of failures under every subset and drop probability makes 1,600 rows a model. What stays is each failure
    at the largest set of modalities and the lowest drop probability, and a note says where the others are.
    """
    models = {name: replace(results, rows=kept_rows(results)) for name, results in content.models.items()}
    num_out = max(len(results.rows) - len(models[name].rows) for name, results in content.models.items())
    if not num_out:
        return content
    conditions = dict.fromkeys(
        letters(condition[0]) for results in content.models.values() if (condition := broken_condition(results))
    )
    note = (
        f"{num_out:,} rows of a model with broken sensors, under other conditions than {' and '.join(conditions)}, are "
        "not in this report: they are in results.json"
    )
    comparison = content.comparison
    if comparison is not None:
        note += ", their paired tests in comparison.json"
        shown = {condition_of(row) for results in models.values() for row in results.rows}
        comparison = replace(
            comparison,
            pairs=[
                replace(pair, conditions=[test for test in pair.conditions if test.condition in shown])
                for pair in comparison.pairs
            ],
        )
    return replace(content, models=models, notes=[*content.notes, f"{note}."], comparison=comparison)


def kept_rows(results: Results) -> list[ResultRow]:
    """Return the rows of a model that a report shows: see `condense`."""
    condition = broken_condition(results)
    if condition is None or sum(row.corrupt is not None for row in results.rows) <= MOST_BROKEN:
        return results.rows
    return [row for row in results.rows if row.corrupt is None or (row.modalities, row.drop_prob) == condition]


def condition_of(row: ResultRow) -> Condition:
    """Return the condition of a row."""
    return Condition(row.modalities, row.drop_prob, row.seed, row.corrupt)
