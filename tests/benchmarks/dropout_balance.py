"""What a synchronous step loses to its slowest rank under modality dropout: drawn independently, and stratified.

    python tests/benchmarks/dropout_balance.py [--steps N]

Simulated: each rank's work is the sum over its clips of the kept modalities' GFLOPs in distillation (teacher forward,
student forward and backward as three forwards), every clip having video, flow and audio, drop probability 0.5. Prints
the mean over steps of the slowest rank's work over the ranks' mean. No time is measured: exact for any machine.
"""

from __future__ import annotations

import argparse

import numpy as np

from karmma_dist.recipe import ModalityDropout
from karmma_dist.seeding import fallback_words
from karmma_dist.streaming.dropout import keep_patterns

_SWIN_B, _SWIN_T, _AST_T = 562.7, 175.5, 4.1
WORK_M = np.array([_SWIN_B + 3 * _SWIN_T, _SWIN_B + 3 * _SWIN_T, _SWIN_B + 3 * _AST_T])
"""GFLOPs of a clip's video, flow and audio encoders: Swin-B teachers; Swin-T, Swin-T and AST-T students."""

SIZES = ((8, 8), (64, 6), (64, 8), (64, 16), (256, 8))
"""Ranks, clips per rank."""


def slowest_over_mean(num_ranks: int, clips_per_rank: int, draw: str, num_steps: int, seed: int = 0) -> float:
    """Mean over steps of the slowest rank's work over the mean of the step's ranks."""
    dropout = ModalityDropout.model_validate({"probability": 0.5, "draw": draw})
    num_places = num_steps * num_ranks * clips_per_rank
    kept_NM = keep_patterns(num_places, len(WORK_M), dropout, seed, epoch=0).copy()
    empty = np.flatnonzero(~kept_NM.any(axis=1))
    kept_NM[empty, fallback_words(num_places, seed, 0)[empty] % len(WORK_M)] = True
    work = (kept_NM @ WORK_M).reshape(num_steps, num_ranks, clips_per_rank).sum(axis=2)
    return float((work.max(axis=1) / work.mean(axis=1)).mean())


def main() -> None:
    """Print a row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    print(f"slowest rank over mean of ranks, {arguments.steps} steps")
    print(f"{'ranks x clips':>14} {'independent':>12} {'stratified':>11}")
    for num_ranks, clips in SIZES:
        drawn = [slowest_over_mean(num_ranks, clips, draw, arguments.steps) for draw in ("independent", "stratified")]
        print(f"{f'{num_ranks} x {clips}':>14} {drawn[0]:12.3f} {drawn[1]:11.3f}")


if __name__ == "__main__":
    main()
