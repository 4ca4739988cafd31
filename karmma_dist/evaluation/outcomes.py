"""Clip by clip what became of an evaluation: too much for results.json, needed for intervals and paired tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karmma_dist.evaluation.conditions import Condition


@dataclass(frozen=True)
class Outcomes:
    """The counted clips of one model under every condition. N clips, K conditions."""

    keys: list[str]
    """In ascending order."""
    conditions: list[Condition]
    """Columns of `ranks`."""
    ranks: dict[str, np.ndarray]
    """Rank of the true class, int32 (N, K), for "action" and per head; -1 = the clip has none of the modalities."""
