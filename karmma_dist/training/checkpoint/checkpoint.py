"""Training state on disk: whole or not there.

    runs/NAME/checkpoints/
      step-00000120/            complete: it got this name only after every rank had written its part
        position.json           epoch, step, the data that this position is one in, versions, and the bytes and crc32
                                of the other files
        recipe.yaml             resolved
        rank-00000.safetensors  what rank 0 held of weights and optimizer state: see `zero_state`
        rank-00000.json         its bytes and crc32, and rank 0's running means
      latest                    the name of the checkpoint to go on from
      .step-00000160.partial/   a save that was interrupted; removed by the next one

There is no random state to save: the loop seeds torch for every forward pass from (seed, pass, rank), and data order
and augmentation are functions of the position. Frozen parameters are not saved either: they follow from the recipe and
its weights files; a checksum tells whether they still do.
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
from karmma_dist.training.checkpoint.zero_state import SavedPieces
from karmma_dist.training.engine import Engine

FORMAT = 2
"""Version of a checkpoint's layout."""
POSITION = "position.json"
"""The file that makes a folder a checkpoint."""
LATEST = "latest"
"""File that names the checkpoint to go on from."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the engine's state."""

    position: Position
    averages: list[dict[str, list[float]]]
    """`Averages.state` of each rank that saved."""
    state: dict[str, Any]
    """What the loop asked to be kept."""
    note: str
    """How it was saved and how it is resumed, for the log."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def data_state(recipe: Recipe, folder: ShardFolder) -> dict[str, Any]:
    """All that decides which clip is where in which epoch, and with which modalities: a position means nothing without.

    Flat, each value under the recipe's name of what sets it.
    """
    data, own = recipe.data, recipe.model.modalities
    return {
        "seed": recipe.seed,
        "training.batch_size": recipe.training.batch_size,
        "data.shards manifest sha256": folder.sha256,
        "data.train_split": data.train_split,
        "data.modalities": data.modalities,
        **{f"data.order.{name}": value for name, value in data.order.model_dump(mode="json").items()},
        **{f"data.modality_dropout.{name}": v for name, v in data.modality_dropout.model_dump(mode="json").items()},
        **({"data.hold_out": data.hold_out} if data.hold_out else {}),
        **({"model.modalities": own} if own is not None else {}),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    return {
        "karmma_dist": karmma_dist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
    }


def complete(
    partial: Path, final: Path, recipe: Recipe, about: Mapping[str, Any], files: Mapping[str, Mapping[str, int]]
) -> None:
    """Give a folder in which every rank has written its part its name, and let `latest` name it. The main rank's task.

    Args:
        partial: the folder.
        final: its name.
        recipe: the run.
        about: what position.json says beside the files.
        files: bytes and crc32 of every rank's file, which are on the disk by now.

    Raises:
        OSError: no space, for one. What was there before is still there.
    """
    save_recipe(recipe, partial / "recipe.yaml")
    files = {**files, "recipe.yaml": checksum(partial / "recipe.yaml")}
    write_json(partial / POSITION, {"format": FORMAT, **about, "versions": versions(), "files": files})
    sync(partial)
    if final.exists():
        discard(final)
    os.replace(partial, final)
    sync(final.parent)
    point_to(final)


def point_to(checkpoint: Path) -> None:
    """Let `latest` name this checkpoint."""
    write_whole(checkpoint.parent / LATEST, f"{checkpoint.name}\n".encode())
    sync(checkpoint.parent)


def prune(recipe: Recipe, newest: Path, steps_per_epoch: int) -> None:
    """Remove checkpoints before `newest` that the recipe does not keep.

    Later ones are left: they are there where a run was resumed from an earlier one, and will be written again.
    """
    training = recipe.training
    older = [path for path in checkpoints(recipe.run_dir) if path.name <= newest.name]
    for path in older[: -training.keep_checkpoints]:
        every = training.keep_every_epochs * steps_per_epoch
        if not every or int(path.name.removeprefix("step-")) % every:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint, which is at no moment half there under its name."""
    hidden = checkpoint.parent / f".{checkpoint.name}.old.partial"
    remove(hidden)
    os.replace(checkpoint, hidden)
    remove(hidden)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, every byte of which is read; None: nothing.

    Raises:
        UserError: another version wrote it.
    """
    try:
        about = json.loads((checkpoint / POSITION).read_text())
    except (OSError, ValueError) as error:
        return f"{POSITION}: {error}"
    for name, expected in _checked(checkpoint, about)["files"].items():
        try:
            found = checksum(checkpoint / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found["bytes"] != expected["bytes"]:
            return f"{name}: {found['bytes']} of {expected['bytes']} bytes"
        if found != expected:
            return f"{name}: its crc32 differs from the one recorded"
    return None


def newest_whole(run_dir: Path, say: Callable[[str, str], None]) -> Path | None:
    """The checkpoint to go on from: the one `latest` names, else the newest before it, else any.

    Args:
        run_dir: the run's folder.
        say: is told the name and the damage of each that is left aside.

    Raises:
        UserError: another version wrote it, or there are checkpoints and all are damaged.
    """
    found = checkpoints(run_dir)
    pointer = run_dir / "checkpoints" / LATEST
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    newest_first = sorted(found, key=lambda path: (not latest or path.name <= latest, path.name), reverse=True)
    for path in newest_first:
        damage = find_damage(path)
        if damage is None:
            return path
        say(path.name, damage)
    if found:
        raise UserError(
            f"{run_dir}/checkpoints: every checkpoint is damaged, the newest in {find_damage(newest_first[0])}: "
            "bring one back, or start over with --resume never"
        )
    return None


def load_checkpoint(engine: Engine, folder: Path, recipe: Recipe, world: World, data: dict[str, Any]) -> Saved:
    """Restore the training state on any number of ranks and at any ZeRO stage. Every rank must call this.

    Raises:
        UserError: it was saved in other data (`data_state`), of another model, or is not a checkpoint.
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
    with SavedPieces(parts) as pieces:
        engine.restore(pieces, about["engine"])
    position = Position(about["epoch"], about["step"])
    notes = [json.loads(part.with_suffix(".json").read_text()) for part in parts]
    return Saved(position, [note["averages"] for note in notes], about["state"], _note(folder, about, recipe, world))


def checksum(path: Path) -> dict[str, int]:
    """Size and crc32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return {"bytes": size, "crc32": crc}


def _checked(folder: Path, about: Any) -> dict[str, Any]:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        wrote = about.get("versions", {}).get("karmma_dist") if isinstance(about, dict) else None
        raise UserError(
            f"{folder}: {POSITION} is not one that this version writes"
            f"{f' (karmma-dist {wrote} did)' if wrote else ''}: resume with that one, or start over with --resume never"
        )
    outside = next((name for name in about["files"] if name in ("", "..") or Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{folder}: {POSITION}: files names '{outside}', which is not in the folder")
    return about


def _note(folder: Path, about: Mapping[str, Any], recipe: Recipe, world: World) -> str:
    def layout(ranks: int, stage: int) -> str:
        return f"{ranks} rank{'s' if ranks != 1 else ''} at ZeRO stage {stage}"

    saved, now = layout(about["world_size"], about["zero_stage"]), layout(world.size, recipe.training.zero_stage)
    also = [
        f"{name} was {about['versions'].get(name)}, is {version}: results may differ in the last bits"
        for name, version in versions().items()
        if about["versions"].get(name) != version
    ]
    changed = [f"saved by {saved}, resumed by {now}"] if saved != now else []
    return "; ".join([f"resumed {folder.name}", *changed, *also])
