"""What a run tells about itself: metrics.jsonl, TensorBoard events, damage.jsonl and its state."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Sequence
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
    """Damaged clips of all ranks: each is written to damage.jsonl once, and too many end the run on every rank.

    A rank notes what its batches met; now and then the ranks share their notes (`take`, then `share` what all of them
    took). So every rank knows every damaged clip, and all stop at the same step.
    """

    def __init__(self, run_dir: Path, num_clips: int, max_fraction: float, rank: int = 0) -> None:
        self._path = run_dir / "damage.jsonl"
        self._num_clips, self._allowed, self._rank = num_clips, int(max_fraction * num_clips), rank
        self._known: dict[str, dict[str, Any]] = {}
        self._noted: dict[str, dict[str, Any]] = {}

    @property
    def num_noted(self) -> int:
        """Clips noted and not yet shared."""
        return len(self._noted)

    @property
    def num_damaged(self) -> int:
        """Different damaged clips that all ranks know of."""
        return len(self._known)

    def note(self, batch: Batch) -> None:
        """Note a batch's damage."""
        for damage in batch.damage:
            if damage.key not in self._known:
                event = {"epoch": batch.epoch, "step": batch.step, "rank": self._rank, **asdict(damage)}
                self._noted.setdefault(damage.key, event)

    def take(self) -> list[dict[str, Any]]:
        """This rank's notes, which are then no longer its own."""
        events, self._noted = list(self._noted.values()), {}
        return events

    def share(self, events: Iterable[dict[str, Any]]) -> None:
        """Take in the notes of all ranks, equal on every rank; the main rank writes them.

        Raises:
            UserError: more different clips are damaged than the recipe allows.
        """
        new = self._learn(events)
        if self._rank == 0:
            self._write(new)
        if len(self._known) > self._allowed:
            shown = [f"{event['shard']}: {event['member']}: {event['what']}" for event in self._known.values()]
            raise UserError(
                f"{len(shown)} of {self._num_clips} clips are damaged, data.max_damaged_fraction allows "
                f"{self._allowed}: {'; '.join(shown[:5])} (all in {self._path})"
            )

    def flush(self) -> None:
        """Write this rank's notes as they are: the run ends before they can be shared."""
        self._write(self.take())

    def written(self) -> list[dict[str, Any]]:
        """What damage.jsonl says; a line that a crash cut is left out."""
        events = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            with contextlib.suppress(ValueError):
                events.append(json.loads(line))
        return events

    def remember(self, events: Iterable[dict[str, Any]]) -> None:
        """Know of clips that were written before this run was resumed."""
        self._learn(events)

    def _learn(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Know of events; returns those that were new."""
        new = []
        for event in events:
            if event["key"] not in self._known:
                self._known[event["key"]] = event
                new.append(event)
        return new

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(event) + "\n" for event in events)
        if text:
            with open(self._path, "a") as file:
                file.write(text)


def loading_sums(batch: Batch, modalities: Sequence[str]) -> dict[str, float]:
    """What a batch's loading adds to the averages: the same names on every rank and for every batch."""
    stats = batch.stats
    sums = {"read_s": stats.read_s, "bytes_read": float(stats.bytes_read), "queue_depth": float(stats.queue_depth)}
    for modality in modalities:
        sums[f"decode_s/{modality}"] = stats.decode_s.get(modality, 0.0)
        sums[f"decoded/{modality}"] = float(stats.clips_decoded.get(modality, 0))
    return sums


def loading_metrics(means: dict[str, float], modalities: Sequence[str]) -> dict[str, float]:
    """Take the means of `loading_sums` out of `means`; returns what they say.

    `decode_ms_MODALITY` is per clip decoded and worker, `read_mb_per_s` what one worker gets while it reads (0 where
    nothing was), and `queue_depth` the batches that lay ready when one was asked for.
    """
    read_s, read_mb = means.pop("read_s"), means.pop("bytes_read") / 1e6
    found = {"read_mb_per_s": read_mb / read_s if read_s else 0.0, "queue_depth": means.pop("queue_depth")}
    for modality in modalities:
        seconds, clips = means.pop(f"decode_s/{modality}"), means.pop(f"decoded/{modality}")
        found[f"decode_ms_{modality}"] = 1000 * seconds / clips if clips else 0.0
    return found


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
