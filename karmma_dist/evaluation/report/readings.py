"""What the HTML report reads from rows: those of one condition, their mean over seeds with its interval, headings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.report.html.svg import Point
from karmma_dist.evaluation.report.html.tables import number
from karmma_dist.evaluation.summary import METRIC

Models = Mapping[str, dict[str, Any]]
Row = dict[str, Any]

_CONDITION = ("modalities", "drop_prob", "seed", "corrupt")
_INTERVAL = "_ci"
_WORDS = (
    ("_mean_class", " per class"),
    ("_top1", " top-1"),
    ("_top5", " top-5"),
    ("_ece", " calibration error"),
    ("_loss", " loss (nats)"),
    ("_tail", ", tail classes"),
    ("_unseen", ", unseen participants"),
)


def metric_columns(rows: Sequence[Row]) -> list[str]:
    """Keys of rows that are figures: not conditions, counts or intervals."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return [
        key
        for key in keys
        if key not in _CONDITION
        and not key.startswith("num_")
        and not key.endswith(_INTERVAL)
        and all(isinstance(row.get(key), int | float | None) for row in rows)
    ]


def heading(name: str) -> str:
    """`action_top1_tail` -> `action top-1, tail classes`."""
    for ending, words in _WORDS:
        name = name.replace(ending, words)
    return name.replace("_", " ")


def uncorrupted(models: Models) -> dict[str, dict[str, Any]]:
    """The models without their rows of corrupted sensors."""
    return {
        name: results | {"rows": [row for row in results["rows"] if not row.get("corrupt")]}
        for name, results in models.items()
    }


def fullest(rows: Sequence[Row]) -> list[Row]:
    """Rows (one per seed) of the lowest drop probability, and there of the most modalities."""
    first = min(rows, key=lambda row: (row["drop_prob"], -len(row["modalities"])), default=None)
    return [] if first is None else rows_of(rows, first["modalities"], first["drop_prob"])


def fullest_name(models: Models) -> str:
    """What the :func:`fullest` rows of all models have in common."""
    whole = all(
        row["drop_prob"] == 0 and list(row["modalities"]) == list(results["summary"]["modalities"])
        for results in uncorrupted(models).values()
        for row in fullest(results["rows"])
    )
    return "everything present" if whole else "least missing"


def rows_of(
    rows: Sequence[Row], modalities: Sequence[str], probability: float, corrupt: str | None = None
) -> list[Row]:
    """One per seed."""
    wanted = (list(modalities), probability, corrupt)
    return [row for row in rows if (list(row["modalities"]), row["drop_prob"], row.get("corrupt") or None) == wanted]


def mean_point(name: str, rows: Sequence[Row], interval: Sequence[float] | None = None) -> Point:
    """Mean over seeds with its interval.

    Args:
        name: What is measured, for the point's title.
        rows: One per seed.
        interval: Of the mean; None: the row's own, where it is the only one (the mean of several has another).
    """
    value = metrics.average([row[METRIC] for row in rows])
    if value is None:
        return Point(None)
    ends = interval or (_ends(rows[0], METRIC) if len(rows) == 1 else None)
    if ends is None:
        return Point(value, title=f"{name}: {number(value)} %")
    low, high = ends
    return Point(value, low, high, f"{name}: {number(value)} % (95 % interval {number(low)} to {number(high)})")


def has_intervals(models: Models) -> bool:
    """Whether any row knows the interval of the figure that models are compared by."""
    return any(_ends(row, METRIC) for results in models.values() for row in results["rows"])


def interval_text(low: float | None, high: float | None) -> str:
    """`[41.2, 44.9]`, or nothing."""
    return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"


def lower_is_better(name: str) -> bool:
    """Whether a figure of a row is an error or a loss."""
    return "_ece" in name or "_loss" in name


def row_interval(row: Row, name: str) -> str:
    """The interval of one figure of a row as text, or nothing."""
    return interval_text(*(_ends(row, name) or (None, None)))


def clip_counts(rows: Mapping[str, Sequence[Row]]) -> str:
    """Clips behind a line; each number where models differ."""
    counts = dict.fromkeys(
        f"{row['num_clips']:,}" + (f" ({row['num_without']:,} without)" if row["num_without"] else "")
        for of in rows.values()
        for row in of
    )
    return " / ".join(counts)


def _ends(row: Row, name: str) -> tuple[float, float] | None:
    ends = row.get(name + _INTERVAL)
    return None if ends is None or None in ends else (ends[0], ends[1])


def clips_per_model(models: Models) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of the table of what each model was shown, and what the data itself lacks."""
    modalities = list(dict.fromkeys(m for results in models.values() for m in results["summary"]["modalities"]))
    columns = ["model", "clips", "unlabelled", "left out by noun", "unreadable", *(f"without {m}" for m in modalities)]
    lines = []
    for name, results in models.items():
        summary = results["summary"]
        counts = [summary[key] for key in ("num_clips", "num_unlabelled", "num_pruned", "num_damaged")]
        present = summary["num_present"]
        lacking = [f"{summary['num_clips'] - present[m]:,}" if m in present else "not used" for m in modalities]
        lines.append([name, *(f"{count:,}" for count in counts), *lacking])
    return columns, lines
