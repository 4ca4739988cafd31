"""Training state on disk: whole or not there.

    runs/NAME/checkpoints/
      step-00000120/          complete: it got this name only after every rank had written its part
        position.json         epoch, step, world size, ZeRO stage, and the data that this position is one in
        state/                DeepSpeed's files
      .step-00000160.partial/ a save that was interrupted; removed by the next one
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.shards import ShardFolder, write_json
from karmma_dist.streaming.order import Position
from karmma_dist.training.engine import Engine, barrier
from karmma_dist.training.rendezvous import World


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def data_state(recipe: Recipe, folder: ShardFolder) -> dict[str, Any]:
    """All that decides which clip is where in which epoch, and with which modalities: a position means nothing without.

    Flat, each value under the recipe's name of what sets it.
    """
    data = recipe.data
    return {
        "seed": recipe.seed,
        "training.batch_size": recipe.training.batch_size,
        "data.shards manifest sha256": folder.sha256,
        "data.train_split": data.train_split,
        "data.modalities": data.modalities,
        **{f"data.order.{name}": value for name, value in data.order.model_dump(mode="json").items()},
        **{f"data.modality_dropout.{name}": v for name, v in data.modality_dropout.model_dump(mode="json").items()},
    }


def save_checkpoint(
    engine: Engine, recipe: Recipe, world: World, position: Position, steps_per_epoch: int, data: dict[str, Any]
) -> Path:
    """Save the training state. Every rank must call this.

    Args:
        engine: the model and its optimizer.
        recipe: the run.
        world: this rank.
        position: where training stands.
        steps_per_epoch: optimizer steps; the folder is named after the number of steps done.
        data: `data_state`.

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
                "epoch": position.epoch, "step": position.step,
                "world_size": world.size, "zero_stage": recipe.training.zero_stage, "data": data,
            },
        )
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in checkpoints(recipe.run_dir)[: -recipe.training.keep_checkpoints]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(engine: Engine, folder: Path, recipe: Recipe, world: World, data: dict[str, Any]) -> Position:
    """Restore the training state. Every rank must call this.

    Raises:
        UserError: it was saved by another number of ranks or another ZeRO stage, in other data (`data_state`), or is
            not a checkpoint.
    """
    try:
        saved = json.loads((folder / "position.json").read_text())
        before = {"world size": saved["world_size"], "zero stage": saved["zero_stage"], **saved["data"]}
        position = Position(saved["epoch"], saved["step"])
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a checkpoint: {error}") from None
    except (KeyError, TypeError):
        raise UserError(
            f"{folder}: position.json is not one that this version writes: start over with --resume never"
        ) from None
    now = {"world size": world.size, "zero stage": recipe.training.zero_stage, **data}
    for name in [*now, *(before.keys() - now.keys())]:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{folder}: saved with {name} {before.get(name)}, this run has {now.get(name)}: "
                "resume as it was saved, or start over with --resume never"
            )
    engine.load(folder)
    return position


def _sync_files(folder: Path) -> None:
    """Flush every file below `folder` to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
