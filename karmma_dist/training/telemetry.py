"""What a run tells about itself: metrics.jsonl, TensorBoard events, damage.jsonl and its state."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.shards import write_json
from karmma_dist.streaming.batch import Batch

STATE = "state.json"


class RunLog:
    """Writes a run's metrics; only the main rank has one.

    On resuming at optimizer step `resumed`, lines of later steps are removed: they will be written again.
    """

    def __init__(self, run_dir: Path, resumed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= resumed]
            self.path.write_text("".join(line + "\n" for line in kept if resumed))
        self._events = SummaryWriter(str(run_dir), purge_step=resumed + 1)

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append one line `{"kind", "step", "epoch", ...values}`; `step` counts finished optimizer steps."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._events.close()


def _step_of(line: str) -> int:
    """The step of a metrics line; a line cut by a crash counts as later than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 2**62


def write_state(run_dir: Path, state: str, **values: Any) -> None:
    """Write state.json: `running`, `finished`, `interrupted` or `failed`, with the time and what else is known."""
    write_json(run_dir / STATE, {"state": state, "time": time.time(), **values})


def read_state(run_dir: Path) -> dict[str, Any]:
    """state.json of a run folder, or an empty dictionary where there is none."""
    try:
        state: dict[str, Any] = json.loads((run_dir / STATE).read_text())
    except (OSError, ValueError):
        return {}
    return state


class DamageLog:
    """Counts damaged clips, writes each to damage.jsonl, and ends the run when there are too many."""

    def __init__(self, run_dir: Path, num_clips: int, max_fraction: float) -> None:
        self._path = run_dir / "damage.jsonl"
        self._allowed = int(max_fraction * num_clips)
        self._num_clips = num_clips
        self._seen: dict[str, str] = {}

    def add(self, batch: Batch) -> None:
        """Take in a batch's damage.

        Raises:
            UserError: more distinct clips are damaged than the recipe allows.
        """
        for damage in batch.damage:
            if damage.key not in self._seen:
                self._seen[damage.key] = f"{damage.shard}: {damage.member}: {damage.what}"
                with open(self._path, "a") as file:
                    file.write(json.dumps({"epoch": batch.epoch, "step": batch.step, **asdict(damage)}) + "\n")
        if len(self._seen) > self._allowed:
            raise UserError(
                f"{len(self._seen)} of {self._num_clips} clips are damaged, data.max_damaged_fraction allows "
                f"{self._allowed}: {'; '.join(list(self._seen.values())[:5])} (all in {self._path})"
            )


class Averages:
    """Running means of what was measured, kept on the device so that no step waits for them."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[Any, int]] = {}

    def add(self, values: dict[str, Any]) -> None:
        """Add one measurement of each name: floats or 0-d tensors."""
        for name, value in values.items():
            total, count = self._values.get(name, (0, 0))
            self._values[name] = (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means since the last call, as floats."""
        means = {name: float(total) / count for name, (total, count) in self._values.items()}
        self._values = {}
        return means
