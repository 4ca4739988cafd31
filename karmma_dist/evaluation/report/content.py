"""What a report is made of, whatever it is written as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.evaluation.report.corruption_section import corruption_values
from karmma_dist.evaluation.report.readings import Models, Row
from karmma_dist.modalities import letters

MOST_BROKEN = 200
"""Rows of a model with a broken sensor that a report shows under all their conditions."""


@dataclass(frozen=True)
class ReportContent:
    """What report.md and report.html show.

    Raises:
        UserError: `models` is empty.
    """

    title: str
    """First line."""
    models: Models
    """Results (the object of results.json) per model name, in the order of the columns."""
    notes: Sequence[str] = ()
    """Sentences of the caller, for what the numbers cannot tell."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step."""
    comparison: dict[str, Any] | None = None
    """What `compare` says of these models."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no results to report: evaluate at least one model")


def condense(content: ReportContent) -> ReportContent:
    """Leave out what nobody would read: of many rows with a broken sensor those under all but one condition.

    A suite of failures under every subset and drop probability makes 1,600 rows a model. What stays is each failure
    at the largest set of modalities and the lowest drop probability, and a note says where the others are.
    """
    kept = {name: kept_rows(results) for name, results in content.models.items()}
    num_out = {name: len(results["rows"]) - len(kept[name]) for name, results in content.models.items()}
    if not any(num_out.values()):
        return content
    shown = {_condition(row) for rows in kept.values() for row in rows}
    note = f"{max(num_out.values()):,} rows of a model with broken sensors, under other conditions than "
    wholes = dict.fromkeys(letters(corruption_values(results)[0]) for results in content.models.values())
    note += f"{' and '.join(filter(None, wholes))}, are not in this report: they are in results.json"
    comparison = content.comparison
    if comparison is not None:
        note += ", their paired tests in comparison.json"
        pairs = [
            pair | {"conditions": [test for test in pair["conditions"] if _condition(test) in shown]}
            for pair in comparison["pairs"]
        ]
        comparison = comparison | {"pairs": pairs}
    models = {name: results | {"rows": kept[name]} for name, results in content.models.items()}
    return replace(content, models=models, notes=[*content.notes, f"{note}."], comparison=comparison)


def kept_rows(results: Mapping[str, Any]) -> list[Row]:
    """The rows of a model that a report shows: see `condense`."""
    rows: list[Row] = results["rows"]
    if sum(row.get("corrupt") is not None for row in rows) <= MOST_BROKEN:
        return rows
    modalities, probability, _ = corruption_values(results)
    at = (list(modalities), probability)
    return [row for row in rows if row.get("corrupt") is None or (row["modalities"], row["drop_prob"]) == at]


def _condition(row: Row) -> tuple[Any, ...]:
    """Of a row, or of a paired test."""
    return tuple(row["modalities"]), row["drop_prob"], row["seed"], row.get("corrupt")
