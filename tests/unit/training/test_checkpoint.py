"""Checkpoints: saved atomically, resumed only with the same data settings, skipped if damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from karmma_dist.distributed import collectives
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.recipe import NOT_LEARNED, DistillRecipe, Recipe, load_recipe, save_recipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.order import Position
from karmma_dist.training.checkpoint import async_saver as async_saver
from karmma_dist.training.checkpoint import resume as run_folder
from karmma_dist.training.checkpoint.async_saver import AsyncSaver
from karmma_dist.training.checkpoint.checkpoint import Saved, checkpoints, data_state, load_checkpoint, newest_undamaged
from karmma_dist.training.checkpoint.record import CheckpointRecord, FileSum, read_record
from karmma_dist.training.checkpoint.resume import prepare_run_dir
from karmma_dist.training.checkpoint.zero_state import SavedState
from kits.fuzzing import cases
from kits.settings import fields_of, with_another

WORLD = World(0, 0, 1, "127.0.0.1", 1)


class MemoryEngine:
    """A substitute for the DeepSpeed engine, with one weight."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = torch.tensor([weight])
        self.restored = False

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"weight:0:w": self.weight.clone()}, {"engine": "memory"}

    def restore(self, saved: SavedState, common: dict[str, Any]) -> None:
        assert common == {"engine": "memory"}
        self.weight, self.restored = saved.read("weight", "w", 0, 1), True


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the collectives: one rank needs no process group."""
    monkeypatch.setattr(async_saver, "gather", lambda items: items)
    monkeypatch.setattr(run_folder, "gather", lambda items: items)
    monkeypatch.setattr(collectives, "gather", lambda items: items)


def make_saver(run: Recipe, shards: Path, steps_per_epoch: int = 5) -> AsyncSaver:
    return AsyncSaver(run, WORLD, steps_per_epoch, data_state(run, ShardFolder(shards)))


def save(run: Recipe, shards: Path, *steps: int) -> list[Path]:
    """Save checkpoints after these steps, with the step as the weight, and return all checkpoints."""
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
    """Return a checkpoint of one rank at step 2 of epoch 3."""
    (path,) = save(recipe(tmp_path, shards), shards, 17)
    return path


def resume(saved: Path, run: Recipe, folder: ShardFolder, world: World = WORLD) -> Saved:
    """Load a checkpoint and check that the engine is unchanged if loading is refused."""
    engine = MemoryEngine()
    loaded = None
    try:
        loaded = load_checkpoint(engine, saved, run, world, data_state(run, folder))  # type: ignore[arg-type]
    finally:
        assert engine.restored == (loaded is not None)
    return loaded


def test_checkpoint_resumes_at_its_position_with_moved_shards(
    saved: Path, tmp_path: Path, shards: Path
) -> None:
    assert saved.name == "step-00000017"
    moved = tmp_path / "elsewhere"
    shutil.copytree(shards, moved)
    loaded = resume(saved, recipe(tmp_path, moved, num_workers=3), ShardFolder(moved))
    assert (loaded.position, loaded.state, loaded.averages) == (Position(3, 2), {"best": 17}, [{"loss": [0.5, 2]}])


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
def test_other_data_settings_are_refused_with_both_values(
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


def test_resuming_on_another_number_of_ranks_is_noted(saved: Path, tmp_path: Path, shards: Path) -> None:
    loaded = resume(saved, recipe(tmp_path, shards), ShardFolder(shards), World(0, 0, 2, "127.0.0.1", 1))
    assert "saved by 1 rank at ZeRO stage 1, resumed by 2 ranks at ZeRO stage 1" in loaded.note


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "not an intact checkpoint: No such file"),
        ("{", r"not an intact checkpoint: does not end with its checksum \(1 bytes\)"),
        ("[]", "not an intact checkpoint: does not end with its checksum"),
        ('{"epoch": 1}', "not an intact checkpoint: is of format None"),
        ('{"format": 2, "versions": {"karmma_dist": "0.1"}}', "format 2 and was written by karmma-dist '0.1'"),
    ],
)
def test_invalid_checkpoint_is_refused_in_one_line(
    saved: Path, tmp_path: Path, shards: Path, content: str | None, complaint: str
) -> None:
    path = saved / "position.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        resume(saved, recipe(tmp_path, shards), ShardFolder(shards))


def ignore(name: str, damage: str) -> None:
    assert name
    assert damage


def fail_on_damage(name: str, damage: str) -> None:
    pytest.fail(f"{name}: {damage}")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    path.write_bytes(bytes([*path.read_bytes()[:-1], path.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "recipe.yaml", "position.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path, shards: Path, name: str, damage: Callable[[Path], None]
) -> None:
    before, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    damage(newest / name)
    reports: list[str] = []
    run_dir = tmp_path / "runs" / "run"
    assert newest_undamaged(run_dir, lambda path, problem: reports.append(f"{path}: {problem}")) == before
    assert len(reports) == 1
    assert reports[0].startswith(f"step-00000010: {name}")
    with pytest.raises(UserError, match=f"step-00000010: not an intact checkpoint: {name}"):
        prepare_run_dir(recipe(tmp_path, shards), WORLD, str(newest))
    damage(before / name)
    with pytest.raises(UserError, match=f"every checkpoint is damaged, the newest in {name}"):
        newest_undamaged(tmp_path / "runs" / "run", ignore)


OTHERS = {
    "another version": b'{"format": 99, "versions": {"karmma_dist": "9.9"}}',
    "list": b"[]", "null": b"null", "number": b"1", "text": b'"x"', "infinity": b'{"format": 3, "epoch": Infinity}',
    "deep": b"[" * 100_000, "not UTF-8": b"\xff\xfe{", "empty": b"", "zeros": bytes(2000),
    "types": b'{"format": 3, "versions": 5, "files": 7}', "long number": b'{"format": ' + b"9" * 5000 + b"}",
}  # fmt: skip
"""Contents of position.json that a reader may stumble over."""


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_whose_record_is_something_else_is_skipped_for_the_one_before(
    tmp_path: Path, shards: Path, content: bytes
) -> None:
    before, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    (newest / "position.json").write_bytes(content)
    assert named_damage(before) == ["step-00000010: position.json"]
    with pytest.raises(UserError, match="step-00000010: not an intact checkpoint: "):
        resume(newest, recipe(tmp_path, shards), ShardFolder(shards))


def named_damage(expected: Path) -> list[str]:
    """Expect that a run resumes from a checkpoint; return the others that it names, each with the damaged file."""
    reports: list[str] = []
    run_dir = expected.parents[1]
    assert newest_undamaged(run_dir, lambda name, damage: reports.append(f"{name}: {damage}")) == expected
    return [": ".join(report.split(": ")[:2]) for report in reports]


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00000.json", "recipe.yaml", "position.json"])
@pytest.mark.parametrize("change", [as_folder, as_fifo, as_loop])
def test_a_checkpoint_with_something_else_than_a_file_is_skipped(
    tmp_path: Path, shards: Path, name: str, change: Callable[[Path], None]
) -> None:
    before, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    change(newest / name)
    assert named_damage(before) == [f"step-00000010: {name}"]


def test_a_checkpoint_that_is_a_file_or_bears_another_step_is_skipped(tmp_path: Path, shards: Path) -> None:
    before, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    newest.rename(newest.with_name("step-00000020"))
    (newest.with_name("step-00000030")).touch()
    assert named_damage(before) == [
        "latest: names 'step-00000010', which is no checkpoint here",
        "step-00000030: position.json", "step-00000020: position.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"step-99999999\n", b"../x", b"", b"\0" * 9, b"step-00000010 \n", b"step-x\n" * 999],
    ids=["bytes", "absent", "outside", "empty", "zeros", "blank", "long"],
)  # fmt: skip
def test_a_damaged_pointer_is_named_and_the_newest_checkpoint_taken(
    tmp_path: Path, shards: Path, content: bytes
) -> None:
    _, newest = save(recipe(tmp_path, shards), shards, 5, 10)
    (newest.parent / "latest").write_bytes(content)
    assert [report.split(":")[0] for report in named_damage(newest)] == ["latest"]


def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    (path,) = save(run, shards, 5)
    copy = path.with_name("step-00000005.backup")
    shutil.copytree(path, copy)
    assert checkpoints(run.run_dir) == [path]
    save(run, shards, 10, 15, 20)
    assert resume(copy, run, ShardFolder(shards)).position == Position(1, 0)


def test_no_bit_of_the_record_may_flip(saved: Path) -> None:
    content = (saved / "position.json").read_bytes()
    assert CheckpointRecord.parse(content).steps == 17
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            CheckpointRecord.parse(bytes(flipped))
    for place in range(len(content)):
        before, after = content[:place], content[place:]
        for other in (before, before + after[1:], before + b" " + after):
            with pytest.raises(ValueError):
                CheckpointRecord.parse(other)


def damage_at_random(path: Path, draw: random.Random) -> None:
    """Damage a file in one of the ways in which disks, copies and people do it."""
    content = path.read_bytes()
    kind = draw.choice(["flip", "cut", "zeros", "longer", "gone", "folder", "fifo", "link", "other", "unreadable"])
    if kind in ("flip", "cut", "zeros", "longer", "other"):
        at = draw.randrange(len(content))
        changed = {
            "flip": content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :],
            "cut": content[:at],
            "zeros": content[:at] + bytes(len(content) - at),
            "longer": content + content[at:],
            "other": draw.choice(list(OTHERS.values())),
        }
        path.write_bytes(changed[kind])
        return
    path.unlink()
    {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("nowhere")}.get(
        kind, lambda: None
    )()


def test_damaged_run_folders_resume_from_an_intact_checkpoint_or_not_at_all(tmp_path: Path, shards: Path) -> None:
    """Damage 300 copies of a folder of three checkpoints, each in up to six places."""
    run = recipe(tmp_path, shards)
    training = run.training.model_copy(update={"keep_checkpoints": 3})
    original = save(run.model_copy(update={"training": training}), shards, 5, 10, 15)[0].parent
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    for seed in cases(300):
        draw, folder = random.Random(seed), tmp_path / "copies" / str(seed)
        shutil.copytree(original, folder / "checkpoints")
        hit = draw.sample(files, draw.randint(1, 6))
        for name in hit:
            damage_at_random(folder / "checkpoints" / name, draw)
        changed = {name for name in hit if not _is_same(original / name, folder / "checkpoints" / name)}
        intact = [path for path in checkpoints(folder) if not any(name.parts[0] == path.name for name in changed)]
        reports: list[str] = []
        if intact:
            chosen = newest_undamaged(folder, lambda name, _, reports=reports: reports.append(name))
            assert chosen == intact[-1], seed
            pointer = ["latest"] if "latest" in reports else []
            assert reports == [*pointer, *_after(checkpoints(folder), chosen)], seed
        else:
            with pytest.raises(UserError, match="every checkpoint is damaged"):
                newest_undamaged(folder, ignore)
        shutil.rmtree(folder)


def _is_same(first: Path, second: Path) -> bool:
    return second.is_file() and first.read_bytes() == second.read_bytes()


def _after(paths: list[Path], chosen: Path) -> list[str]:
    return [path.name for path in reversed(paths[paths.index(chosen) + 1 :])]


@pytest.mark.parametrize("name", ["../file", "/etc/hostname", "..", "", "a/b", ".hidden", "x" * 300, "a\nb"])
def test_a_record_that_names_files_outside_of_its_folder_is_damage(saved: Path, name: str) -> None:
    record = read_record(saved)
    with pytest.raises(ValueError, match="which is not in the folder"):
        CheckpointRecord.parse(replace(record, files={**record.files, name: FileSum(1, 1)}).to_bytes())


def test_a_record_must_name_the_files_of_every_rank(saved: Path) -> None:
    record = read_record(saved)
    for changed in (replace(record, world_size=2), replace(record, files={}), replace(record, world_size=10**12)):
        with pytest.raises(ValueError, match="files are"):
            CheckpointRecord.parse(changed.to_bytes())


def test_saved_state_is_the_state_at_the_call(tmp_path: Path, shards: Path) -> None:
    run, engine = recipe(tmp_path, shards), MemoryEngine(3.0)
    writer = make_saver(run, shards)
    writer.save(engine, 5, {}, {})  # type: ignore[arg-type]
    engine.weight.add_(1)
    writer.finish()
    load_checkpoint(engine, checkpoints(run.run_dir)[0], run, WORLD, data_state(run, ShardFolder(shards)))  # type: ignore[arg-type]
    assert float(engine.weight) == 3.0


def test_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    saved: Path, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(async_saver, "save_file", write_half)
    writer = make_saver(recipe(tmp_path, shards), shards)
    writer.save(MemoryEngine(), 20, {}, {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"step-00000020: cannot save: rank-00000\.safetensors: No space left"):
        writer.finish()
    assert [path.name for path in sorted(saved.parent.iterdir())] == ["latest", saved.name]
    assert newest_undamaged(saved.parents[1], fail_on_damage) == saved


def test_newest_checkpoints_and_every_nth_epoch_are_kept(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    training = run.training.model_copy(update={"keep_checkpoints": 2, "keep_every_epochs": 2})
    kept = save(run.model_copy(update={"training": training}), shards, *range(1, 24))
    assert [path.name for path in kept] == [f"step-{step:08d}" for step in (10, 20, 22, 23)]


def test_run_reset_to_an_earlier_checkpoint_continues_there(
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
    """Return a recipe with every section."""
    run = recipe(tmp_path, shards)
    return run.model_copy(update={"stage": "distill", "distill": DistillRecipe(teacher="t")})


def test_only_marked_fields_may_change_on_resume(tmp_path: Path, shards: Path) -> None:
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


def test_fields_that_determine_the_position_are_not_marked(tmp_path: Path, shards: Path) -> None:
    run = student(tmp_path, shards)
    fields = fields_of(run, NOT_LEARNED)
    decisive = [name for name in data_state(run, ShardFolder(shards)) if name in fields]
    assert len(decisive) >= 8
    assert not [name for name in decisive if fields[name]]


def test_moved_runs_folder_can_be_resumed(tmp_path: Path, shards: Path) -> None:
    run = recipe(tmp_path, shards)
    save(run, shards, 5)
    save_recipe(run, run.run_dir / "recipe.yaml")
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = load_recipe(str(tmp_path / "moved/run/recipe.yaml"), [f"runs_dir={tmp_path / 'moved'}"])
    assert prepare_run_dir(moved, WORLD, "auto") == str(tmp_path / "moved/run/checkpoints/step-00000005")


def test_other_recipes_are_refused_but_not_other_zero_stages(tmp_path: Path, shards: Path) -> None:
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
