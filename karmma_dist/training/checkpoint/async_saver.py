"""Asynchronous checkpoints: each rank snapshots its state in memory, and a thread writes it while training continues.

    main thread  | snapshot |   steps ...             | every rank has written: position.json, rename, `latest`
    writer       |          | rank-0000R.safetensors, fsync, then rank-0000R.json

The writers communicate through files only: a collective call from a second thread could interleave with the calls of
the training itself. After each step the main rank polls for the JSON notes of the other ranks. A rank that cannot write
(no space left) writes an error into its note. The ranks learn of it when they next exchange metrics (`failed`), and all
end with the same message; earlier checkpoints stay intact.
"""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from karmma_dist.distributed.collectives import gather, raise_on_all
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.disk_errors import make_folder
from karmma_dist.io.files import remove, write_json, write_whole
from karmma_dist.io.json_fields import JsonObject, read_json
from karmma_dist.models.model_card import find_nonfinite
from karmma_dist.recipe import Recipe
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint.checkpoint import checksum, complete, prune, versions
from karmma_dist.training.checkpoint.record import CheckpointRecord, FileSum, rank_files, step_folder
from karmma_dist.training.checkpoint.zero_state import is_buffer
from karmma_dist.training.engine import Engine

_WRITE_LIMIT_S = 1800.0
_CLOSE_LIMIT_S = 10.0
_POLL_EVERY_S = 0.02


@dataclass
class _Pending:
    """A save that the ranks have not yet confirmed as complete."""

    partial: Path
    final: Path
    record: CheckpointRecord
    writer: threading.Thread
    is_complete: bool = False
    """True if the folder has its final name; only set on the main rank."""


class AsyncSaver:
    """The writer of a run's checkpoints.

    Args:
        recipe: the run's recipe.
        world: this rank.
        steps_per_epoch: optimizer steps per epoch.
        data: what `checkpoint.data_state` returns.
    """

    def __init__(self, recipe: Recipe, world: World, steps_per_epoch: int, data: dict[str, Any]) -> None:
        self._recipe, self._world, self._steps_per_epoch, self._data = recipe, world, steps_per_epoch, data
        self._pending: _Pending | None = None
        self._error: str | None = None
        self._lost_s = 0.0
        self.total_s = 0.0
        """Total seconds that training has waited for saving on this rank."""

    @property
    def failed(self) -> bool:
        """True if this rank could not write; every rank must then call `finish`."""
        return self._error is not None

    def save(self, engine: Engine, done: int, averages: dict[str, list[float]], state: dict[str, Any]) -> None:
        """Start saving the training state after `done` optimizer steps. Every rank must call this.

        Args:
            engine: the model and its optimizer.
            done: optimizer steps since the beginning of the run, which name the folder.
            averages: this rank's running sums.
            state: further JSON values to save, equal on every rank.

        Raises:
            UserError: this save cannot be started, the state is not finite, or the last save failed.
        """
        self.finish()
        began = time.perf_counter()
        parent = self._recipe.run_dir / "checkpoints"
        final = parent / step_folder(done)
        partial = parent / f".{final.name}.partial"
        tensors, engine_state = engine.snapshot()
        self._refuse_diverged(tensors, final)
        self._agree(_prepare(partial) if self._world.is_main else None, partial)
        position = Position(*divmod(done, self._steps_per_epoch))
        record = CheckpointRecord(
            position, done, self._world.size, self._recipe.training.zero_stage, self._data, engine_state, state,
            versions(), {},
        )  # fmt: skip
        writer = threading.Thread(target=self._write, args=(partial, tensors, averages), name="checkpoint writer")
        self._pending = _Pending(partial, final, record, writer)
        writer.start()
        self._count_wait(began)

    def poll(self) -> None:
        """Complete the pending save if every rank has written. Cheap, and not collective."""
        if self._pending is None or self._pending.is_complete or not self._world.is_main or self.failed:
            return
        began = time.perf_counter()
        if all(note is not None and "error" not in note for note in self._notes(self._pending)):
            self._complete(self._pending)
        self._count_wait(began)

    def finish(self) -> None:
        """Wait until the pending save has its final name. Every rank must call this.

        Raises:
            UserError: the checkpoint could not be written.
        """
        pending = self._pending
        if pending is None:
            return
        began = time.perf_counter()
        pending.writer.join()
        if not self._await(pending, _WRITE_LIMIT_S):
            self._error = f"not every rank had written its part after {_WRITE_LIMIT_S:.0f} s"
        self._agree(self._error, pending.partial)
        self.poll()
        self._agree(self._error, pending.partial)
        self._pending = None
        self._count_wait(began)

    def close(self) -> None:
        """Wait for this rank's writer, and complete the save if all ranks have written; for the end of a failed run."""
        if self._pending is not None:
            self._pending.writer.join()
            self._await(self._pending, _CLOSE_LIMIT_S)
            self.poll()

    def take_seconds(self) -> float:
        """Return the seconds that training has waited for saving since the last call."""
        lost, self._lost_s = self._lost_s, 0.0
        return lost

    def _write(self, partial: Path, tensors: dict[str, Tensor], averages: dict[str, list[float]]) -> None:
        path, note = (partial / name for name in rank_files(self._world.rank))
        try:
            write_whole(path, lambda partial_file: save_file(tensors, partial_file))
            written = checksum(path)
            write_json(note, {"bytes": written.num_bytes, "crc32": written.crc32, "averages": averages})
        except Exception as error:  # any error must reach the main thread, and no other rank may wait for this one
            self._error = f"{path.name}: {_reason(error)}"
            path.unlink(missing_ok=True)  # frees space for the note
            try:
                write_json(note, {"error": self._error})
            except OSError as second:
                self._error += f" ({note.name}: {_reason(second)})"

    def _notes(self, pending: _Pending) -> list[JsonObject | None]:
        """Return each rank's note, or None for a rank that has not written yet."""
        return [_read(pending.partial / rank_files(rank)[1]) for rank in range(self._world.size)]

    def _is_decided(self, pending: _Pending) -> bool:
        """Return True if every rank has written, one has failed, or the save already has its final name."""
        notes = self._notes(pending)
        failed = self.failed or any(note is not None and "error" in note for note in notes)
        return failed or None not in notes or not pending.partial.exists()

    def _await(self, pending: _Pending, limit_s: float) -> bool:
        """Wait until the save is decided; return False if that takes longer than `limit_s`."""
        began = time.perf_counter()
        while not self._is_decided(pending):
            if time.perf_counter() - began > limit_s:
                return False
            time.sleep(_POLL_EVERY_S)
        return True

    def _complete(self, pending: _Pending) -> None:
        files = {}
        try:
            for rank, note in enumerate(self._notes(pending)):
                assert note is not None
                part, about = rank_files(rank)
                files[part] = FileSum(note.whole("bytes"), note.whole("crc32"))
                files[about] = checksum(pending.partial / about)
            complete(pending.partial, pending.final, self._recipe, replace(pending.record, files=files))
            prune(self._recipe, pending.final, self._steps_per_epoch)
        except OSError as error:
            self._error = _reason(error)
            return
        pending.is_complete = True

    def _refuse_diverged(self, tensors: dict[str, Tensor], final: Path) -> None:
        """Raise `UserError` on every rank if any rank's state is not finite."""
        name = find_nonfinite((name, tensor) for name, tensor in tensors.items() if not is_buffer(name))
        raise_on_all(
            name and f"{final}: not saved, since the model has diverged: '{name}' holds NaN or infinity; earlier "
            "checkpoints are intact: lower optimizer.lr, and start over with --resume never"
        )

    def _agree(self, error: str | None, partial: Path) -> None:
        """Raise `UserError` on every rank if any rank has an error; the main rank removes the partial folder."""
        errors = gather([error] if error else [])
        if not errors:
            return
        if self._world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self._pending = None
        raise UserError(
            f"{partial.with_name(partial.name[1:].removesuffix('.partial'))}: cannot save: {'; '.join(errors)}: "
            "earlier checkpoints are intact: free some space, then run the same command again to resume"
        )

    def _count_wait(self, began: float) -> None:
        seconds = time.perf_counter() - began
        self._lost_s += seconds
        self.total_s += seconds


def _prepare(partial: Path) -> str | None:
    """Remove the leftovers of interrupted saves, links included, and make the folder; return the error, if any."""
    try:
        for leftover in partial.parent.glob(".step-*.partial"):
            remove(leftover)
        make_folder(partial)
    except OSError as error:
        return _reason(error)
    return None


def _read(path: Path) -> JsonObject | None:
    """Return a rank's note, or None if it does not exist yet."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
