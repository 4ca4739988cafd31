"""Batches of a mixture: the same for any ranks and positions, with views that differ, and replacements in kind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.streaming.batch import Batch
from karmma_dist.streaming.loader import TrainingClips, open_shards, training_batches
from karmma_dist.streaming.order import Position, Schedule

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 2, "short_side": 16, "crop": 12},
        "audio": {"num_windows": 1, "window_s": 0.1, "num_mels": 8},
    }
)
MODALITIES = ["video", "flow", "audio"]
EPOCHS = 2
START = Position(0, 0)


def clips_of(mixture: dict[str, Any], batch_size: int = 6, **data: Any) -> TrainingClips:
    settings = {"mixture": mixture, "modalities": MODALITIES, "num_workers": 0, "keep_decoded": "100 MB", **data}
    recipe = DataRecipe.model_validate(settings)
    return TrainingClips(open_shards(recipe), recipe, INPUTS, seed=3, batch_size=batch_size)


@pytest.fixture
def both(shards: Path, actions: Path) -> dict[str, Any]:
    """Two datasets, of which the smaller comes more than once per epoch: 36 of 48 clips of 20."""
    return {"kitchen": {"shards": str(shards), "weight": 1}, "actions": {"shards": str(actions), "weight": 3}}


def batches(clips: TrainingClips, rank: int = 0, world: int = 1, start: Position = START) -> list[Batch]:
    schedule = Schedule(clips.num_places, 6, world)
    return list(training_batches(clips, schedule, rank, start, EPOCHS))


def content(batch: Batch) -> list[tuple[str, dict[str, bytes], list[int]]]:
    """Return each clip's key, arrays and labels."""
    rows = []
    for row, key in enumerate(batch.keys):
        arrays = {}
        for m, name in enumerate(MODALITIES):
            if batch.present_BM[row, m]:
                arrays[name] = batch.inputs[name][int(batch.present_BM[:row, m].sum())].numpy().tobytes()
        rows.append((key, arrays, [int(labels_B[row]) for labels_B in batch.labels.values()]))
    return rows


def test_global_batches_are_equal_for_any_ranks_and_after_a_resume(both: dict[str, Any]) -> None:
    clips = clips_of(both, modality_dropout={"probability": 0.5})
    whole = [content(batch) for batch in batches(clips)]
    assert len(whole) == EPOCHS * 8
    for world in (2, 3):
        parts = [batches(clips_of(both, modality_dropout={"probability": 0.5}), rank, world) for rank in range(world)]
        assert [[row for part in step for row in content(part)] for step in zip(*parts, strict=True)] == whole
    for epoch, step in ((0, 5), (1, 3)):
        resumed = [content(batch) for batch in batches(clips, start=Position(epoch, step))]
        assert resumed == whole[epoch * 8 + step :]


def test_a_clip_that_comes_again_in_an_epoch_has_another_view(both: dict[str, Any]) -> None:
    rows = [row for batch in batches(clips_of(both)) for row in content(batch)]
    first_epoch = rows[: len(rows) // EPOCHS]
    own = [row for row in first_epoch if row[0].startswith("actions/")]
    assert len(own) == 36
    assert len({key for key, *_ in own}) == 20
    seen: dict[str, list[Any]] = {}
    for key, arrays, labels in rows:
        for earlier, earlier_labels in seen.get(key, []):
            assert labels == earlier_labels
            assert "video" not in arrays or arrays["video"] != earlier["video"]
        seen.setdefault(key, []).append((arrays, labels))


def test_labels_of_heads_that_a_clip_lacks_are_absent(both: dict[str, Any]) -> None:
    for batch in batches(clips_of(both)):
        assert batch.heads_vary
        assert list(batch.labels) == ["action", "verb", "noun"]
        for key, arrays, (action, verb, noun) in content(batch):
            is_action = key.startswith("actions/")
            assert (action >= 0, verb >= 0, noun >= 0) == (is_action, not is_action, not is_action)
            assert not (is_action and "flow" in arrays)


def test_a_mixture_of_one_dataset_is_that_dataset(shards: Path) -> None:
    alone = DataRecipe.model_validate({"shards": str(shards), "modalities": MODALITIES, "num_workers": 0})
    clips = TrainingClips(open_shards(alone), alone, INPUTS, seed=3, batch_size=6)
    mixed = clips_of({"kitchen": {"shards": str(shards), "weight": 0.3, "heads": {"noun": "object"}}})
    for one, other in zip(batches(clips), batches(mixed), strict=True):
        assert not other.heads_vary
        assert [(f"kitchen/{key}", *rest) for key, *rest in content(one)] == content(other)


def test_a_damaged_clip_is_replaced_by_one_of_its_own_dataset(both: dict[str, Any], tmp_path: Path) -> None:
    """Damage a third of a dataset: batches keep the shares of both, hold no clip twice and none that is damaged."""
    whole = clips_of(both)
    shutil.copytree(both["actions"]["shards"], tmp_path / "copy")
    tar = tmp_path / "copy/train-000000.tar"
    damaged = [clip for clip in whole.clips if clip.key.startswith("actions/")][::3]
    data = bytearray(tar.read_bytes())
    for clip in damaged:
        member = clip.members["json"]
        assert member is not None
        data[member.offset] ^= 1
    tar.write_bytes(data)
    clips = clips_of({**both, "actions": {"shards": str(tmp_path / "copy"), "weight": 3}})
    keys = {clip.key for clip in damaged}
    noted = set()
    for before, after in zip(batches(whole), batches(clips), strict=True):
        assert [key.partition("/")[0] for key in before.keys] == [key.partition("/")[0] for key in after.keys]
        assert all(old == new for old, new in zip(before.keys, after.keys, strict=True) if old not in keys)
        assert len(set(after.keys)) == len(after.keys)
        assert not keys & set(after.keys)
        noted |= {damage.key for damage in after.damage}
        assert all(damage.shard == "actions/train-000000.tar" for damage in after.damage)
    assert noted == keys


def test_a_dataset_whose_clips_are_all_damaged_ends_the_run(both: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(both["actions"]["shards"], tmp_path / "copy")
    (tmp_path / "copy/train-000000.tar").write_bytes(b"")
    clips = clips_of({**both, "actions": {"shards": str(tmp_path / "copy"), "weight": 3}})
    with pytest.raises(UserError, match=r"copy, .*: \d clips in a row are damaged, the last: actions/train-000000.tar"):
        batches(clips)


def test_clips_are_held_out_of_every_dataset(both: dict[str, Any]) -> None:
    everything = {clip.key for clip in clips_of(both).clips}
    held = everything - {clip.key for clip in clips_of(both, batch_size=4, hold_out=0.4).clips}
    assert {key.partition("/")[0] for key in held} == {"kitchen", "actions"}
    recordings = {recording_of(key) for key in held}
    assert held == {key for key in everything if recording_of(key) in recordings}


def recording_of(key: str) -> str:
    return key.partition("/")[2].rpartition("_")[0]


def test_a_modality_that_no_dataset_declares_is_an_error(both: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the shards declare video, flow, audio, not 'signal': pack them"):
        clips_of(both, modalities=[*MODALITIES, "signal"])
    with pytest.raises(UserError, match="the shards declare video, audio, not 'flow'"):
        clips_of({"actions": both["actions"]})
