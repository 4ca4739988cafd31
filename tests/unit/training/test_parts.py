"""Rendezvous, learning rate, losses and damage limit: the parts of training that need no ranks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError
from karmma_dist.models.losses import cross_entropy, distillation
from karmma_dist.recipe import OptimizerRecipe
from karmma_dist.streaming.batch import Batch, Damage, collate
from karmma_dist.streaming.worker_status import LoadStats
from karmma_dist.training.fault_tolerance.damaged_clips import DamageLog
from karmma_dist.training.optim import learning_rate
from karmma_dist.training.tracking import Averages, loading_metrics, loading_sums

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}


def test_a_process_alone_is_rank_0_of_1() -> None:
    world = find_world({})
    assert (world.rank, world.size, world.address, world.is_main) == (0, 1, "127.0.0.1", True)


def test_torchruns_variables_are_read() -> None:
    assert find_world(TORCHRUN) == World(3, 1, 4, "n1", 1234)


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_incomplete_environment_is_refused_naming_the_missing_variable(missing: str) -> None:
    with pytest.raises(UserError, match=rf"but {missing} missing"):
        find_world({name: value for name, value in TORCHRUN.items() if name != missing})


def test_sruns_variables_are_read() -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    assert find_world({**slurm, "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}) == World(5, 1, 8, "n0", 29500)
    assert find_world({**slurm, "MASTER_ADDR": "n0"}).port == 20077
    with pytest.raises(UserError, match="SLURM_LOCALID missing"):
        find_world({name: value for name, value in slurm.items() if name != "SLURM_LOCALID"})
    with pytest.raises(UserError, match="SLURM_PROCID=x is not a number"):
        find_world({**slurm, "SLURM_PROCID": "x", "MASTER_ADDR": "n0"})


def test_linear_decay_is_a_line_back_to_start_lr() -> None:
    recipe = OptimizerRecipe(lr=1.0, start_lr=0.0, warmup_epochs=1, schedule="linear")
    rates = [learning_rate(recipe, step, 4, 13, 32) for step in range(13)]
    assert rates[:4] == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert rates[4:] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 4.0), ("linear", 16.0)])
def test_rates_follow_the_batch_size_as_the_recipe_says(scaling: str, factor: float) -> None:
    plain = OptimizerRecipe(lr=1e-3, start_lr=1e-5, warmup_epochs=1)
    scaled = OptimizerRecipe.model_validate({**plain.model_dump(), "lr_batch_size": 6, "lr_scaling": scaling})
    for step in range(30):
        expected = factor * learning_rate(plain, step, 10, 30, 96)
        assert learning_rate(scaled, step, 10, 30, 96) == pytest.approx(expected)
        assert learning_rate(scaled, step, 10, 30, 6) == pytest.approx(expected / factor)


def test_scaling_without_a_batch_size_to_scale_from_is_refused() -> None:
    with pytest.raises(ValueError, match="lr_batch_size"):
        OptimizerRecipe(lr_scaling="sqrt")


@given(st.integers(1, 20), st.integers(1, 30), st.floats(0, 1), st.sampled_from(["cosine", "linear"]))
def test_rate_starts_and_ends_at_start_lr_and_peaks_at_lr(
    steps_per_epoch: int, epochs: int, part: float, schedule: str
) -> None:
    """Check warm-ups of any length up to that of the run."""
    recipe = OptimizerRecipe.model_validate(
        {"lr": 1e-3, "start_lr": 1e-5, "warmup_epochs": part * epochs, "schedule": schedule}
    )
    total = steps_per_epoch * epochs
    rates = [learning_rate(recipe, step, steps_per_epoch, total, 32) for step in range(total)]
    assert max(rates) <= 1e-3 + 1e-12
    assert min(rates) >= 1e-5 - 1e-12
    assert rates[-1] == pytest.approx(1e-5 if total > 1 else 1e-3)
    warmup = recipe.warmup_epochs * steps_per_epoch
    if warmup >= 1 and total > 1:
        assert rates[0] == pytest.approx(1e-5)
    rising = [later - earlier for earlier, later in itertools.pairwise(rates[: min(total - 1, int(warmup) + 1)])]
    assert all(step > 0 for step in rising)


def test_a_run_of_one_step_has_the_full_rate() -> None:
    for warmup in (0, 0.5, 1):
        assert learning_rate(OptimizerRecipe(lr=0.1, start_lr=0.0, warmup_epochs=warmup), 0, 1, 1, 32) == 0.1


def test_losses_average_over_heads_and_vanish_for_a_perfect_student() -> None:
    torch.manual_seed(0)
    student = {"verb": torch.randn(4, 5), "noun": torch.randn(4, 7)}
    teacher = {"verb": torch.randn(4, 5), "noun": torch.randn(4, 7)}
    labels = {"verb": torch.tensor([0, 1, 2, 3]), "noun": torch.tensor([6, 5, 4, 3])}
    per_head = [cross_entropy({head: student[head]}, {head: labels[head]}) for head in student]
    torch.testing.assert_close(cross_entropy(student, labels), sum(per_head) / 2)
    softened = {head: (logits / 2.0).log_softmax(-1) for head, logits in student.items()}
    assert float(distillation(student, softened, 2.0)) == pytest.approx(0, abs=1e-6)
    p, q = teacher["verb"].softmax(-1), student["verb"].softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(distillation({"verb": student["verb"]}, {"verb": p.log()}, 1.0), by_hand)


def damaged(*keys: str) -> Batch:
    batch = collate([None], ["audio"], ["verb"], epoch=1, step=7)
    batch.damage = [Damage("train-000000.tar", key, f"{key}.audio.flac", "crc32 differs") for key in keys]
    return batch


def test_damage_is_written_once_per_clip_and_counted_over_ranks(tmp_path: Path) -> None:
    """Check that ranks whose total exceeds the limit of 2 clips all end, though no rank exceeds it alone."""
    logs = [DamageLog(tmp_path, num_clips=100, max_fraction=0.02, rank=rank) for rank in range(2)]
    logs[0].note(damaged("a", "a"))
    logs[1].note(damaged("a", "b"))
    for log in logs:
        assert log.num_noted
    events = [event for log in logs for event in log.take()]
    for log in logs:
        log.share(events)
    lines = [json.loads(line) for line in (tmp_path / "damage.jsonl").read_text().splitlines()]
    assert [(line["key"], line["rank"]) for line in lines] == [("a", 0), ("b", 1)]
    assert lines[0] == {
        "epoch": 1, "step": 7, "rank": 0, "shard": "train-000000.tar", "key": "a", "member": "a.audio.flac",
        "what": "crc32 differs",
    }  # fmt: skip
    logs[0].note(damaged("b"))
    assert not logs[0].num_noted
    logs[1].note(damaged("c"))
    events = [event for log in logs for event in log.take()]
    for log in logs:
        with pytest.raises(UserError, match=r"3 of 100 clips are damaged.*allows 2.*c\.audio\.flac: crc32 differs"):
            log.share(events)


def test_resumed_run_remembers_its_damage_and_does_not_rewrite_it(tmp_path: Path) -> None:
    first = DamageLog(tmp_path, num_clips=100, max_fraction=0.02)
    first.note(damaged("a", "b"))
    first.flush()
    with open(tmp_path / "damage.jsonl", "a") as file:
        file.write('{"epoch": 1, "st')  # a crash in the middle of a line
    resumed = DamageLog(tmp_path, num_clips=100, max_fraction=0.02)
    resumed.remember(resumed.written())
    resumed.note(damaged("a", "b"))
    assert (resumed.num_damaged, resumed.num_noted) == (2, 0)
    resumed.note(damaged("c"))
    with pytest.raises(UserError, match="3 of 100 clips are damaged"):
        resumed.share(resumed.take())


def test_log_shows_decoding_time_per_clip_and_read_rate() -> None:
    averages = Averages()
    for decoded, seconds in ((1, 0.010), (3, 0.050)):
        batch = collate([None], ["video", "audio"], ["verb"])
        batch.stats = LoadStats(1.0, 0.5, 2_000_000, 4, {"video": seconds}, {"video": decoded}, queue_depth=decoded)
        averages.add(loading_sums(batch, ["video", "audio"]))
    means = averages.take() | {"loss": 1.0}
    assert loading_metrics(means, ["video", "audio"]) == pytest.approx(
        {"decode_ms_video": 15.0, "decode_ms_audio": 0.0, "read_mb_per_s": 4.0, "queue_depth": 2.0}
    )
    assert means == {"loss": 1.0}
