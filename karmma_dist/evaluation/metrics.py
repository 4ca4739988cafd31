"""The table of metrics, and the averages over figures.

    METRIC is one registration. Its figures are called SCORED_METRIC: `action_top1`, and of each head `verb_top1`.

A metric stands in `_OWN`, or another package registers it, and every result and report has it:

    [project.entry-points."karmma_dist.metrics"]
    top3 = "my_package:TOP3"            # TOP3 = Metric("top3", "top-3", right=top_k(3))

Metrics see ranks: a rank is the number of classes placed before the true one, 0 = right (see `scores.class_ranks`).
Counting is in integers, percentages are float64; a figure over no clips is None. Calibration compares a model's
confidence with how often it is right (Guo et al., On Calibration of Modern Neural Networks).

Legend: N clips that one condition can show, of the whole split or of a group.
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
"""Entry point group by which other packages register a `Metric`."""

ACTION = "action"
"""Name of what is scored beside the heads: the combination of classes (see `scores.ranked`)."""

GROUPS = ("tail", "unseen")
"""Groups of clips that have metrics of their own where their lists are known (see `groups`)."""

NUM_BINS = 15
"""Bins of equal width over [0, 1], as in the field."""

_NAME = re.compile(r"[a-z][a-z0-9_]*(?<!_ci)")


@dataclass(frozen=True)
class ClipScores:
    """The scores of N clips, of the action or of one head."""

    ranks_N: np.ndarray
    """Rank of the true class, int32, never negative."""
    truth_N: np.ndarray
    """True class, int64."""
    confidence_N: np.ndarray
    """Probability of the class named first, float32 in [0, 1]."""
    losses_N: np.ndarray | None = None
    """Cross-entropy in nats, float64; None: an action made of several heads has none of its own."""


Right = Callable[[np.ndarray], np.ndarray]
"""Marks the clips that count as right: ranks, int32 of any shape -> bool of that shape."""


@dataclass(frozen=True)
class Metric:
    """A way to score a model, on the action and on every head.

    Raises:
        UserError: the name is none, the group is unknown, not exactly one of `right` and `measure` is given, or an
            interval is asked for without `right` or of a group.
    """

    name: str
    """The end of its figures' names, such as `top1` of `action_top1`: small letters, digits, underscores."""
    heading: str
    """The words of a column after the action's or the head's name, such as `top-1`."""
    right: Right | None = None
    """Marks clips that are right, where the figure is their percentage; studies and intervals need it."""
    measure: Callable[[ClipScores], float | None] | None = None
    """Computes any other figure."""
    lower_is_better: bool = False
    """True if less is better."""
    has_interval: bool = False
    """True if every figure gets a bootstrap interval."""
    is_percent: bool = True
    """True if it is a percentage, which summaries average over subsets and drop probabilities."""
    heads_only: bool = False
    """True if an action made of several heads has no such figure."""
    group: str | None = None
    """One of `GROUPS`, of whose clips alone it is; None: of all clips."""
    in_validation: bool = True
    """True if a model in training is measured by it too."""
    terminal: Literal["all", "action", "none"] = "action"
    """Whose figures the table for a terminal shows."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(f"metric '{self.name}': a name is small letters, digits and underscores, without _ci")
        if (self.right is None) == (self.measure is None):
            raise UserError(f"metric '{self.name}': give either right or measure")
        if self.has_interval and not self.is_per_clip:
            raise UserError(f"metric '{self.name}': an interval draws clips, so it needs right, and no group")
        if self.group is not None and self.group not in GROUPS:
            raise UserError(f"metric '{self.name}': no group '{self.group}': there are {', '.join(GROUPS)}")

    @property
    def is_per_clip(self) -> bool:
        """True if it says of every clip whether it is right, so that it can be resampled and tested in pairs."""
        return self.right is not None and self.group is None

    def of(self, clips: ClipScores) -> float | None:
        """Return the figure of these clips; None: there are none."""
        if not len(clips.ranks_N):
            return None
        if self.right is not None:
            return 100.0 * int(self.right(clips.ranks_N).sum()) / len(clips.ranks_N)
        assert self.measure is not None
        return self.measure(clips)


@dataclass(frozen=True)
class Figure:
    """A metric of the action or of a head."""

    scored: str
    """`ACTION`, or the head's name."""
    metric: Metric

    @property
    def name(self) -> str:
        """The key in results.json."""
        return f"{self.scored}_{self.metric.name}"

    @property
    def heading(self) -> str:
        """The words that head a column, such as `action top-1`."""
        return f"{self.scored.replace('_', ' ')} {self.metric.heading}"


def top_k(k: int) -> Right:
    """Return what marks clips whose true class is among the first `k`; of no more than `k` classes all clips."""
    return lambda ranks: ranks < k


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, num_bins: int = NUM_BINS) -> float | None:
    """Return the expected calibration error in percent: |accuracy - mean confidence| per bin, weighted by its clips.

    Bin b of B holds the confidences in (b/B, (b+1)/B], the first also 0.

    Args:
        confidence_N: Probability of the class named first, in [0, 1].
        right_N: bool, True = it is the true one.
        num_bins: B.
    """
    if not len(confidence_N):
        return None
    confidence = confidence_N.astype(np.float64)
    bin_N = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    gap_B = np.bincount(bin_N, weights=right_N - confidence, minlength=num_bins)  # clips x (accuracy - confidence)
    return float(100.0 * np.abs(gap_B).sum() / len(confidence))


def mean_class_accuracy(ranks_N: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Return the top-1 percentage of each class that occurs, averaged over these classes."""
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
    """Return every metric by its name: this package's first, then those of other packages by their entries' names.

    Raises:
        UserError: an entry cannot be imported, is no `Metric`, or has a name that is taken.
    """
    return with_plugins({metric.name: metric for metric in _OWN}, ENTRY_POINTS, Metric)


def known_figure(name: str) -> Figure | None:
    """Return the figure of a key of results.json; None: it is none. Of metrics that fit, the longest name counts."""
    table = metric_table()
    fitting = [metric for metric in table if name.endswith(f"_{metric}") and len(name) > len(metric) + 1]
    if not fitting:
        return None
    longest = max(fitting, key=len)
    return Figure(name.removesuffix(f"_{longest}"), table[longest])


def find_figure(name: str) -> Figure:
    """Return the figure of a key of results.json.

    Raises:
        UserError: no metric of that name.
    """
    figure = known_figure(name)
    if figure is None:
        known = list(metric_table())
        hint = nearest(name, [f"{ACTION}_{metric}" for metric in known])
        raise UserError(f"no metric '{name}'{hint}: known are {', '.join(known)}, as {ACTION}_METRIC or HEAD_METRIC")
    return figure


def majority_share(labels_N: np.ndarray) -> float | None:
    """Return the percentage that is right when every clip is given the class most frequent among these clips."""
    return 100.0 * int(np.unique(labels_N, return_counts=True)[1].max()) / len(labels_N) if len(labels_N) else None


def average(values: Sequence[float | None]) -> float | None:
    """Return the mean of the figures that are known; None: none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known, dtype=np.float64)) if known else None


def relative_drop(full: float | None, value: float | None) -> float | None:
    """Return what `value` lost of `full`, as a percentage of `full`; negative where it gained."""
    return None if not full or value is None else 100.0 * (full - value) / full


def average_relative_drop(full: float | None, values: Sequence[float | None]) -> float | None:
    """Return the mean of :func:`relative_drop` over `values`, which do not include the full set's own."""
    return average([relative_drop(full, value) for value in values])


def curve_area(drop_probs: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Return the area under the drop curve by the trapezoid rule over its width: its mean height in percent."""
    if len(values) < 2 or any(value is None for value in values):
        return None
    return float(curve_areas(drop_probs, np.asarray([values], dtype=np.float64))[0])


def curve_areas(drop_probs: Sequence[float], heights_DP: np.ndarray) -> np.ndarray:
    """Return :func:`curve_area` of D curves with P points each, (D,); nan where a point is nan."""
    widths = np.diff(np.asarray(drop_probs, dtype=np.float64))
    areas: np.ndarray = (widths * (heights_DP[:, 1:] + heights_DP[:, :-1]) / 2).sum(axis=1) / widths.sum()
    return areas


def average_ranks(values: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Return the average place of each model over the columns that all of them have, 1 = best.

    Equal figures share the mean of their places: two best are both 1.5.
    """
    columns = [column for column in zip(*values.values(), strict=True) if None not in column]
    if not columns:
        return dict.fromkeys(values)
    table_RN = np.asarray(columns, dtype=np.float64)  # R columns, N models
    better_RN = (table_RN[:, None, :] > table_RN[:, :, None]).sum(axis=2)
    equal_RN = (table_RN[:, None, :] == table_RN[:, :, None]).sum(axis=2)
    places_N = (better_RN + (equal_RN + 1) / 2).mean(axis=0)
    return dict(zip(values, places_N.tolist(), strict=True))
