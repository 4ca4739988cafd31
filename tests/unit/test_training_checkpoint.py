"""A checkpoint's position is one in its data: resuming in other data is refused, naming the difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe
from karmma_dist.shards import ShardFolder
from karmma_dist.streaming.order import Position
from karmma_dist.training import checkpoint
from karmma_dist.training.checkpoint import data_state, load_checkpoint, save_checkpoint
from karmma_dist.training.rendezvous import World

WORLD = World(0, 0, 1, "127.0.0.1", 1)


class MemoryEngine:
    """Stands in for the DeepSpeed engine: counts what it is asked to do."""

    def __init__(self) -> None:
        self.loaded: list[Path] = []

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "weights").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        self.loaded.append(folder)


def recipe(tmp_path: Path, shards: Path, seed: int = 5, batch_size: int = 6, **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "run",
            "runs_dir": str(tmp_path / "runs"),
            "stage": "supervised",
            "seed": seed,
            "data": {"shards": str(shards), "modalities": ["audio"], **data},
            "model": {"encoders": {"video": {"name": "small_video"}, "audio": {"name": "small_audio"}}},
            "training": {"batch_size": batch_size},
        }
    )


@pytest.fixture
def saved(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of one rank at step 2 of epoch 3."""
    monkeypatch.setattr(checkpoint, "barrier", lambda: None)
    run = recipe(tmp_path, shards)
    state = data_state(run, ShardFolder(shards))
    return save_checkpoint(MemoryEngine(), run, WORLD, Position(3, 2), 5, state)  # type: ignore[arg-type]


def resume(saved: Path, run: Recipe, folder: ShardFolder, world: World = WORLD) -> Position:
    """Load it; the engine is asked exactly where nothing is refused."""
    engine = MemoryEngine()
    position = None
    try:
        position = load_checkpoint(engine, saved, run, world, data_state(run, folder))  # type: ignore[arg-type]
    finally:
        assert engine.loaded == ([] if position is None else [saved])
    return position


def test_a_checkpoint_is_resumed_at_its_position_also_where_the_shards_have_moved(
    saved: Path, tmp_path: Path, shards: Path
) -> None:
    assert saved.name == "step-00000017"
    moved = tmp_path / "elsewhere"
    shutil.copytree(shards, moved)
    assert resume(saved, recipe(tmp_path, moved, num_workers=3), ShardFolder(moved)) == Position(3, 2)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"order": {"lanes": 2, "window": 1}}, r"data\.order\.lanes 0, this run has 2"),
        ({"seed": 6}, "seed 5, this run has 6"),
        ({"batch_size": 12}, r"training\.batch_size 6, this run has 12"),
        ({"train_split": "validation"}, r"data\.train_split train, this run has validation"),
        ({"modalities": ["video", "audio"]}, r"data\.modalities \['audio'\], this run has \['video', 'audio'\]"),
        ({"modality_dropout": {"probability": 0.5}}, r"data\.modality_dropout\.probability 0\.0, this run has 0\.5"),
        ({"modality_dropout": {"draw": "independent"}}, "draw stratified, this run has independent"),
    ],
)
def test_other_data_settings_are_refused_saying_what_was_and_what_is(
    saved: Path, tmp_path: Path, shards: Path, change: dict[str, object], difference: str
) -> None:
    with pytest.raises(UserError, match=f"step-00000017: saved with .*{difference}.*--resume never"):
        resume(saved, recipe(tmp_path, shards, **change), ShardFolder(shards))


def test_other_shards_are_refused_by_their_manifest(saved: Path, tmp_path: Path, shards: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].reverse()
    (other / "manifest.json").write_text(json.dumps(manifest))
    before, now = ShardFolder(shards).sha256, ShardFolder(other).sha256
    with pytest.raises(UserError, match=rf"data\.shards manifest sha256 {before}, this run has {now}"):
        resume(saved, recipe(tmp_path, other), ShardFolder(other))


def test_another_world_is_refused(saved: Path, tmp_path: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="world size 1, this run has 2"):
        resume(saved, recipe(tmp_path, shards), ShardFolder(shards), World(0, 0, 2, "127.0.0.1", 1))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "not a checkpoint"), ("{", "not a checkpoint"), ("[]", "this version"), ('{"epoch": 1}', "this version")],
)
def test_what_is_no_checkpoint_is_one_line(
    saved: Path, tmp_path: Path, shards: Path, content: str | None, complaint: str
) -> None:
    path = saved / "position.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        resume(saved, recipe(tmp_path, shards), ShardFolder(shards))
