"""Saving while training goes on: a snapshot in memory, a thread per rank that writes it, a name when all are there.

    main thread  | snapshot |   steps ...             | every part is there: position.json, rename, `latest`
    writer       |          | rank-0000R.safetensors, fsync, then rank-0000R.json

The writers meet through the files alone: a collective call from a second thread could run into the training's own. The
main rank looks for the others' notes after each step. A rank that cannot write (no space) notes that instead; the ranks
agree on it where they next exchange numbers (`failed`), and end with the same message, the checkpoints before it whole.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from karmma_dist.distributed.collectives import gather
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.files import remove, write_json, write_whole
from karmma_dist.recipe import Recipe
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint.checkpoint import checksum, complete, prune
from karmma_dist.training.engine import Engine

_WRITE_LIMIT_S = 1800.0
_CLOSE_LIMIT_S = 10.0
_LOOK_EVERY_S = 0.02


@dataclass
class _Pending:
    """A save that the ranks have not yet agreed to be whole."""

    partial: Path
    final: Path
    about: dict[str, Any]
    writer: threading.Thread
    is_complete: bool = False
    """It has its name; only the main rank knows."""


class Saver:
    """Writes a run's checkpoints.

    Args:
        recipe: the run.
        world: this rank.
        steps_per_epoch: optimizer steps.
        data: `checkpoint.data_state`.
    """

    def __init__(self, recipe: Recipe, world: World, steps_per_epoch: int, data: dict[str, Any]) -> None:
        self._recipe, self._world, self._steps_per_epoch, self._data = recipe, world, steps_per_epoch, data
        self._pending: _Pending | None = None
        self._error: str | None = None
        self._lost_s = 0.0
        self.total_s = 0.0
        """Seconds that training has waited for saving on this rank."""

    @property
    def failed(self) -> bool:
        """This rank could not write: `finish` must be called by every rank."""
        return self._error is not None

    def save(self, engine: Engine, done: int, averages: dict[str, list[float]], state: dict[str, Any]) -> None:
        """Begin to save the training state after `done` optimizer steps. Every rank must call this.

        Args:
            engine: the model and its optimizer.
            done: optimizer steps since the beginning; the folder is named after it.
            averages: this rank's running sums.
            state: what else is to be kept, the same on every rank, as JSON has it.

        Raises:
            UserError: this save cannot be begun, or the last one failed.
        """
        self.finish()
        began = time.perf_counter()
        parent = self._recipe.run_dir / "checkpoints"
        final = parent / f"step-{done:08d}"
        partial = parent / f".{final.name}.partial"
        self._agree(_prepare(partial) if self._world.is_main else None, partial)
        tensors, whole = engine.snapshot()
        position = Position(*divmod(done, self._steps_per_epoch))
        about = {
            "epoch": position.epoch, "step": position.step, "world_size": self._world.size,
            "zero_stage": self._recipe.training.zero_stage, "data": self._data, "engine": whole, "state": state,
        }  # fmt: skip
        writer = threading.Thread(target=self._write, args=(partial, tensors, averages), name="checkpoint writer")
        self._pending = _Pending(partial, final, about, writer)
        writer.start()
        self._lose(began)

    def look(self) -> None:
        """Complete the save that is under way where every rank has written. Not collective; cheap."""
        if self._pending is None or self._pending.is_complete or not self._world.is_main or self.failed:
            return
        began = time.perf_counter()
        if all(note is not None and "error" not in note for note in self._notes(self._pending)):
            self._complete(self._pending)
        self._lose(began)

    def finish(self) -> None:
        """Wait until the save that is under way has its name. Every rank must call this.

        Raises:
            UserError: it could not be written.
        """
        pending = self._pending
        if pending is None:
            return
        began = time.perf_counter()
        pending.writer.join()
        if not self._await(pending, _WRITE_LIMIT_S):
            self._error = f"not every rank had written its part after {_WRITE_LIMIT_S:.0f} s"
        self._agree(self._error, pending.partial)
        self.look()
        self._agree(self._error, pending.partial)
        self._pending = None
        self._lose(began)

    def close(self) -> None:
        """Let this rank's writer end, and complete the save if the others' have: for the end by an error."""
        if self._pending is not None:
            self._pending.writer.join()
            self._await(self._pending, _CLOSE_LIMIT_S)
            self.look()

    def take_seconds(self) -> float:
        """Seconds that training has waited for saving since the last call."""
        lost, self._lost_s = self._lost_s, 0.0
        return lost

    def _write(self, partial: Path, tensors: dict[str, Tensor], averages: dict[str, list[float]]) -> None:
        path = partial / f"rank-{self._world.rank:05d}.safetensors"
        note = path.with_suffix(".json")
        try:
            write_whole(path, lambda place: save_file(tensors, place))
            write_json(note, {**checksum(path), "averages": averages})
        except Exception as error:  # whatever it is, it must reach the main thread, and the others must not wait for it
            self._error = f"{path.name}: {_reason(error)}"
            path.unlink(missing_ok=True)  # makes room for the note
            try:
                write_json(note, {"error": self._error})
            except OSError as second:
                self._error += f" ({note.name}: {_reason(second)})"

    def _notes(self, pending: _Pending) -> list[dict[str, Any] | None]:
        """What each rank has noted so far."""
        return [_read(pending.partial / f"rank-{rank:05d}.json") for rank in range(self._world.size)]

    def _is_decided(self, pending: _Pending) -> bool:
        """Every rank has written, or one cannot; or the save has its name already."""
        notes = self._notes(pending)
        failed = self.failed or any(note is not None and "error" in note for note in notes)
        return failed or None not in notes or not pending.partial.exists()

    def _await(self, pending: _Pending, limit_s: float) -> bool:
        """Wait until it is decided; False: it was not in that time."""
        began = time.perf_counter()
        while not self._is_decided(pending):
            if time.perf_counter() - began > limit_s:
                return False
            time.sleep(_LOOK_EVERY_S)
        return True

    def _complete(self, pending: _Pending) -> None:
        files = {}
        try:
            for rank, note in enumerate(self._notes(pending)):
                assert note is not None
                name = f"rank-{rank:05d}"
                files[f"{name}.safetensors"] = {"bytes": note["bytes"], "crc32": note["crc32"]}
                files[f"{name}.json"] = checksum(pending.partial / f"{name}.json")
            complete(pending.partial, pending.final, self._recipe, pending.about, files)
            prune(self._recipe, pending.final, self._steps_per_epoch)
        except OSError as error:
            self._error = _reason(error)
            return
        pending.is_complete = True

    def _agree(self, error: str | None, partial: Path) -> None:
        """Raise on every rank where one has an error; the main rank removes what was begun."""
        errors = gather([error] if error else [])
        if not errors:
            return
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self._pending = None
        raise UserError(
            f"{partial.with_name(partial.name[1:].removesuffix('.partial'))}: cannot save: {'; '.join(errors)}: "
            "the checkpoints before it are whole: make room, then run the same command again to go on from there"
        )

    def _lose(self, began: float) -> None:
        seconds = time.perf_counter() - began
        self._lost_s += seconds
        self.total_s += seconds


def _prepare(partial: Path) -> str | None:
    """Remove what interrupted saves left, a link of such a name too, and make the folder; returns what went wrong."""
    try:
        for left in partial.parent.glob(".step-*.partial"):
            remove(left)
        partial.mkdir(parents=True)
    except OSError as error:
        return _reason(error)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """A note, or None while it is not there."""
    try:
        note: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return note


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
