"""How far a model's confidence is from how often it is right (Guo et al., On Calibration of Modern Neural Networks)."""

from __future__ import annotations

import numpy as np

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
