"""Training state on disk: whole or not there.

    runs/NAME/checkpoints/
      step-00000120/          complete: it got this name only after every rank had written its part
        position.json         epoch, step, world size, ZeRO stage, seed
        state/                DeepSpeed's files
      .step-00000160.partial/ a save that was interrupted; removed by the next one
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.shards import write_json
from karmma_dist.streaming.order import Position
from karmma_dist.training.engine import Engine, barrier
from karmma_dist.training.rendezvous import World


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def save_checkpoint(engine: Engine, recipe: Recipe, world: World, position: Position, steps_per_epoch: int) -> Path:
    """Save the training state. Every rank must call this.

    Returns:
        The checkpoint's folder.
    """
    parent = recipe.run_dir / "checkpoints"
    final = parent / f"step-{position.epoch * steps_per_epoch + position.step:08d}"
    partial = parent / f".{final.name}.partial"
    if world.is_main:
        for left in parent.glob(".step-*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    barrier()
    engine.save(partial, {"epoch": position.epoch, "step": position.step})
    _sync_files(partial)
    barrier()
    if world.is_main:
        write_json(
            partial / "position.json",
            {
                "epoch": position.epoch, "step": position.step, "seed": recipe.seed,
                "world_size": world.size, "zero_stage": recipe.training.zero_stage,
            },
        )
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in checkpoints(recipe.run_dir)[: -recipe.training.keep_checkpoints]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(engine: Engine, folder: Path, recipe: Recipe, world: World) -> Position:
    """Restore the training state. Every rank must call this.

    Raises:
        UserError: it was saved by another number of ranks or another ZeRO stage, or is not a checkpoint.
    """
    try:
        saved = json.loads((folder / "position.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a checkpoint: {error}") from None
    for name, now in (("world_size", world.size), ("zero_stage", recipe.training.zero_stage), ("seed", recipe.seed)):
        if saved[name] != now:
            raise UserError(
                f"{folder}: saved with {name.replace('_', ' ')} {saved[name]}, this run has {now}: "
                "resume as it was saved, or start over with --resume never"
            )
    engine.load(folder)
    return Position(saved["epoch"], saved["step"])


def _sync_files(folder: Path) -> None:
    """Flush every file below `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
