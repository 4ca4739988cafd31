"""Training state on disk: a checkpoint is either complete or absent.

    runs/NAME/checkpoints/
      step-00000120/            complete: renamed to this only after every rank has written its part
        position.json           epoch, step, the data settings that give the position its meaning, versions, bytes and
                                crc32 of the other files, and a checksum of itself: see `record`
        recipe.yaml             the resolved recipe
        rank-00000.safetensors  rank 0's part of the weights and the optimizer state: see `zero_state`
        rank-00000.json         the size and crc32 of that file, and rank 0's running means
      latest                    the name of the checkpoint to resume from
      .step-00000160.partial/   an interrupted save; removed by the next save

No random state is saved: the trainer seeds torch for every forward pass from (seed, pass, rank), and data order and
augmentation are functions of the position. Frozen parameters are not saved either: they follow from the recipe and its
weights files, and a checksum detects whether those files have changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import karmma_dist
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.files import open_regular, read_file, remove, sync, write_whole
from karmma_dist.io.json_fields import read_json, shown
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.shards.folder import Shards
from karmma_dist.shards.mixture import Mixture
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint.record import POSITION, CheckpointRecord, FileSum, read_record
from karmma_dist.training.checkpoint.zero_state import SavedState
from karmma_dist.training.engine import Engine

LATEST = "latest"
"""File that names the checkpoint to resume from."""

_NAME = re.compile(r"step-[0-9]{8,}")
_MOST_BYTES_OF_LATEST = 4096


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint other than the engine's state."""

    position: Position
    averages: list[dict[str, list[float]]]
    """`Averages.state` of each rank that saved."""
    state: dict[str, Any]
    """Further values that the trainer saved."""
    note: str
    """Note for the log on the layouts and versions that saved and resume the checkpoint."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted((path for path in (run_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(path.name)), key=_steps)


def data_state(recipe: Recipe, folder: Shards) -> dict[str, Any]:
    """Return every setting that determines the clips at a position, and their modalities.

    The dict is flat; each key is the recipe field that sets the value. A position is only meaningful with these values.
    """
    data, model_modalities = recipe.data, recipe.model.modalities
    return {
        "seed": recipe.seed,
        "training.batch_size": recipe.training.batch_size,
        **_shards_state(recipe, folder),
        "data.train_split": data.train_split,
        "data.modalities": data.modalities,
        **{f"data.order.{name}": value for name, value in data.order.model_dump(mode="json").items()},
        **{f"data.modality_dropout.{name}": v for name, v in data.modality_dropout.model_dump(mode="json").items()},
        **({"data.hold_out": data.hold_out} if data.hold_out else {}),
        **({"model.modalities": model_modalities} if model_modalities is not None else {}),
        **({"model.encoders.X.memory.views": recipe.model.num_views} if recipe.model.num_views else {}),
    }


def _shards_state(recipe: Recipe, folder: Shards) -> dict[str, Any]:
    if not isinstance(folder, Mixture):
        (shards,) = folder.folders
        return {"data.shards manifest sha256": shards.sha256}
    state: dict[str, Any] = {}
    for name, dataset in folder.datasets.items():
        field, settings = f"data.mixture.{name}", recipe.data.mixture[name]
        state[f"{field}.shards manifest sha256"] = dataset.folder.sha256
        state[f"{field}.weight"] = settings.weight
        state[f"{field}.train_split"] = settings.train_split
        state[f"{field}.heads"] = settings.heads
    return state


def versions() -> dict[str, str]:
    """Return the versions of the software that affects the numbers of a run."""
    return {
        "karmma_dist": karmma_dist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
    }


def complete(partial: Path, final: Path, recipe: Recipe, record: CheckpointRecord) -> None:
    """Rename a folder in which every rank has written its part, and point `latest` to it. Only for the main rank.

    Args:
        partial: the folder that the ranks wrote.
        final: its final path.
        recipe: the run's recipe.
        record: the content of position.json, with the checksums of every rank's files, all of them already on disk.

    Raises:
        OSError: a file cannot be written, for example for lack of space; earlier checkpoints are unchanged.
    """
    save_recipe(recipe, partial / "recipe.yaml")
    record = replace(record, files={**record.files, "recipe.yaml": checksum(partial / "recipe.yaml")})
    write_whole(partial / POSITION, record.to_bytes())
    sync(partial)
    if final.exists():
        discard(final)
    os.replace(partial, final)
    sync(final.parent)
    set_latest(final)


def set_latest(checkpoint: Path) -> None:
    """Point `latest` to this checkpoint."""
    write_whole(checkpoint.parent / LATEST, f"{checkpoint.name}\n".encode())
    sync(checkpoint.parent)


def prune(recipe: Recipe, newest: Path, steps_per_epoch: int) -> None:
    """Remove the checkpoints before `newest` that the recipe does not keep.

    Later checkpoints stay: they exist if a run was resumed from an earlier checkpoint, and will be overwritten.
    """
    training = recipe.training
    older = [path for path in checkpoints(recipe.run_dir) if _steps(path) <= _steps(newest)]
    for path in older[: -training.keep_checkpoints]:
        every = training.keep_every_epochs * steps_per_epoch
        if not every or _steps(path) % every:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, renaming it first so that a half-removed folder never bears its name."""
    hidden = checkpoint.parent / f".{checkpoint.name}.old.partial"
    remove(hidden)
    os.replace(checkpoint, hidden)
    remove(hidden)


def find_damage(checkpoint: Path) -> str | None:
    """Read every byte of a checkpoint and return a description of its first damage, or None if it is intact.

    A checkpoint of another version of this software is damage too: it cannot be resumed from.
    """
    try:
        files = read_record(checkpoint).files
    except (OSError, ValueError) as error:
        return f"{POSITION}: {_reason(error)}"
    for name, expected in files.items():
        try:
            actual = checksum(checkpoint / name)
        except OSError as error:
            return f"{name}: {_reason(error)}"
        if actual.num_bytes != expected.num_bytes:
            return f"{name}: {actual.num_bytes} of {expected.num_bytes} bytes"
        if actual != expected:
            return f"{name}: its crc32 differs from the recorded value"
    return None


def newest_undamaged(run_dir: Path, report_damage: Callable[[str, str], None]) -> Path | None:
    """Return the checkpoint to resume from: the one that `latest` names, else the newest before it, else any.

    Args:
        run_dir: the run's folder.
        report_damage: called with the name and the damage of each checkpoint that is skipped, and of `latest`.

    Raises:
        UserError: all checkpoints are damaged.
    """
    candidates = checkpoints(run_dir)
    latest = _read_latest(run_dir / "checkpoints", report_damage) if candidates else None
    newest_first = sorted(
        candidates, key=lambda path: (latest is None or _steps(path) <= _steps(latest), _steps(path)), reverse=True
    )
    first = ""
    for path in newest_first:
        damage = find_damage(path)
        if damage is None:
            return path
        first = first or damage
        report_damage(path.name, damage)
    if candidates:
        raise UserError(
            f"{run_dir}/checkpoints: every checkpoint is damaged, the newest in {first}: "
            "restore one from a backup, or start over with --resume never"
        )
    return None


def _read_latest(folder: Path, report_damage: Callable[[str, str], None]) -> Path | None:
    """Return the checkpoint that `latest` names; None if it names none, which is reported unless it is missing."""
    try:
        name = read_file(folder / LATEST, _MOST_BYTES_OF_LATEST).decode().removesuffix("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        report_damage(LATEST, _reason(error))
        return None
    if not _NAME.fullmatch(name) or not (folder / name).exists():
        report_damage(LATEST, f"names {shown(name)}, which is no checkpoint here")
        return None
    return folder / name


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(engine: Engine, folder: Path, recipe: Recipe, world: World, data: dict[str, Any]) -> Saved:
    """Restore the training state on any number of ranks and at any ZeRO stage. Every rank must call this.

    Raises:
        UserError: the folder is not a checkpoint, or it was saved with other data settings (`data_state`) or of another
            model.
    """
    try:
        record = read_record(folder)
        parts = [folder / name for name in record.files if name.endswith(".safetensors")]
        averages = [read_json(part.with_suffix(".json")).nested("averages").unchecked() for part in parts]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: not an intact checkpoint: {_reason(error)}: resume another one, or use --resume auto"
        ) from None
    before = record.data
    for name in [*data, *(before.keys() - data.keys())]:
        if before.get(name) != data.get(name):
            raise UserError(
                f"{folder}: saved with {name} {before.get(name)}, this run has {data.get(name)}: "
                "resume as it was saved, or start over with --resume never"
            )
    with SavedState(parts) as shards:
        engine.restore(shards, record.engine)
    return Saved(record.position, averages, record.state, _note(folder, record, recipe, world))


def checksum(path: Path) -> FileSum:
    """Return the size and the crc32 of a file.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    size = crc = 0
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return FileSum(size, crc)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _note(folder: Path, record: CheckpointRecord, recipe: Recipe, world: World) -> str:
    def layout(ranks: int, stage: int) -> str:
        return f"{ranks} rank{'s' if ranks != 1 else ''} at ZeRO stage {stage}"

    before, now = layout(record.world_size, record.zero_stage), layout(world.size, recipe.training.zero_stage)
    changes = [
        f"{name} was {record.versions.get(name)} and is now {version}: results may differ in the last bits"
        for name, version in versions().items()
        if record.versions.get(name) != version
    ]
    layouts = [f"saved by {before}, resumed by {now}"] if before != now else []
    return "; ".join([f"resumed {folder.name}", *layouts, *changes])
