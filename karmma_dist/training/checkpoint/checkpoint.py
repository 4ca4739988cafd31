"""Training state on disk: a checkpoint is either complete or absent.

    runs/NAME/checkpoints/
      step-00000120/            complete: renamed to this only after every rank has written its part
        position.json           epoch, step, the data settings that give the position its meaning, versions, and the
                                bytes and crc32 of the other files
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
import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import karmma_dist
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.io.files import remove, sync, write_json, write_whole
from karmma_dist.recipe import Recipe, save_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint.zero_state import SavedState
from karmma_dist.training.engine import Engine

FORMAT = 2
"""Version of a checkpoint's layout."""
POSITION = "position.json"
"""File that marks a folder as a checkpoint."""
LATEST = "latest"
"""File that names the checkpoint to resume from."""


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
    return sorted((run_dir / "checkpoints").glob("step-*"))


def data_state(recipe: Recipe, folder: ShardFolder) -> dict[str, Any]:
    """Return every setting that determines the clips at a position, and their modalities.

    The dict is flat; each key is the recipe field that sets the value. A position is only meaningful with these values.
    """
    data, model_modalities = recipe.data, recipe.model.modalities
    return {
        "seed": recipe.seed,
        "training.batch_size": recipe.training.batch_size,
        "data.shards manifest sha256": folder.sha256,
        "data.train_split": data.train_split,
        "data.modalities": data.modalities,
        **{f"data.order.{name}": value for name, value in data.order.model_dump(mode="json").items()},
        **{f"data.modality_dropout.{name}": v for name, v in data.modality_dropout.model_dump(mode="json").items()},
        **({"data.hold_out": data.hold_out} if data.hold_out else {}),
        **({"model.modalities": model_modalities} if model_modalities is not None else {}),
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that affects the numbers of a run."""
    return {
        "karmma_dist": karmma_dist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
    }


def complete(
    partial: Path, final: Path, recipe: Recipe, about: Mapping[str, Any], files: Mapping[str, Mapping[str, int]]
) -> None:
    """Rename a folder in which every rank has written its part, and point `latest` to it. Only for the main rank.

    Args:
        partial: the folder that the ranks wrote.
        final: its final path.
        recipe: the run's recipe.
        about: content of position.json other than the list of files.
        files: bytes and crc32 of every rank's file, all of them already on disk.

    Raises:
        OSError: a file cannot be written, for example for lack of space; earlier checkpoints are unchanged.
    """
    save_recipe(recipe, partial / "recipe.yaml")
    files = {**files, "recipe.yaml": checksum(partial / "recipe.yaml")}
    write_json(partial / POSITION, {"format": FORMAT, **about, "versions": versions(), "files": files})
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
    older = [path for path in checkpoints(recipe.run_dir) if path.name <= newest.name]
    for path in older[: -training.keep_checkpoints]:
        every = training.keep_every_epochs * steps_per_epoch
        if not every or int(path.name.removeprefix("step-")) % every:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, renaming it first so that a half-removed folder never bears its name."""
    hidden = checkpoint.parent / f".{checkpoint.name}.old.partial"
    remove(hidden)
    os.replace(checkpoint, hidden)
    remove(hidden)


def find_damage(checkpoint: Path) -> str | None:
    """Read every byte of a checkpoint and return a description of its first damage, or None if it is intact.

    Raises:
        UserError: another version wrote the checkpoint.
    """
    try:
        about = json.loads((checkpoint / POSITION).read_text())
    except (OSError, ValueError) as error:
        return f"{POSITION}: {error}"
    for name, expected in _checked(checkpoint, about)["files"].items():
        try:
            actual = checksum(checkpoint / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if actual["bytes"] != expected["bytes"]:
            return f"{name}: {actual['bytes']} of {expected['bytes']} bytes"
        if actual != expected:
            return f"{name}: its crc32 differs from the recorded value"
    return None


def newest_undamaged(run_dir: Path, report_damage: Callable[[str, str], None]) -> Path | None:
    """Return the checkpoint to resume from: the one that `latest` names, else the newest before it, else any.

    Args:
        run_dir: the run's folder.
        report_damage: called with the name and the damage of each checkpoint that is skipped.

    Raises:
        UserError: another version wrote a checkpoint, or all checkpoints are damaged.
    """
    candidates = checkpoints(run_dir)
    pointer = run_dir / "checkpoints" / LATEST
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    newest_first = sorted(candidates, key=lambda path: (not latest or path.name <= latest, path.name), reverse=True)
    for path in newest_first:
        damage = find_damage(path)
        if damage is None:
            return path
        report_damage(path.name, damage)
    if candidates:
        raise UserError(
            f"{run_dir}/checkpoints: every checkpoint is damaged, the newest in {find_damage(newest_first[0])}: "
            "restore one from a backup, or start over with --resume never"
        )
    return None


def load_checkpoint(engine: Engine, folder: Path, recipe: Recipe, world: World, data: dict[str, Any]) -> Saved:
    """Restore the training state on any number of ranks and at any ZeRO stage. Every rank must call this.

    Raises:
        UserError: the folder is not a checkpoint, or it was saved with other data settings (`data_state`) or of another
            model.
    """
    try:
        about = json.loads((folder / POSITION).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a checkpoint: {error}") from None
    before = _checked(folder, about)["data"]
    for name in [*data, *(before.keys() - data.keys())]:
        if before.get(name) != data.get(name):
            raise UserError(
                f"{folder}: saved with {name} {before.get(name)}, this run has {data.get(name)}: "
                "resume as it was saved, or start over with --resume never"
            )
    parts = [folder / name for name in about["files"] if name.endswith(".safetensors")]
    with SavedState(parts) as shards:
        engine.restore(shards, about["engine"])
    position = Position(about["epoch"], about["step"])
    notes = [json.loads(part.with_suffix(".json").read_text()) for part in parts]
    return Saved(position, [note["averages"] for note in notes], about["state"], _note(folder, about, recipe, world))


def checksum(path: Path) -> dict[str, int]:
    """Return the size and the crc32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def _checked(folder: Path, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        wrote = about.get("versions", {}).get("karmma_dist") if isinstance(about, dict) else None
        raise UserError(
            f"{folder}: {POSITION} was not written by this version"
            f"{f' but by karmma-dist {wrote}' if wrote else ''}: resume with that version, "
            "or start over with --resume never"
        )
    outside = next((name for name in about["files"] if name in ("", "..") or Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{folder}: {POSITION}: files names '{outside}', which is not in the folder")
    return about


def _note(folder: Path, about: Mapping[str, Any], recipe: Recipe, world: World) -> str:
    def layout(ranks: int, stage: int) -> str:
        return f"{ranks} rank{'s' if ranks != 1 else ''} at ZeRO stage {stage}"

    before, now = layout(about["world_size"], about["zero_stage"]), layout(world.size, recipe.training.zero_stage)
    changes = [
        f"{name} was {about['versions'].get(name)} and is now {version}: results may differ in the last bits"
        for name, version in versions().items()
        if about["versions"].get(name) != version
    ]
    layouts = [f"saved by {before}, resumed by {now}"] if before != now else []
    return "; ".join([f"resumed {folder.name}", *layouts, *changes])
