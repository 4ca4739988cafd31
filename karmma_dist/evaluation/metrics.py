"""The table of metrics, and averages over their figures.

Each metric gives a figure for the action and one for every head, named SCORED_METRIC: `action_top1`, `verb_top1`. A
metric is listed in `_OWN` or registered by another package; all results and reports then include it:

    [project.entry-points."karmma_dist.metrics"]
    top3 = "my_package:TOP3"            # TOP3 = Metric("top3", "top-3", right=top_k(3))

Metrics are computed from ranks. A rank is the number of classes placed before the true one, 0 = right (see
`scores.class_ranks`). Counts are integers and percentages float64; a figure over zero clips is None. The calibration
error compares a model's confidence with its accuracy (Guo et al., On Calibration of Modern Neural Networks).

Legend: N clips that can be shown under one condition, from the whole split or from a group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from karmma_dist.errors import UserError, nearest
from karmma_dist.plugins import with_plugins

ENTRY_POINTS = "karmma_dist.metrics"
"""Entry point group in which other packages register a `Metric`."""

ACTION = "action"
"""Name under which the combination of the heads' classes is scored (see `ranked`)."""

GROUPS = ("tail", "unseen")
"""Groups of clips that have their own metrics if their lists are known (see `groups`)."""

NUM_BINS = 15
"""Number of confidence bins of equal width over [0, 1]; 15 is the usual choice."""

_NAME = re.compile(r"[a-z][a-z0-9_]*(?<!_ci)")


def ranked(heads: Sequence[str]) -> dict[str, list[str]]:
    """Return the heads that make up each scored name: first "action", then every other head.

    The action is verb x noun if the model has both heads, else the head "action" if it exists, else all heads together.
    """
    if "verb" in heads and "noun" in heads:
        action = ["verb", "noun"]
    else:
        action = [ACTION] if ACTION in heads else list(heads)
    return {ACTION: action} | {head: [head] for head in heads if head != ACTION}


@dataclass(frozen=True)
class ClipScores:
    """The scores of N clips, for the action or for one head."""

    ranks_N: np.ndarray
    """Rank of the true class, int32, never negative."""
    truth_N: np.ndarray
    """True class, int64."""
    confidence_N: np.ndarray
    """Probability of the predicted class, float32 in [0, 1]."""
    losses_N: np.ndarray | None = None
    """Cross-entropy in nats, float64; None for an action made of several heads."""


Right = Callable[[np.ndarray], np.ndarray]
"""Function that marks the clips that count as right: ranks, int32 of any shape -> bool of that shape."""


@dataclass(frozen=True)
class Metric:
    """A way to score a model, for the action and for every head.

    Raises:
        UserError: the name is invalid, the group is unknown, `right` and `measure` are both given or both missing, or
            `has_interval` is set for a metric without `right` or for a group.
    """

    name: str
    """Last part of its figures' names, such as `top1` in `action_top1`: lower-case letters, digits, underscores."""
    heading: str
    """Column heading after the name of the action or head, such as `top-1`."""
    right: Right | None = None
    """Function that marks the right clips, for a figure that is their percentage. Studies and intervals need it."""
    measure: Callable[[ClipScores], float | None] | None = None
    """Function that computes any other figure."""
    lower_is_better: bool = False
    """True if a lower figure is better."""
    has_interval: bool = False
    """True if every figure gets a bootstrap interval."""
    is_percent: bool = True
    """True if the figure is a percentage, which summaries average over subsets and drop probabilities."""
    heads_only: bool = False
    """True if an action made of several heads has no such figure."""
    group: str | None = None
    """Group of clips, one of `GROUPS`, to which the metric is restricted; None: all clips."""
    in_validation: bool = True
    """True if validation during training reports the metric too."""
    terminal: Literal["all", "action", "none"] = "action"
    """Figures that the table in the terminal shows: those of the action and all heads, of the action, or none."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"metric '{self.name}': use lower-case letters, digits and underscores in the name, and no final _ci"
            )
        if (self.right is None) == (self.measure is None):
            raise UserError(f"metric '{self.name}': give either right or measure")
        if self.has_interval and not self.is_per_clip:
            raise UserError(f"metric '{self.name}': has_interval resamples all clips: set right, and leave out group")
        if self.group is not None and self.group not in GROUPS:
            raise UserError(f"metric '{self.name}': unknown group '{self.group}': choose from {', '.join(GROUPS)}")

    @property
    def is_per_clip(self) -> bool:
        """True if every clip is right or wrong under the metric, so that it can be resampled and tested in pairs."""
        return self.right is not None and self.group is None

    def of(self, clips: ClipScores) -> float | None:
        """Return the figure over some clips, or None for zero clips."""
        if not len(clips.ranks_N):
            return None
        if self.right is not None:
            return 100.0 * int(self.right(clips.ranks_N).sum()) / len(clips.ranks_N)
        assert self.measure is not None
        return self.measure(clips)


@dataclass(frozen=True)
class Figure:
    """A metric applied to the action or to a head."""

    scored: str
    """`ACTION`, or the name of the head."""
    metric: Metric

    @property
    def name(self) -> str:
        """The key in results.json."""
        return f"{self.scored}_{self.metric.name}"

    @property
    def heading(self) -> str:
        """The heading of a column, such as `action top-1`."""
        return f"{self.scored.replace('_', ' ')} {self.metric.heading}"


def top_k(k: int) -> Right:
    """Return a function that marks clips whose true class is among the first `k`: all clips if C <= `k`."""
    return lambda ranks: ranks < k


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, num_bins: int = NUM_BINS) -> float | None:
    """Return the expected calibration error in percent: |accuracy - mean confidence| per bin, weighted by its clips.

    Bin b of B holds the confidences in (b/B, (b+1)/B]; the first bin also holds 0.

    Args:
        confidence_N: Probability of the predicted class, in [0, 1].
        right_N: bool, True = the predicted class is the true one.
        num_bins: Number of bins B.
    """
    if not len(confidence_N):
        return None
    confidence = confidence_N.astype(np.float64)
    bin_N = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gap_B = np.bincount(bin_N, weights=right_N - confidence, minlength=num_bins)  # clips x (accuracy - confidence)
    return float(100.0 * np.abs(gap_B).sum() / len(confidence))


def mean_class_accuracy(ranks_N: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Return top-1 in percent, computed per class and averaged over the classes that occur (macro average)."""
    if not len(ranks_N):
        return None
    _, index_N, num_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    right_C = np.bincount(index_N[ranks_N == 0], minlength=len(num_C))
    return float(100.0 * np.mean(right_C / num_C, dtype=np.float64))


def _mean_loss(clips: ClipScores) -> float | None:
    return None if clips.losses_N is None else float(clips.losses_N.mean())


_OWN = (
    Metric("top1", "top-1", right=top_k(1), has_interval=True, terminal="all"),
    Metric("top5", "top-5", right=top_k(5)),
    Metric(
        "mean_class", "per class", measure=lambda clips: mean_class_accuracy(clips.ranks_N, clips.truth_N),
        in_validation=False, terminal="none",
    ),
    Metric(
        "ece", "calibration error", measure=lambda clips: calibration_error(clips.confidence_N, clips.ranks_N == 0),
        lower_is_better=True, in_validation=False, terminal="none",
    ),
    Metric(
        "loss", "loss (nats)", measure=_mean_loss, lower_is_better=True, is_percent=False, heads_only=True,
        terminal="none",
    ),
    Metric(
        "top1_tail", "top-1, tail classes", right=top_k(1), group="tail", in_validation=False, terminal="none"
    ),
    Metric(
        "top1_unseen", "top-1, unseen participants", right=top_k(1), group="unseen", in_validation=False,
        terminal="none",
    ),
)  # fmt: skip


@cache
def metric_table() -> Mapping[str, Metric]:
    """Return every metric by name: first this package's, then those of other packages in the order of their names.

    Raises:
        UserError: an entry cannot be imported, is not a `Metric`, or has a name that is already taken.
    """
    return with_plugins({metric.name: metric for metric in _OWN}, ENTRY_POINTS, Metric)


def known_figure(name: str) -> Figure | None:
    """Return the figure that a key of results.json names, or None. If several metrics fit, the longest name wins."""
    table = metric_table()
    fitting = [metric for metric in table if name.endswith(f"_{metric}") and len(name) > len(metric) + 1]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return Figure(name.removesuffix(f"_{longest}"), table[longest])


def find_figure(name: str) -> Figure:
    """Return the figure of a key of results.json.

    Raises:
        UserError: the name fits no metric.
    """
    figure = known_figure(name)
    if figure is None:
        known = list(metric_table())
        hint = nearest(name, [f"{ACTION}_{metric}" for metric in known])
        raise UserError(f"no metric '{name}'{hint}: known are {', '.join(known)}, as {ACTION}_METRIC or HEAD_METRIC")
    return figure


def majority_share(labels_N: np.ndarray) -> float | None:
    """Return the accuracy in percent of always predicting the class that is most frequent among these clips."""
    return 100.0 * int(np.unique(labels_N, return_counts=True)[1].max()) / len(labels_N) if len(labels_N) else None


def average(values: Sequence[float | None]) -> float | None:
    """Return the mean of the known figures, or None if all are None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known, dtype=np.float64)) if known else None


def relative_drop(full: float | None, value: float | None) -> float | None:
    """Return the loss from `full` to `value` as a percentage of `full`; negative for a gain."""
    return None if not full or value is None else 100.0 * (full - value) / full


def average_relative_drop(full: float | None, values: Sequence[float | None]) -> float | None:
    """Return the mean of :func:`relative_drop` over `values`, which exclude the value of the full set."""
    return average([relative_drop(full, value) for value in values])


def curve_area(drop_probs: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Return the mean height of the drop curve in percent: its area by the trapezoid rule, divided by its width."""
    if len(values) < 2 or any(value is None for value in values):
        return None
    return float(curve_areas(drop_probs, np.asarray([values], dtype=np.float64))[0])


def curve_areas(drop_probs: Sequence[float], heights_DP: np.ndarray) -> np.ndarray:
    """Return the :func:`curve_area` of D curves with P points each, (D,); nan if any point of the curve is nan."""
    widths = np.diff(np.asarray(drop_probs, dtype=np.float64))
    areas: np.ndarray = (widths * (heights_DP[:, 1:] + heights_DP[:, :-1]) / 2).sum(axis=1) / widths.sum()
    return areas


def average_ranks(values: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Return the average rank of each model over the columns that all models have, 1 = best.

    Equal figures share the mean of their ranks: two models that tie for the best have rank 1.5 each.
    """
    columns = [column for column in zip(*values.values(), strict=True) if None not in column]
    if not columns:
        return dict.fromkeys(values)
    table_RN = np.asarray(columns, dtype=np.float64)  # R columns, N models
    better_RN = (table_RN[:, None, :] > table_RN[:, :, None]).sum(axis=2)
    equal_RN = (table_RN[:, None, :] == table_RN[:, :, None]).sum(axis=2)
    places_N = (better_RN + (equal_RN + 1) / 2).mean(axis=0)
    return dict(zip(values, places_N.tolist(), strict=True))
