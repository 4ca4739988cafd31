"""How well orders local to a few shards mix, and what they spare: every pair of lanes and window against the default.

    python tests/benchmarks/order_mixing.py [--clips N] [--shard-clips N] [--batch-size B] [--epochs E]

One node per lane. Columns:
    meet again      chance that two clips of one batch share one in the next epoch, over that of a random order
    shards/batch    distinct shards in a global batch
    shards/node     shards a node reads in an epoch, as a share of all
    held            most shards a node has between their first and last use at once: what its cache must hold
    ms              time to compute the epoch's order
Means over epochs, of `held` the largest. Nothing is read: the figures are exact for any machine, except the time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np

from karmma_dist.streaming.order import ClipOrder


@dataclass
class Figures:
    """One epoch's figures."""

    shards_per_batch: float
    shard_share_per_node: float
    held: int


def pairs(counts: np.ndarray) -> int:
    """Unordered pairs within groups of these sizes."""
    return int((counts * (counts - 1) // 2).sum())


def batch_of_clip(order: ClipOrder, epoch: int) -> np.ndarray:
    """The step that takes each clip, -1 where none does."""
    taken = order.steps * order.batch_size
    batches = np.full(order.num_clips, -1)
    batches[order.clips(epoch)[:taken]] = np.arange(taken) // order.batch_size
    return batches


def meeting_again(order: ClipOrder, epoch: int) -> float:
    """Share of the pairs of one epoch's batches that meet in a batch of the next, over (B - 1) / (n - 1)."""
    this, following = batch_of_clip(order, epoch), batch_of_clip(order, epoch + 1)
    both = (this >= 0) & (following >= 0)
    again = pairs(np.unique(this[both] * order.steps + following[both], return_counts=True)[1])
    share = again / (order.steps * pairs(np.array([order.batch_size])))
    return share / ((order.batch_size - 1) / (order.num_clips - 1))


def most_held(shards_SP: np.ndarray, num_shards: int) -> int:
    """Most shards between first and last use at once, of a node that reads `shards_SP` (steps, its places)."""
    steps = np.broadcast_to(np.arange(len(shards_SP))[:, None], shards_SP.shape)
    first, last = np.full(num_shards, len(shards_SP)), np.full(num_shards, -1)
    np.minimum.at(first, shards_SP, steps)
    np.maximum.at(last, shards_SP, steps)
    used = last >= 0
    change = np.zeros(len(shards_SP) + 1, dtype=np.int64)
    np.add.at(change, first[used], 1)
    np.add.at(change, last[used] + 1, -1)
    return int(change.cumsum().max())


def measure(order: ClipOrder, shard_of_clip: np.ndarray, epoch: int, nodes: int) -> Figures:
    """The figures of one epoch."""
    num_shards = int(shard_of_clip.max()) + 1
    taken = order.clips(epoch)[: order.steps * order.batch_size]
    shards_SB = shard_of_clip[taken].reshape(order.steps, order.batch_size)
    per_node = np.split(shards_SB, nodes, axis=1)
    return Figures(
        shards_per_batch=statistics.mean(len(set(row)) for row in shards_SB.tolist()),
        shard_share_per_node=statistics.mean(len(np.unique(part)) / num_shards for part in per_node),
        held=max(most_held(part, num_shards) for part in per_node),
    )


def main() -> None:
    """Print a row per pair of lanes and window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=67_217, help="default: Epic-Kitchens-100's training split")
    parser.add_argument("--shard-clips", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    shard_of_clip = np.arange(arguments.clips) // arguments.shard_clips
    names = [str(shard) for shard in shard_of_clip]
    num_shards = int(shard_of_clip[-1]) + 1
    print(f"{arguments.clips} clips in {num_shards} shards, batches of {arguments.batch_size}")
    print(f"{'lanes':>7} {'window':>7} {'nodes':>6} {'meet again':>11} {'shards/batch':>13} {'shards/node':>12} "
          f"{'held':>6} {'ms':>6}")  # fmt: skip
    rows = [(0, 0, nodes) for nodes in (1, 4, 16)]
    rows += [(lanes, window, lanes) for lanes in (1, 4, 16) for window in (1, 4, 16, num_shards)]
    for lanes, window, nodes in rows:
        order = ClipOrder(names, arguments.batch_size, seed=0, lanes=lanes, window=window)
        started = time.perf_counter()
        order.clips(0)
        taken_ms = 1000 * (time.perf_counter() - started)
        again = statistics.mean(meeting_again(order, epoch) for epoch in range(arguments.epochs))
        figures = [measure(order, shard_of_clip, epoch, nodes) for epoch in range(arguments.epochs)]
        print(
            f"{lanes:7d} {'all' if window == num_shards else window:>7} {nodes:6d} {again:11.2f} "
            f"{statistics.mean(f.shards_per_batch for f in figures):13.1f} "
            f"{100 * statistics.mean(f.shard_share_per_node for f in figures):11.1f}% "
            f"{max(f.held for f in figures):6d} {taken_ms:6.0f}"
        )


if __name__ == "__main__":
    main()
