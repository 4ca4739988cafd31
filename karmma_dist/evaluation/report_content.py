"""What a report is made of, whatever it is written as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.evaluation.readings import Models


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
