"""A checkpoint's position is one in its data: resuming in other data is refused, naming the difference."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.recipe import NOT_LEARNED, DistillRecipe, Recipe, load_recipe, save_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint import async_saver as saver
from karmma_dist.training.checkpoint import resume as run_folder
from karmma_dist.training.checkpoint.async_saver import Saver
from karmma_dist.training.checkpoint.checkpoint import Saved, checkpoints, data_state, load_checkpoint, newest_whole
from karmma_dist.training.checkpoint.resume import prepare_run_dir
from karmma_dist.training.checkpoint.zero_state import SavedPieces
from kits.settings import fields_of, with_another

WORLD = World(0, 0, 1, "127.0.0.1", 1)


class MemoryEngine:
    """Stands in for the DeepSpeed engine: one weight."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = torch.tensor([weight])
        self.restored = False

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"weight:0:w": self.weight.clone()}, {"of": "memory"}

    def restore(self, saved: SavedPieces, whole: dict[str, Any]) -> None:
        assert whole == {"of": "memory"}
        self.weight, self.restored = saved.read("weight", "w", 0, 1), True


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank needs no process group."""
    monkeypatch.setattr(saver, "gather", lambda items: items)
    monkeypatch.setattr(run_folder, "gather", lambda items: items)


def make_saver(run: Recipe, shards: Path, steps_per_epoch: int = 5) -> Saver:
    return Saver(run, WORLD, steps_per_epoch, data_state(run, ShardFolder(shards)))


def save(run: Recipe, shards: Path, *steps: int) -> list[Path]:
    """Checkpoints after these steps; the weight is the step."""
    writer = make_saver(run, shards)
    for done in steps:
        writer.save(MemoryEngine(done), done, {"loss": [0.5, 2]}, {"best": done})  # type: ignore[arg-type]
    writer.finish()
    return checkpoints(run.run_dir)


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
def saved(tmp_path: Path, shards: Path) -> Path:
    """A checkpoint of one rank at step 2 of epoch 3."""
    (path,) = save(recipe(tmp_path, shards), shards, 17)
    return path


def resume(saved: Path, run: Recipe, folder: ShardFolder, world: World = WORLD) -> Saved:
    """Load it; the engine's state is touched exactly where nothing is refused."""
    engine = MemoryEngine()
    found = None
    try:
        found = load_checkpoint(engine, saved, run, world, data_state(run, folder))  # type: ignore[arg-type]
    finally:
        assert engine.restored == (found is not None)
    return found


def test_a_checkpoint_is_resumed_at_its_position_also_where_the_shards_have_moved(
    saved: Path, tmp_path: Path, shards: Path
) -> None:
    assert saved.name == "step-00000017"
    moved = tmp_path / "elsewhere"
    shutil.copytree(shards, moved)
    found = resume(saved, recipe(tmp_path, moved, num_workers=3), ShardFolder(moved))
    assert (found.position, found.state, found.averages) == (Position(3, 2), {"best": 17}, [{"loss": [0.5, 2]}])


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


def test_another_number_of_ranks_resumes_it_and_is_said(saved: Path, tmp_path: Path, shards: Path) -> None:
    found = resume(saved, recipe(tmp_path, shards), ShardFolder(shards), World(0, 0, 2, "127.0.0.1", 1))
    assert "saved by 1 rank at ZeRO stage 1, resumed by 2 ranks at ZeRO stage 1" in found.note


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


def ignore(name: str, damage: str) -> None:
    assert name
    assert damage


def complain(name: str, damage: str) -> None:
    pytest.fail(f"{name}: {damage}")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "recipe.yaml", "position.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_left_aside_by_name_and_the_one_before_it_resumed(
    tmp_path: Path, shards: Path, name: str, damage: Callable[[Path], None]
) -> None:
    before, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    damage(newest / name)
    said: list[str] = []
    found = newest_whole(tmp_path / "runs" / "run", lambda what, why: said.append(f"{what}: {why}"))
    assert found == before
    assert len(said) == 1
    assert said[0].startswith(f"step-00000010: {name}")
    with pytest.raises(UserError, match=f"step-00000010: not a whole checkpoint: {name}"):
        prepare_run_dir(recipe(tmp_path, shards), WORLD, str(newest))
    damage(before / name)
    with pytest.raises(UserError, match=f"every checkpoint is damaged, the newest in {name}"):
        newest_whole(tmp_path / "runs" / "run", ignore)


def test_a_checkpoint_of_another_version_is_refused_not_left_aside(saved: Path) -> None:
    about = json.loads((saved / "position.json").read_text())
    (saved / "position.json").write_text(json.dumps({**about, "format": 99, "versions": {"karmma_dist": "9.9"}}))
    with pytest.raises(UserError, match=r"step-00000017: .*karmma-dist 9\.9 did.*--resume never"):
        newest_whole(saved.parents[1], ignore)


def test_what_is_saved_is_what_was_when_it_was_asked_for(tmp_path: Path, shards: Path) -> None:
    run, engine = recipe(tmp_path, shards), MemoryEngine(3.0)
    writer = make_saver(run, shards)
    writer.save(engine, 5, {}, {})  # type: ignore[arg-type]
    engine.weight.add_(1)
    writer.finish()
    load_checkpoint(engine, checkpoints(run.run_dir)[0], run, WORLD, data_state(run, ShardFolder(shards)))  # type: ignore[arg-type]
    assert float(engine.weight) == 3.0


def test_a_full_disk_ends_the_run_in_one_line_and_leaves_the_last_checkpoint_whole(
    saved: Path, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver, "save_file", write_half)
    writer = make_saver(recipe(tmp_path, shards), shards)
    writer.save(MemoryEngine(), 20, {}, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"step-00000020: cannot save: rank-00000\.safetensors: No space left"):
        writer.finish()
    assert [path.name for path in sorted(saved.parent.iterdir())] == ["latest", saved.name]
    assert newest_whole(saved.parents[1], complain) == saved


def test_the_newest_are_kept_and_those_of_every_nth_epoch_for_good(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    training = run.training.model_copy(update={"keep_checkpoints": 2, "keep_every_epochs": 2})
    found = save(run.model_copy(update={"training": training}), shards, *range(1, 24))
    assert [path.name for path in found] == [f"step-{step:08d}" for step in (10, 20, 22, 23)]


def test_a_run_taken_back_to_an_earlier_checkpoint_goes_on_from_there_also_after_being_killed(
    tmp_path: Path, shards: Path
) -> None:
    run = recipe(tmp_path, shards)
    training = run.training.model_copy(update={"keep_checkpoints": 9})
    run = run.model_copy(update={"training": training})
    early, middle, late = save(run, shards, 5, 10, 15)
    save_recipe(run, run.run_dir / "recipe.yaml")
    assert prepare_run_dir(run, WORLD, "auto") == str(late)
    assert prepare_run_dir(run, WORLD, str(early)) == str(early)
    assert prepare_run_dir(run, WORLD, "auto") == str(early)
    save(run, shards, 10)
    assert prepare_run_dir(run, WORLD, "auto") == str(middle)
    assert checkpoints(run.run_dir) == [early, middle, late]


def student(tmp_path: Path, shards: Path) -> Recipe:
    """A recipe in which every section is there."""
    run = recipe(tmp_path, shards)
    return run.model_copy(update={"stage": "distill", "distill": DistillRecipe(teacher="t")})


def test_marked_fields_may_change_on_resume_and_each_other_is_refused_by_name(tmp_path: Path, shards: Path) -> None:
    run = student(tmp_path, shards)
    (path,) = save(run, shards, 5)
    fields = fields_of(run, NOT_LEARNED)
    assert {"training.log_every_steps", "slurm.nodes", "optimizer.lr"} < fields.keys()
    for name, is_free in fields.items():
        changed = with_another(run, name)
        if changed.run_dir != run.run_dir:
            shutil.copytree(run.run_dir, changed.run_dir)
        save_recipe(run, changed.run_dir / "recipe.yaml")
        if is_free:
            start = prepare_run_dir(changed, WORLD, "auto")
            assert start == str(changed.run_dir / "checkpoints" / path.name), name
        else:
            with pytest.raises(UserError, match=rf"another recipe \({re.escape(name)}[:.]"):
                prepare_run_dir(changed, WORLD, "auto")


def test_what_a_position_depends_on_is_not_marked(tmp_path: Path, shards: Path) -> None:
    run = student(tmp_path, shards)
    fields = fields_of(run, NOT_LEARNED)
    decisive = [name for name in data_state(run, ShardFolder(shards)) if name in fields]
    assert len(decisive) >= 8
    assert not [name for name in decisive if fields[name]]


def test_a_run_that_was_moved_with_its_folder_of_runs_goes_on(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    save(run, shards, 5)
    save_recipe(run, run.run_dir / "recipe.yaml")
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = load_recipe(str(tmp_path / "moved/run/recipe.yaml"), [f"runs_dir={tmp_path / 'moved'}"])
    assert prepare_run_dir(moved, WORLD, "auto") == str(tmp_path / "moved/run/checkpoints/step-00000005")


def test_other_recipes_are_refused_but_not_what_only_says_where_and_how_often(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    (path,) = save(run, shards, 5)
    save_recipe(run, run.run_dir / "recipe.yaml")

    def changed(section: str, **values: object) -> Recipe:
        return run.model_copy(update={section: getattr(run, section).model_copy(update=values)})

    free = changed("training", zero_stage=3, keep_checkpoints=1, keep_every_epochs=4, checkpoint_every_steps=7)
    assert prepare_run_dir(free, WORLD, "auto") == str(path)
    with pytest.raises(UserError, match=r"training\.epochs: 100 -> 7"):
        prepare_run_dir(changed("training", epochs=7), WORLD, "auto")
    with pytest.raises(UserError, match="seed: 5 -> 6"):
        prepare_run_dir(recipe(tmp_path, shards, seed=6), WORLD, "auto")
