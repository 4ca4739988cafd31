"""What the measurements of `loader.py` come to: tables, ratios and the figures that are wanted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loaders import OURS
from loaders.work import Dropout

ALONE = "decoding alone"
DROPOUTS: dict[Dropout, str] = {
    "none": "everything present",
    "after": "dropout 0.5, decode all then drop",
    "before": "dropout 0.5, drop then decode",
}
MEMORY_EPOCHS = 20
RESUME_AT = 0.9


@dataclass(frozen=True)
class Arm:
    """One row of one table."""

    name: str
    dropout: Dropout
    num_workers: int


@dataclass
class Figures:
    """Milliseconds per clip of one arm, one entry per repeat."""

    cpu_ms: list[float] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """One ratio, and what it should be."""

    what: str
    values: list[float]
    """One per repeat."""
    limit: float | None = None
    at_most: bool = False
    """The limit is from above."""
    cheapest: float | None = None
    """The ratio of the cheapest runs: what other processes on the machine take can only be added to a cost."""

    def __str__(self) -> str:
        cheapest = "" if self.cheapest is None else f"cheapest runs {self.cheapest:.2f}"
        return f"    {self.what:78} {spread(self.values):18} {cheapest:19} {self._verdict()}".rstrip()

    def _verdict(self) -> str:
        if self.limit is None:
            return ""
        middle = statistics.median(self.values)
        reached = middle <= self.limit if self.at_most else middle >= self.limit
        return f"wanted at {'most' if self.at_most else 'least'} {self.limit}: {'reached' if reached else 'MISSED'}"


def cost_ratio(what: str, above: Figures, below: Figures, least: float | None) -> Ratio:
    """CPU cost of one arm over another's, repeat by repeat."""
    values = [a / b for a, b in zip(above.cpu_ms, below.cpu_ms, strict=True)]
    return Ratio(what, values, least, cheapest=min(above.cpu_ms) / min(below.cpu_ms))


def best_peer(figures: dict[Arm, Figures], dropout: Dropout, num_workers: int) -> Arm | None:
    """The peer with the least CPU per clip; None where no peer is installed."""
    peers = [arm for arm in figures if arm.name not in (ALONE, OURS)]
    peers = [arm for arm in peers if (arm.dropout, arm.num_workers) == (dropout, num_workers)]
    return min(peers, key=lambda arm: statistics.median(figures[arm].cpu_ms), default=None)


def speed_ratios(figures: dict[Arm, Figures], num_workers: int) -> list[Ratio]:
    """What is wanted of the loader with one number of workers."""
    present, dropping = Arm(OURS, "none", num_workers), Arm(OURS, "before", num_workers)
    alone = Arm(ALONE, "none", num_workers)
    rows = [cost_ratio(f"the loader against {ALONE}", figures[alone], figures[present], 0.95)]
    wanted: list[tuple[Dropout, Arm, float | None]] = [
        ("none", present, 1.0), ("after", dropping, 1.6), ("before", dropping, None)
    ]  # fmt: skip
    for dropout, ours, least in wanted:
        peer = best_peer(figures, dropout, num_workers)
        if peer is not None:
            what = f"against the best peer ({peer.name}), {DROPOUTS[dropout]}"
            rows.append(cost_ratio(what, figures[peer], figures[ours], least))
    return rows


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def print_speed(figures: dict[Arm, Figures], num_workers: int) -> None:
    """One table per number of workers."""
    where = "in process" if num_workers == 0 else f"{num_workers} workers"
    print(f"\n{where}: CPU ms per clip, median (min-max); wall ms per clip, median")
    for dropout, title in DROPOUTS.items():
        print(f"  {title}")
        for arm, found in figures.items():
            if (arm.dropout, arm.num_workers) == (dropout, num_workers):
                print(f"    {arm.name:20} {spread(found.cpu_ms):22} wall {statistics.median(found.wall_ms):6.2f}")


def print_report(
    figures: dict[Arm, Figures],
    resume: dict[tuple[str, int], dict[str, Any]],
    memory: list[list[float]],
    worker_counts: Sequence[int],
) -> None:
    """All tables."""
    for workers in worker_counts:
        print_speed(figures, workers)
        print("  ratios of CPU per clip, repeat by repeat (above 1: ours is cheaper)")
        print("\n".join(str(ratio) for ratio in speed_ratios(figures, workers)))
    print(f"\nfirst batch after resuming at {RESUME_AT:.0%} of an epoch over first batch at a fresh start, wall")
    for (name, workers), found in resume.items():
        over = [b / a for a, b in zip(found["fresh_s"], found["resumed_s"], strict=True)]
        fresh = statistics.median(found["fresh_s"])
        what = f"{name}, {workers} workers (fresh {1000 * fresh:.0f} ms)"
        print(Ratio(what, over, 1.2 if name == OURS else None, at_most=True))
    print(f"\nmemory of a worker after each of {MEMORY_EPOCHS} epochs, from the second on")
    for number, column in enumerate(zip(*memory[1:], strict=True)):
        what = f"worker {number}: {min(column):.0f}-{max(column):.0f} MiB PSS, largest over smallest"
        print(Ratio(what, [max(column) / min(column)], 1.05, at_most=True))
