"""Training-time modality dropout: the modalities that each place of an epoch keeps, drawn before decoding.

The draw depends on (seed, epoch, place in the epoch's order) alone: it is the same for any number of ranks and workers,
and for teacher and student (paper, Sec. III-D and its diagram).
"""

from __future__ import annotations

import numpy as np

from karmma_dist.recipe import ModalityDropout
from karmma_dist.seeding import dropout_words

_TO_UNIT = 2.0**-64


def keep_patterns(num_places: int, num_modalities: int, dropout: ModalityDropout, seed: int, epoch: int) -> np.ndarray:
    """Draw keep_NM, bool, True = kept. A place may keep none: `keep_present` then keeps one.

    `stratified` gives each run of 2^M places evenly spread quantiles of the pattern distribution, shuffled (at
    probability 0.5: every pattern exactly once). The distribution of a single place is that of the independent draw,
    and batches cost about the same on every rank.
    """
    if dropout.probability == 0:
        return np.ones((num_places, num_modalities), dtype=bool)
    if dropout.draw == "independent":
        words = dropout_words(num_places * num_modalities, seed, epoch)
        kept: np.ndarray = words.reshape(num_places, num_modalities) * _TO_UNIT >= dropout.probability
        return kept
    num_patterns = 2**num_modalities
    num_blocks = -(-num_places // num_patterns)
    shuffle, jitter = dropout_words(2 * num_blocks * num_patterns, seed, epoch).reshape(2, num_blocks, -1)
    quantiles = (np.argsort(shuffle, axis=1, kind="stable") + jitter * _TO_UNIT) / num_patterns
    patterns = np.searchsorted(_cumulative(num_modalities, dropout.probability), quantiles.reshape(-1), side="right")
    return (patterns[:num_places, None] >> np.arange(num_modalities)) & 1 == 1


def keep_present(
    keep_M: np.ndarray, present_M: np.ndarray, word: int, needed_M: np.ndarray | None = None
) -> np.ndarray:
    """Return kept_M, bool, the modalities of a clip in its batch: those that are kept by the draw and present.

    Args:
        keep_M: bool, True = kept by the draw.
        present_M: bool, True = the clip has the modality.
        word: Random word that chooses a modality if the draw keeps none.
        needed_M: bool, True = one of the modalities of which each clip must bring at least one: those of the student,
            if it has fewer than its teacher. One of them is added if the draw keeps none of them. None means all.
    """
    kept: np.ndarray = keep_M & present_M
    needed_M = np.ones_like(present_M) if needed_M is None else needed_M
    candidates = np.flatnonzero(present_M & needed_M)
    if (kept & needed_M).any() or not len(candidates):
        return kept
    kept[candidates[word % len(candidates)]] = True
    return kept


def _cumulative(num_modalities: int, probability: float) -> np.ndarray:
    """Return the upper ends of the patterns' probability intervals, without the last (1.0).

    Modality m is kept if bit m of a pattern is set.
    """
    num_kept = np.array([pattern.bit_count() for pattern in range(2**num_modalities)])
    weights = (1 - probability) ** num_kept * probability ** (num_modalities - num_kept)
    return np.cumsum(weights)[:-1]
