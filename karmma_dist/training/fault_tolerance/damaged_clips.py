"""Damaged clips of a run: collects them from all ranks in damage.jsonl, and ends the run if they are too many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.io.files import append_whole, json_text, read_file
from karmma_dist.io.json_fields import JsonObject
from karmma_dist.streaming.batch import Batch

_TEXTS = ("shard", "key", "member", "what")
"""Fields of an event that messages show."""


class DamageLog:
    """The damaged clips of all ranks: each is written to damage.jsonl once, and too many end the run on every rank.

    Each rank notes the damage in its batches. From time to time the ranks share their notes: each calls `take`, and
    then `share` with the notes of all ranks. So every rank knows every damaged clip, and all stop at the same step.
    """

    def __init__(self, run_dir: Path, num_clips: int, max_fraction: float, rank: int = 0) -> None:
        self._path = run_dir / "damage.jsonl"
        self._num_clips, self._allowed, self._rank = num_clips, int(max_fraction * num_clips), rank
        self._known: dict[str, dict[str, Any]] = {}
        self._noted: dict[str, dict[str, Any]] = {}

    @property
    def num_noted(self) -> int:
        """Number of clips noted but not yet shared."""
        return len(self._noted)

    @property
    def num_damaged(self) -> int:
        """Number of distinct damaged clips known to all ranks."""
        return len(self._known)

    def note(self, batch: Batch) -> None:
        """Note the damaged clips of a batch."""
        for damage in batch.damage:
            if damage.key not in self._known:
                event = {"epoch": batch.epoch, "step": batch.step, "rank": self._rank, **asdict(damage)}
                self._noted.setdefault(damage.key, event)

    def take(self) -> list[dict[str, Any]]:
        """Return this rank's notes and forget them."""
        events, self._noted = list(self._noted.values()), {}
        return events

    def share(self, events: Iterable[dict[str, Any]]) -> None:
        """Add the notes of all ranks, which must be equal on every rank; the main rank writes them.

        Raises:
            UserError: more clips are damaged than the recipe allows.
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
        """Write this rank's notes without sharing them, because the run ends."""
        self._write(self.take())

    def written(self) -> list[dict[str, Any]]:
        """Return the events in damage.jsonl; a line truncated by a crash is ignored.

        Raises:
            OSError: the file cannot be read.
        """
        events = []
        with contextlib.suppress(FileNotFoundError):
            for line in read_file(self._path).split(b"\n"):
                with contextlib.suppress(ValueError):
                    fields = JsonObject.parse(line)
                    events.append({**fields.unchecked(), **{name: fields.text(name) for name in _TEXTS}})
        return events

    def remember(self, events: Iterable[dict[str, Any]]) -> None:
        """Add events that were written before this run was resumed."""
        self._learn(events)

    def _learn(self, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add events, and return the new ones."""
        new = []
        for event in events:
            if event["key"] not in self._known:
                self._known[event["key"]] = event
                new.append(event)
        return new

    def _write(self, events: Iterable[dict[str, Any]]) -> None:
        text = "".join(json_text(event) + "\n" for event in events)
        if text:
            append_whole(self._path, text.encode())
