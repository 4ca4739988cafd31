"""The typed content of results.json: one row per condition, and a summary over the rows.

    {"rows": [{"modalities": [...], "drop_prob": 0.0, "seed": 0, "corrupt": null, "num_clips": N, ...,
               "action_top1": percent, "action_top1_ci": [low, high], ...}], "summary": {...}}

`to_dict` is the only writer and `parse_results` the only reader. Both look up metrics in `metrics.metric_table`.

Legend: N clips, K conditions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition
from karmma_dist.evaluation.metrics import GROUPS, Figure, find_figure

_INTERVAL, _NUM = "_ci", "num_"

Names = tuple[str, ...]
Interval = tuple[float, float]
"""Lower and upper end."""
Values = dict[str, float | None]
"""Values by figure, such as `action_top1`; None: no clip could be evaluated."""
Curves = dict[str, list[float | None]]
"""One value per drop probability, by figure."""

STRICT = ConfigDict(extra="forbid", strict=True)
"""The `__pydantic_config__` of a dataclass that `checked` reads; it refuses unknown fields and values of wrong type."""


@dataclass(frozen=True)
class ResultRow:
    """The figures of one model under one condition."""

    __pydantic_config__ = STRICT

    modalities: Names
    """Modalities that the condition names, in the model's order."""
    drop_prob: float
    """Probability in [0, 1] that each modality is dropped."""
    seed: int
    """Seed of the drops and of random corruptions."""
    corrupt: str | None
    """The broken sensor, such as `video:blur:3`; None: all sensors are intact."""
    num_clips: int
    """Number of clips that could be shown."""
    num_without: int
    """Number of clips that have none of the condition's modalities; no figure counts them."""
    num_present: dict[str, int]
    """Number of shown clips for which the dataset has the modality, by modality of the model."""
    num_kept: dict[str, int]
    """Number of clips shown with the modality, by modality of the model."""
    figures: Values
    """Figures in percent, or in the metric's own unit."""
    intervals: dict[str, Interval | None] = field(default_factory=dict)
    """95 % intervals of the figures that have one; None if the figure is None."""
    group_sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Number of shown clips in each group ("tail", "unseen"), by action and head."""
    missing: str | None = None
    """The modality that a share of the clips lacks, such as `audio:0.5`; None: no fixed modality is missing."""

    @property
    def is_plain(self) -> bool:
        """True if the condition consists of modalities and a drop probability only."""
        return self.corrupt is None and self.missing is None

    @property
    def condition(self) -> Condition:
        """The condition of the row."""
        return Condition(self.modalities, self.drop_prob, self.seed, self.corrupt, self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object: every figure is followed by its interval and preceded by the size of its group.

        `missing` is left out if it is None.
        """
        row: dict[str, Any] = as_json({name: getattr(self, name) for name in _ROW_FIELDS})
        if self.missing is None:
            del row["missing"]
        waiting = list(self.group_sizes)
        for name, value in self.figures.items():
            group = find_figure(name).metric.group
            while group in waiting:
                first = waiting.pop(0)
                row[_NUM + first] = self.group_sizes[first]
            row[name] = value
            if name in self.intervals:
                row[name + _INTERVAL] = as_json(self.intervals[name])
        return row | {_NUM + group: self.group_sizes[group] for group in waiting}


_ROW_FIELDS = tuple(
    entry.name for entry in fields(ResultRow) if entry.name not in ("figures", "intervals", "group_sizes")
)


@dataclass(frozen=True)
class SubsetSummary:
    """Averages over subsets of the modalities with intact sensors: see `summary.summarise`."""

    __pydantic_config__ = STRICT

    drop_prob: float
    num_subsets: int
    full: Names | None
    """The largest subset; None: it is not the union of all subsets."""
    average: Values
    relative_drop: Values
    average_ci: dict[str, Interval | None] | None = None
    """None: intervals were not computed."""


@dataclass(frozen=True)
class DropCurve:
    """Figures over the drop probability with intact sensors: see `summary.summarise`."""

    __pydantic_config__ = STRICT

    modalities: Names
    drop_prob: list[float]
    """Ascending."""
    num_seeds: int
    mean: Curves
    std: Curves
    area: Values
    fall: Values
    relative_fall: Values
    area_ci: dict[str, Interval | None] | None = None
    """None: intervals were not computed."""
    mean_ci: dict[str, list[Interval | None]] | None = None
    """None: intervals were not computed."""


@dataclass(frozen=True)
class Summary:
    """Clip counts, chance levels, and averages over the rows."""

    __pydantic_config__ = STRICT

    modalities: Names
    num_clips: int
    """Number of scored clips."""
    num_unlabelled: int
    num_damaged: int
    damage: list[str]
    """The first members that could not be read."""
    num_present: dict[str, int]
    """Number of scored clips for which the dataset has the modality."""
    num_pruned: int = 0
    """Number of clips left out because of their noun."""
    num_classes: dict[str, int] = field(default_factory=dict)
    """Number of classes of the action and each head; empty: no clip has a label, so the results have no rows."""
    chance_top1: dict[str, float] = field(default_factory=dict)
    """Top-1 of a random guess, in percent."""
    majority_top1: Values = field(default_factory=dict)
    """Top-1 of always predicting the most frequent class, in percent."""
    seeds: list[int] = field(default_factory=list)
    subsets: SubsetSummary | None = None
    """Figures over subsets; None: the rows contain no subsets."""
    drop_curve: DropCurve | None = None
    """Figures over the drop probability; None: the rows contain no sweep."""
    views: dict[str, int] | None = None
    """Views of each clip, which were averaged; None: not recorded."""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object without unknown fields."""
        content = as_json({name: getattr(self, name) for name in _SUMMARY_ORDER})
        for name in ("subsets", "drop_curve"):
            content[name] = None if content[name] is None else _without_none(content[name])
        if not self.num_classes:
            content = {name: content[name] for name in _UNLABELLED_ORDER}
        return content if self.views is None else content | {"views": self.views}


_UNLABELLED_ORDER = ("modalities", "num_clips", "num_unlabelled", "num_damaged", "damage", "num_present")
_SUMMARY_ORDER = (
    "modalities", "num_clips", "num_unlabelled", "num_pruned", "num_damaged", "damage", "num_present", "num_classes",
    "chance_top1", "majority_top1", "seeds", "subsets", "drop_curve",
)  # fmt: skip


@dataclass(frozen=True)
class ClipResults:
    """The scored clips of one model under every condition. N clips, K conditions."""

    keys: list[str]
    """Clip keys in ascending order."""
    conditions: list[Condition]
    """Conditions, in the order of the columns of `ranks`."""
    ranks: dict[str, np.ndarray]
    """Rank of the true class, int32 (N, K), for "action" and per head; -1 = the clip has none of the modalities."""


@dataclass(frozen=True)
class Results:
    """The content of results.json, and the results per clip from which it was computed."""

    rows: list[ResultRow]
    """One row per condition; empty: no clip has a label."""
    summary: Summary
    clips: ClipResults | None = field(default=None, compare=False, repr=False)
    """Results per clip; None if read from a file, which does not contain them."""

    @property
    def per_clip(self) -> ClipResults:
        """Results per clip, which exist only for results that were not read from a file."""
        assert self.clips is not None
        return self.clips

    @property
    def figures(self) -> list[Figure]:
        """Figures of the rows, in their order."""
        return [find_figure(name) for name in self.rows[0].figures] if self.rows else []

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"rows": [row.to_dict() for row in self.rows], "summary": self.summary.to_dict()}


def parse_results(value: object, where: str) -> Results:
    """Parse the JSON object of a results.json.

    Args:
        value: Parsed JSON.
        where: Name of the file, for messages.

    Raises:
        UserError: a field is missing, unknown or of another type, or belongs to an unknown metric.
    """
    if not isinstance(value, dict) or value.keys() != {"rows", "summary"} or not isinstance(value["rows"], list):
        raise UserError(f"{where}: not the results of an evaluation (rows and summary expected): evaluate again")
    rows = [parse_row(row, f"{where}: rows.{place}") for place, row in enumerate(value["rows"])]
    return Results(rows, checked(Summary, value["summary"], f"{where}: summary"))


def parse_row(value: object, where: str) -> ResultRow:
    """Parse one row of a results.json.

    Args:
        value: Parsed JSON.
        where: Name of the row, for messages.

    Raises:
        UserError: see `parse_results`.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object, not {type(value).__name__}")
    row: dict[str, Any] = {"figures": {}, "intervals": {}, "group_sizes": {}}
    for key, content in value.items():
        if key in _ROW_FIELDS:
            row[key] = content
        elif key.removeprefix(_NUM) in GROUPS:
            row["group_sizes"][key.removeprefix(_NUM)] = content
        elif key.removesuffix(_INTERVAL) in row["figures"]:
            row["intervals"][key.removesuffix(_INTERVAL)] = content
        else:
            row["figures"][_figure_name(key, where)] = content
    return checked(ResultRow, row, where)


def _figure_name(key: str, where: str) -> str:
    try:
        return find_figure(key).name
    except UserError as error:
        raise UserError(f"{where}.{key}: {error}") from None


T = TypeVar("T")


def checked(dataclass_type: type[T], value: object, where: str) -> T:
    """Parse a JSON value as a dataclass.

    Args:
        dataclass_type: Dataclass, whose fields are checked strictly.
        value: Parsed JSON.
        where: Name of the value, for messages.

    Raises:
        UserError: a field is missing, unknown or of another type.
    """
    adapter: TypeAdapter[T] = _adapter(dataclass_type)  # type: ignore[arg-type]  # a class can be hashed
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        place = ".".join(map(str, (where, *first["loc"])))
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}{more}: evaluate again") from None


@cache
def _adapter(dataclass_type: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(dataclass_type)


def as_json(value: Any) -> Any:
    """Convert nested dataclasses, dictionaries and sequences to the dictionaries and lists that JSON reads back."""
    if is_dataclass(value):
        return {entry.name: as_json(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {key: as_json(entry) for key, entry in value.items()}
    return [as_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content without intervals that were not computed."""
    return {key: value for key, value in content.items() if value is not None or not key.endswith(_INTERVAL)}
