"""Tests of batches from real shards: the same for any number of ranks and workers; damage is never absence."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.recipe import DataRecipe, InputRecipe
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.shards.format import Clip, DamageError
from karmma_dist.streaming.batch import Batch, prepare
from karmma_dist.streaming.loader import (
    EvaluationClips,
    TrainingClips,
    evaluation_batches,
    is_held_out,
    num_stored_frames,
    open_shards,
    training_batches,
)
from karmma_dist.streaming.order import Position, Schedule
from karmma_dist.streaming.reader import read_sample
from karmma_dist.streaming.views import evaluation_view

INPUTS = InputRecipe.model_validate(
    {
        "video": {"num_frames": 4, "short_side": 32, "crop": 24, "jitter": 0.4},
        "audio": {"num_windows": 1, "window_s": 0.5, "num_mels": 16},
    }
)


LANES = {"lanes": 4, "window": 1}


def data_recipe(
    shards: Path, workers: int = 0, drop: float = 0.0, damaged: float = 1.0, order: dict[str, int] | None = None
) -> DataRecipe:
    return DataRecipe.model_validate(
        {
            "shards": str(shards),
            "num_workers": workers,
            "modality_dropout": {"probability": drop},
            "max_damaged_fraction": damaged,
            "order": order or {},
        }
    )


def training(
    shards: Path,
    world: int = 1,
    workers: int = 0,
    drop: float = 0.0,
    epochs: int = 2,
    order: dict[str, int] | None = None,
) -> list[list[Batch]]:
    """Return the batches of every rank."""
    data = data_recipe(shards, workers, drop, order=order)
    clips = TrainingClips(open_shards(data), data, INPUTS, seed=3, batch_size=8)
    schedule = Schedule(len(clips.clips), batch_size=8, world_size=world)
    return [list(training_batches(clips, schedule, rank, Position(0, 0), epochs)) for rank in range(world)]


def by_clip(batches: list[Batch]) -> dict[tuple[int, int, str], tuple[list[bool], list[bytes]]]:
    """Return presence and the bytes of all arrays of each clip, by (epoch, step, key)."""
    clips = {}
    for batch in batches:
        taken = dict.fromkeys(["video", "flow", "audio"], 0)
        for row, key in enumerate(batch.keys):
            arrays = []
            for name, is_present in zip(taken, batch.present_BM[row].tolist(), strict=True):
                if is_present:
                    arrays.append(batch.inputs[name][taken[name]].numpy().tobytes())
                    taken[name] += 1
            clips[batch.epoch, batch.step, key] = (batch.present_BM[row].tolist(), arrays)
    return clips


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2)])
def test_clips_and_pixels_do_not_depend_on_ranks_or_workers(shards: Path, world: int, workers: int) -> None:
    one_rank = by_clip(training(shards, drop=0.5)[0])
    all_ranks = by_clip([batch for rank in training(shards, world, workers, drop=0.5) for batch in rank])
    assert len(one_rank) == 2 * 3 * 8
    assert all_ranks == one_rank


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("order", [{}, LANES], ids=["permutation", "lanes"])
def test_a_rank_gets_the_same_batches_for_any_workers(shards: Path, order: dict[str, int]) -> None:
    without_workers, *others = (
        [(batch.epoch, batch.step, batch.keys, by_clip([batch])) for batch in ranks[1]]
        for ranks in (training(shards, 2, workers, 0.5, order=order) for workers in (0, 1, 3))
    )
    assert [batch[:2] for batch in without_workers] == [(epoch, step) for epoch in range(2) for step in range(3)]
    assert others == [without_workers, without_workers]


def test_each_lane_of_a_batch_comes_from_different_shards(shards: Path) -> None:
    shard_of = {clip.key: clip.shard for clip in ShardFolder(shards).clips("train")}
    assert len(set(shard_of.values())) == 4
    steps = [[shard_of[key] for key in batch.keys] for batch in training(shards, order=LANES, epochs=1)[0]]
    for lane in range(4):
        lane_shards = {shard for step in steps for shard in step[2 * lane : 2 * lane + 2]}
        assert len(lane_shards) <= 2
    assert sum(len({s for step in steps for s in step[2 * lane : 2 * lane + 2]}) for lane in range(4)) <= 4 + 3


def test_dropped_modalities_are_missing_and_kept_ones_are_present(shards: Path) -> None:
    declared = {clip.key: clip for clip in ShardFolder(shards).clips("train")}
    names = ["video", "flow", "audio"]
    for batch in training(shards, drop=0.5)[0]:
        assert batch.present_BM.any(dim=1).all()
        for key, present in zip(batch.keys, batch.present_BM.tolist(), strict=True):
            assert all(declared[key].has(name) for name, is_present in zip(names, present, strict=True) if is_present)
        for column, name in enumerate(names):
            rows = int(batch.present_BM[:, column].sum())
            assert (len(batch.inputs[name]) if rows else 0) == rows


def test_prepared_inputs_have_the_shapes_and_scale_models_expect(shards: Path) -> None:
    batch = prepare(training(shards)[0][0], INPUTS, "cpu")
    video, flow, audio = (batch.inputs[name] for name in ("video", "flow", "audio"))
    assert video.shape[1:] == flow.shape[1:] == (3, 4, 24, 24)
    assert audio.shape[1:] == (1, 16, INPUTS.audio.num_steps)
    assert float(flow[:, 2].abs().max()) == 0
    assert abs(float(flow.mean())) < 0.5
    assert all(tensor.isfinite().all() and tensor.dtype == torch.float32 for tensor in (video, flow, audio))


@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 4), (3, 3), (3, 4), (4, 1), (2, 16)])
def test_evaluation_reads_every_clip_once_and_pads_the_end(
    shards: Path, world: int, batch_size: int
) -> None:
    data = data_recipe(shards)
    clips = EvaluationClips(open_shards(data), data, INPUTS, "validation")
    ranks = [list(evaluation_batches(clips, batch_size, rank, world)) for rank in range(world)]
    steps = -(-len(clips.clips) // (batch_size * world))
    assert [[len(batch.keys) for batch in batches] for batches in ranks] == [[batch_size] * steps] * world
    assert all(b.valid_B.tolist() == [key != "" for key in b.keys] for batches in ranks for b in batches)
    seen = [(k, p) for batches in ranks for b in batches for k, p in zip(b.keys, b.present_BM.tolist(), strict=True)]
    declared = {clip.key: [clip.has(m) for m in data.modalities] for clip in clips.clips}
    assert sorted((key, p) for key, p in seen if key) == sorted(declared.items())
    padding = sum(int((~batch.valid_B).sum()) for batches in ranks for batch in batches)
    assert padding == steps * world * batch_size - len(declared)


def read_all(folder: ShardFolder, clips: list[Clip]) -> dict[str, set[str]]:
    """Return the delivered modalities by key, for the clips that are delivered."""
    delivered = {}
    for clip in clips:
        try:
            metadata = folder.metadata(clip)
            view = evaluation_view(INPUTS.video, num_stored_frames(metadata))
            wanted = [m for m in folder.modalities if clip.has(m)]
            delivered[clip.key] = set(read_sample(folder, clip, metadata, wanted, INPUTS, view).arrays)
        except DamageError as error:
            names_clip = error.key == clip.key and error.member.startswith(clip.key)
            assert names_clip, error  # noqa: PT017  (most clips must not raise at all)
    return delivered


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_shard_never_changes_a_clips_modalities(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = ShardFolder(shards)
    clips = [clip for clip in whole.clips("validation") if clip.shard == "validation-000000.tar"]
    declared = {clip.key: {m for m in whole.modalities if clip.has(m)} for clip in clips}
    copy = tmp_path_factory.mktemp("damaged") / "s"
    shutil.copytree(shards, copy)
    tar = copy / "validation-000000.tar"
    content = bytearray(tar.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) // 512), label="block") * 512 :]
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=20), label="flips"):
            content[place] ^= 0xFF
    tar.write_bytes(content)
    delivered = read_all(ShardFolder(copy), clips)
    assert all(modalities == declared[key] for key, modalities in delivered.items())
    shutil.rmtree(copy)


@pytest.mark.parametrize("order", [{}, LANES], ids=["permutation", "lanes"])
def test_a_damaged_clip_is_replaced_and_reported(
    shards: Path, tmp_path: Path, order: dict[str, int]
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    folder = ShardFolder(copy)
    victim = folder.clips("train")[0]
    member = victim.members["audio"] or victim.members["video"]
    assert member is not None
    tar = copy / victim.shard
    content = bytearray(tar.read_bytes())
    content[member.offset + member.size // 2] ^= 0xFF
    tar.write_bytes(content)
    batches = training(copy, epochs=3, order=order)[0]
    events = [event for batch in batches for event in batch.damage]
    assert {event.key for event in events} == {victim.key}
    assert all(len(set(batch.keys)) == 8 and victim.key not in batch.keys for batch in batches)
    assert all("crc32 differs" in event.what for event in events)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_an_undamaged_clip_are_one_line(
    shards: Path, tmp_path: Path, workers: int
) -> None:
    copy = tmp_path / "s"
    shutil.copytree(shards, copy)
    for tar in copy.glob("train-*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(UserError, match="clips in a row are damaged") as caught:
        training(copy, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_frame_read_alone_equals_one_read_with_others(shards: Path) -> None:
    folder = ShardFolder(shards)
    clip = next(c for c in folder.clips("train") if c.has("video"))
    metadata = folder.metadata(clip)
    video = INPUTS.video.model_copy(update={"num_frames": 6})
    view = evaluation_view(video, num_stored_frames(metadata))
    inputs = INPUTS.model_copy(update={"video": video})
    together = read_sample(folder, clip, metadata, ["video"], inputs, view).arrays["video"]
    for place in range(6):
        alone = type(view)(np.array([view.times_F[place]]), view.top, view.left, False, view.jitter_3)
        single = read_sample(folder, clip, metadata, ["video"], inputs, alone).arrays["video"]
        assert (single[0] == together[place]).all()


def test_flow_scaled_like_video_is_normalised_by_imagenet_statistics(shards: Path) -> None:
    raw = training(shards)[0][0]
    inputs = INPUTS.model_copy(update={"video": INPUTS.video.model_copy(update={"flow_scale": "imagenet"})})
    flow = prepare(raw, inputs, "cpu").inputs["flow"]
    pictures = raw.inputs["flow"].float().permute(0, 4, 1, 2, 3) / 255
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224))):
        torch.testing.assert_close(flow[:, channel], (pictures[:, channel] - mean) / std)
    torch.testing.assert_close(flow[:, 2], torch.full_like(flow[:, 2], -0.406 / 0.225))


def test_missing_or_unfitting_shards_are_one_line(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shards folder"):
        open_shards(data_recipe(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_shards(data_recipe(tmp_path / "empty"))
    with pytest.raises(UserError, match="not 'detections'"):
        open_shards(DataRecipe(shards=str(shards), modalities=["detections"]))
    with pytest.raises(UserError, match="no split 'exam'"):
        ShardFolder(shards).clips("exam")


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_recordings_too(number: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert is_held_out(f"P{number}", large) or not is_held_out(f"P{number}", small)
    assert not is_held_out(f"P{number}", 0.0)
    assert is_held_out(f"P{number}", 1.0)


def test_about_the_given_fraction_is_held_out() -> None:
    share = np.mean([is_held_out(f"P{number:05d}", 0.1) for number in range(20_000)])
    assert abs(share - 0.1) < 6 * np.sqrt(0.09 / 20_000)


@pytest.mark.parametrize("num_out", [1, 3, -1])
def test_whole_recordings_are_held_out_and_never_trained_on(shards: Path, num_out: int) -> None:
    folder = open_shards(data_recipe(shards))
    everything = TrainingClips(folder, data_recipe(shards), INPUTS, seed=3, batch_size=2)
    names = {folder.metadata(clip).recording for clip in everything.clips}
    steps = np.linspace(0, 1, 10_001).tolist()
    fraction = next(f for f in steps if sum(is_held_out(name, f) for name in names) == num_out % len(names))
    data = data_recipe(shards).model_copy(update={"hold_out": fraction})
    kept = TrainingClips(folder, data, INPUTS, seed=3, batch_size=2)
    out = EvaluationClips(folder, data, INPUTS, "train", held_out=True)
    recordings = [{folder.metadata(clip).recording for clip in clips.clips} for clips in (kept, out)]
    assert recordings[0].isdisjoint(recordings[1])
    assert len(recordings[1]) == num_out % len(names)
    assert {clip.key for clip in kept.clips} | {clip.key for clip in out.clips} == {c.key for c in everything.clips}
    assert len(kept.clips) + len(out.clips) == len(everything.clips)
    schedule = Schedule(len(kept.clips), batch_size=2)
    seen = {key for batch in training_batches(kept, schedule, 0, Position(0, 0), 2) for key in batch.keys}
    assert seen <= {clip.key for clip in kept.clips}


@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, True), (1 - 1e-9, False)])
def test_a_fraction_that_leaves_no_clip_is_refused(shards: Path, fraction: float, held_out: bool) -> None:
    data = data_recipe(shards).model_copy(update={"hold_out": fraction})
    folder = open_shards(data)
    with pytest.raises(UserError, match=r"holds out (nothing|everything) of split 'train'.*choose another fraction"):
        _ = EvaluationClips(folder, data, INPUTS, "train", held_out=True) if held_out else TrainingClips(
            folder, data, INPUTS, seed=3, batch_size=2
        )


def test_every_training_clip_has_a_modality_of_the_student(shards: Path) -> None:
    """Check it at a high drop probability, which still drops and keeps the teacher's other modalities."""
    data = data_recipe(shards, drop=0.9)
    clips = TrainingClips(open_shards(data), data, INPUTS, seed=3, batch_size=8, needed=["audio"])
    assert all(clip.has("audio") for clip in clips.clips)
    schedule = Schedule(len(clips.clips), batch_size=8)
    batches = list(training_batches(clips, schedule, 0, Position(0, 0), 4))
    present_BM = torch.cat([batch.present_BM for batch in batches])
    assert present_BM[:, 2].all()
    assert 0 < int(present_BM[:, 0].sum()) < len(present_BM)
    inputs, present_B1 = batches[0].only(["audio"], data.modalities)
    assert list(inputs) == ["audio"]
    assert len(inputs["audio"]) == len(present_B1) == int(present_B1.sum())
