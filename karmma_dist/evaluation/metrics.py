"""Figures: from scores to ranks of the true class, from ranks to percentages, from percentages to averages.

A rank is the number of classes placed before the true one, 0 = right. Equal scores are ordered by class id, as argmax
does: a model that scores all classes alike says class 0 of every clip, and is right where that is true. (Epic-Kitchens
numbers its classes by frequency, so there it is as good as naming the most frequent one; the official evaluation sorts
in an order that leaves equal scores to the sorting algorithm, and equals this one where no scores do.) What is no
number comes before the true class, so it never helps. Counting is in integers, percentages are float64; a figure over
no clips is None.

Calibration compares a model's confidence with how often it is right (Guo et al., On Calibration of Modern Neural
Networks).

Legend: B clips, C classes, N clips of a whole split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

NUM_BINS = 15
"""Bins of equal width over [0, 1], as in the field."""


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray, num_bins: int = NUM_BINS) -> float | None:
    """Expected calibration error in percent: |accuracy - mean confidence| per bin, weighted by the bin's clips.

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


_JOINT_ELEMENTS = 2**23
"""Most pair scores held at once (64 MiB of float64)."""


def class_ranks(scores_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Rank of each clip's true class, int64 (B,); -1 where the label is -1, C where its score is NaN."""
    known_B = labels_B >= 0
    truth_B1 = labels_B.clamp(min=0).unsqueeze(1)
    true_score_B1 = scores_BC.gather(1, truth_B1)
    earlier_BC = torch.arange(scores_BC.shape[1], device=scores_BC.device) < truth_B1
    behind_BC = (scores_BC < true_score_B1) | ((scores_BC == true_score_B1) & ~earlier_BC)  # the true class too
    return (~behind_BC).sum(dim=1).masked_fill(~known_B, -1)


def joint_ranks(log_probs: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """Rank of the true combination of classes among all combinations, int64 (B,); -1 where any label is -1.

    With verb and noun this is Epic-Kitchens' action: all pairs of a clip, ranked by the product of the two
    softmaxes, that is by the sum of log-probabilities (the challenge's official definition).

    Args:
        log_probs: One float64 (B, C) per head.
        labels: One int64 (B,) per head.
    """
    sizes = [scores.shape[1] for scores in log_probs]
    chunk = max(1, _JOINT_ELEMENTS // int(np.prod(sizes)))
    ranks = []
    for first in range(0, len(labels[0]), chunk):
        rows = slice(first, first + chunk)
        joint_BP = log_probs[0][rows]
        for scores in log_probs[1:]:
            joint_BP = (joint_BP.unsqueeze(2) + scores[rows].unsqueeze(1)).flatten(1)  # (B, pairs so far x C)
        ranks.append(class_ranks(joint_BP, joint_labels([x[rows] for x in labels], sizes)))
    return torch.cat(ranks) if ranks else labels[0].new_empty(0)


def joint_labels(labels: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Number of each clip's combination among all combinations, last head fastest; -1 where any label is -1."""
    joint_B = labels[0]
    known_B = labels[0] >= 0
    for labels_B, size in zip(labels[1:], sizes[1:], strict=True):
        joint_B = joint_B * size + labels_B
        known_B = known_B & (labels_B >= 0)
    return joint_B.masked_fill(~known_B, -1)


def top_k(ranks_N: np.ndarray, k: int) -> float | None:
    """Percentage of clips whose true class is among the first `k`; of no more than `k` classes 100."""
    return 100.0 * int((ranks_N < k).sum()) / len(ranks_N) if len(ranks_N) else None


def mean_class_accuracy(ranks_N: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Top-1 percentage of each class that occurs, averaged over these classes."""
    if not len(ranks_N):
        return None
    _, index_N, num_C = np.unique(labels_N, return_inverse=True, return_counts=True)
    right_C = np.bincount(index_N[ranks_N == 0], minlength=len(num_C))
    return float(100.0 * np.mean(right_C / num_C, dtype=np.float64))


def majority_share(labels_N: np.ndarray) -> float | None:
    """Percentage that is right when every clip is given the class most frequent among these clips."""
    return 100.0 * int(np.unique(labels_N, return_counts=True)[1].max()) / len(labels_N) if len(labels_N) else None


def average(values: Sequence[float | None]) -> float | None:
    """Mean of the figures there are."""
    known = [value for value in values if value is not None]
    return float(np.mean(known, dtype=np.float64)) if known else None


def relative_drop(full: float | None, value: float | None) -> float | None:
    """What `value` lost of `full`, as a percentage of `full`; negative where it gained."""
    return None if not full or value is None else 100.0 * (full - value) / full


def average_relative_drop(full: float | None, values: Sequence[float | None]) -> float | None:
    """Mean of :func:`relative_drop` over `values`, which do not include the full set's own."""
    return average([relative_drop(full, value) for value in values])


def curve_area(drop_probs: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Area under the drop curve by the trapezoid rule, divided by its width: the curve's mean height in percent."""
    if len(values) < 2 or any(value is None for value in values):
        return None
    return float(curve_areas(drop_probs, np.asarray([values], dtype=np.float64))[0])


def curve_areas(drop_probs: Sequence[float], heights_DP: np.ndarray) -> np.ndarray:
    """Return :func:`curve_area` of D curves with P points each, (D,); nan where a point is nan."""
    widths = np.diff(np.asarray(drop_probs, dtype=np.float64))
    areas: np.ndarray = (widths * (heights_DP[:, 1:] + heights_DP[:, :-1]) / 2).sum(axis=1) / widths.sum()
    return areas


def average_ranks(values: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Average place of each model over the columns that all of them have, 1 = best.

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
