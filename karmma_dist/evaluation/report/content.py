"""The content of an evaluation's report, condensed to the rows that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from karmma_dist.errors import UserError
from karmma_dist.evaluation.results import ResultRow, Results
from karmma_dist.evaluation.statistics.compare import Comparison
from karmma_dist.evaluation.summary import broken_condition
from karmma_dist.modalities import letters

MOST_BROKEN = 200
"""Largest number of rows with a broken sensor, per model, that a report shows under all conditions."""


@dataclass(frozen=True)
class ReportContent:
    """The content of a report on one or several evaluated models.

    Raises:
        UserError: `models` is empty.
    """

    title: str
    """First line of the report."""
    models: Mapping[str, Results]
    """Results per model name, in the order of the columns."""
    notes: Sequence[str] = ()
    """Additional sentences of the caller."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step."""
    comparison: Comparison | None = None
    """Paired tests between the models."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no results to report: evaluate at least one model")


def condense(content: ReportContent) -> ReportContent:
    """Return the content with at most one condition per corruption if there are many rows with a broken sensor.

    A suite of corruptions under every subset and drop probability makes 1,600 rows per model. The condensed content
    keeps each corruption at the largest set of modalities and the lowest drop probability. A note names the files that
    contain the other rows.
    """
    models = {name: replace(results, rows=kept_rows(results)) for name, results in content.models.items()}
    num_omitted = max(len(results.rows) - len(models[name].rows) for name, results in content.models.items())
    if not num_omitted:
        return content
    conditions = dict.fromkeys(
        letters(condition[0]) for results in content.models.values() if (condition := broken_condition(results))
    )
    note = (
        f"This report omits up to {num_omitted:,} rows per model: broken sensors under conditions other than "
        f"{' and '.join(conditions)}. results.json contains these rows"
    )
    comparison = content.comparison
    if comparison is not None:
        note += ", and comparison.json their paired tests"
        shown = {row.condition for results in models.values() for row in results.rows}
        comparison = replace(
            comparison,
            pairs=[
                replace(pair, conditions=[test for test in pair.conditions if test.condition in shown])
                for pair in comparison.pairs
            ],
        )
    return replace(content, models=models, notes=[*content.notes, f"{note}."], comparison=comparison)


def kept_rows(results: Results) -> list[ResultRow]:
    """Return the rows of a model that a condensed report shows: see `condense`."""
    condition = broken_condition(results)
    if condition is None or sum(row.corrupt is not None for row in results.rows) <= MOST_BROKEN:
        return results.rows
    return [row for row in results.rows if row.corrupt is None or (row.modalities, row.drop_prob) == condition]
