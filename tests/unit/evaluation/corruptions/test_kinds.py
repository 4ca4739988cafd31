"""A broken sensor counts as present, gets worse with severity, is equal for every model, and costs one encoder pass."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.corruptions.kinds import KINDS, Corruption, parse_corruption, parse_corruptions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.report import terminal
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.rows import terminal_rows
from karmma_dist.evaluation.report.write import write_report
from karmma_dist.evaluation.summary import summarise
from karmma_dist.modalities.audio import SAMPLE_RATE
from karmma_dist.modalities.breaking import span
from karmma_dist.modalities.flow.store import quantise_flow
from kits.decoding import break_arrays, break_sound
from kits.evaluation import but_for_rounding, flat
from kits.sensors import (
    EVERY,
    HERE,
    MODALITIES,
    PIXELS,
    SENSORS,
    Average,
    boxes,
    conditions_for,
    keys,
    make_batches,
    pixels,
    recorded_with,
    seeds,
    shares,
    sound,
    uncut,
    windows_of,
)


@given(shares, shares, st.integers(1, 50), seeds, keys)
def test_a_longer_failure_contains_a_shorter_one(one, other, num, seed, key):
    short, long = (span(num, share, f"{seed}/{key}") for share in sorted((one, other)))
    assert 0 <= long.start <= short.start
    assert short.stop <= long.stop <= num
    assert short.stop - short.start == max(round(min(one, other) * num), 1)


def test_failures_start_at_any_moment():
    starts = [span(10, 0.4, f"0/clip_{number}").start for number in range(300)]
    assert set(starts) == set(range(7))


@pytest.mark.parametrize(("name", "modality", "effect"), PIXELS)
def test_frames_are_broken_per_clip_and_more_with_every_severity(name, modality, effect):
    clips, names = pixels(modality, num_frames=10), ["a", "b", "c"]
    before, last = clips.clone(), 0.0
    for amount in KINDS[name].amounts:
        broken = break_arrays(modality, effect, amount, clips, names, 5)
        assert (broken.dtype, broken.shape) == (clips.dtype, clips.shape)
        alone = [break_arrays(modality, effect, amount, clips[n : n + 1], names[n : n + 1], 5)[0] for n in (2, 0, 1)]
        assert torch.equal(broken, torch.stack([alone[1], alone[2], alone[0]]))
        distance = float((broken.float() - clips.float()).abs().mean())
        assert distance > last
        last = distance
    assert torch.equal(clips, before)


@given(shares, seeds, keys)
@settings(max_examples=30)
def test_a_frozen_camera_repeats_its_last_frame(share, seed, key):
    clip, held = pixels("video", 1), span(6, share, f"{seed}/{key}")
    frozen = break_arrays("video", "frozen", share, clip, [key], seed)[0]
    black = break_arrays("video", "black", share, clip, [key], seed)[0]
    still = break_arrays("flow", "still", share, pixels("flow", 1), [key], seed)[0]
    for number in range(6):
        hit = held.start <= number < held.stop
        assert torch.equal(frozen[number], clip[0, held.start if hit else number])
        assert torch.equal(black[number], clip[0, number] * (not hit))
        assert torch.equal(still[number], torch.full_like(still[number], 128) if hit else pixels("flow", 1)[0, number])


def test_no_motion_equals_the_flow_that_packing_stores():
    still = break_arrays("flow", "still", 1.0, pixels("flow", 1), ["k"], 0)
    assert set(quantise_flow(np.zeros((4, 4, 2), np.float32), 8.0).flatten().tolist()) == set(still.flatten().tolist())


def test_blur_keeps_flat_frames_and_the_mean_of_all_frames():
    flat = torch.full((1, 2, 20, 30, 3), 77, dtype=torch.uint8)
    assert torch.equal(break_arrays("video", "blur", 0.08, flat, ["k"], 0), flat)
    dot = torch.zeros(1, 1, 41, 41, 3, dtype=torch.uint8)
    dot[:, :, 20, 20] = 255
    spread = break_arrays("video", "blur", 0.02, dot, ["k"], 0)[0, 0, :, :, 0].double()
    for other in (spread.T, spread.flip(0)):
        assert float((spread - other).abs().max()) <= 1  # two averages in turn: a half may round either way
    assert float(spread.sum()) == pytest.approx(255, rel=0.05)
    of_line = math.erf(0.5 / (0.02 * 41 * math.sqrt(2)))
    assert float(spread[20, 20] / 255) == pytest.approx(of_line**2, rel=0.02)


@pytest.mark.parametrize("ratio_db", KINDS["audio:noise"].amounts)
def test_audio_noise_has_the_stated_signal_to_noise_ratio(ratio_db):
    clean = sound(5 * SAMPLE_RATE)
    noise = break_sound("noise", ratio_db, clean, "k", 0).astype(float) - clean
    measured = 10 * np.log10(np.mean(clean.astype(float) ** 2) / np.mean(noise**2))
    assert measured == pytest.approx(ratio_db, abs=0.1)


def test_silence_stays_silence_and_loud_sound_is_clipped_not_wrapped():
    silence = np.zeros(1000, np.int16)
    assert not break_sound("noise", -5, silence, "k", 0).any()
    loud = np.full(20_000, 32_767, np.int16)
    assert break_sound("noise", 20, loud, "k", 0).min() > 0


@given(st.integers(1, 5), seeds, keys)
@settings(max_examples=20)
def test_a_muted_microphone_is_silent_for_the_given_share(severity, seed, key):
    clean = np.full(4000, 9, np.int16)
    share = Corruption("audio:mute", severity).amount
    assert int((break_sound("mute", share, clean, key, seed) == 0).sum()) == round(4000 * share)


@given(st.floats(0, 1.5))
@settings(max_examples=20)
def test_desynchronized_windows_come_from_an_earlier_moment(seconds):
    clean, moments_s = sound(2 * SAMPLE_RATE), np.array([0.9, 1.2, 1.7])
    seconds = round(seconds * SAMPLE_RATE) / SAMPLE_RATE
    late = break_sound("late", seconds, clean, "k", 0)
    heard = windows_of(uncut(late, tuple(moments_s)))
    assert np.array_equal(heard, windows_of(uncut(clean, tuple(moments_s - seconds))))


def test_sound_later_than_the_clip_is_long_is_silence():
    assert not break_sound("late", 2.0, sound(SAMPLE_RATE), "k", 0).any()


def test_boxes_lost_at_one_severity_are_lost_at_higher_ones():
    clean, lost = boxes(40), torch.zeros(40, 6, 4, dtype=torch.bool)
    for amount in KINDS["detections:dropped"].amounts:
        kept = break_arrays("detections", "dropped", amount, clean, [f"clip_{number}" for number in range(40)], 3)
        gone = (kept == 0).all(dim=-1)
        assert torch.equal(kept[~gone], clean[~gone])
        assert (gone | ~lost).all()
        assert float(gone.double().mean()) == pytest.approx(amount, abs=0.06)
        lost = gone


def test_another_seed_changes_only_random_corruptions():
    for name, modality, effect in PIXELS:
        amount = KINDS[name].amounts[1]
        first, second = (break_arrays(modality, effect, amount, pixels(modality), ["a", "b", "c"], n) for n in (0, 1))
        assert torch.equal(first, second) != KINDS[name].is_random


def test_a_broken_sensor_equals_a_dataset_recorded_with_it():
    conditions = conditions_for(*EVERY, subsets=True, drop_prob=0.3, num_seeds=2)
    rows = evaluate(Average(), make_batches(), conditions, device="cpu", sensors=SENSORS).rows
    assert [row.corrupt for row in rows] == [condition.corrupt for condition in conditions]
    for condition, row in zip(conditions, rows, strict=True):
        recorded = [recorded_with(batch, condition) for batch in make_batches()]
        alone = evaluate(Average(), recorded, [replace(condition, corrupt=None)], device="cpu").rows[0]
        assert flat(row) == but_for_rounding(replace(alone, corrupt=condition.corrupt))
    losses = [row.figures["verb_loss"] for row in rows]
    differing = {row.corrupt for row, loss in zip(rows, losses, strict=True) if loss not in losses[:30]}
    assert differing == set(EVERY)


def test_a_broken_sensor_still_counts_as_present():
    rows = evaluate(Average(), make_batches(), conditions_for(*EVERY), device="cpu", sensors=SENSORS).rows
    counts = [(row.num_clips, row.num_without, row.num_present, row.num_kept) for row in rows]
    assert all(count == counts[0] for count in counts)


def test_only_the_encoder_of_the_broken_sensor_runs_again():
    model, batches = Average(), make_batches()
    conditions = conditions_for("video:blur:1", "video:frozen:5", "audio:mute:2", subsets=True, sweep=True)
    evaluate(model, batches, conditions, device="cpu", sensors=SENSORS)
    present = {m: sum(int(batch.present_BM[:, c].sum()) for batch in batches) for c, m in enumerate(MODALITIES)}
    times = {"video": 3, "flow": 1, "audio": 2, "detections": 1}
    assert model.num_encoded == {name: times[name] * num for name, num in present.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_failures_do_not_depend_on_the_batch_size(batch_size):
    conditions = conditions_for(*EVERY)
    rows = evaluate(Average(), make_batches(batch_size=batch_size), conditions, device="cpu", sensors=SENSORS).rows
    expected = evaluate(Average(), make_batches(), conditions, device="cpu", sensors=SENSORS).rows
    for row, other in zip(rows, expected, strict=True):
        inexact = {name: value for name, value in other.figures.items() if find_figure(name).metric.lower_is_better}
        near = {name: pytest.approx(value, rel=1e-5) for name, value in inexact.items()}
        assert row == replace(other, figures=other.figures | near)


def test_only_conditions_with_the_broken_modality_are_repeated():
    conditions = conditions_for("audio:desync:3", subsets=True)
    assert len(conditions) == 15 + 8
    assert all("audio" in condition.modalities for condition in conditions[15:])
    assert [condition.corrupt for condition in conditions[:15]] == [None] * 15


def test_only_random_failures_depend_on_the_seed():
    conditions = conditions_for("video:frozen:2", "video:blur:4", num_seeds=3)
    assert [(condition.corrupt, condition.seed) for condition in conditions] == [
        (None, 0), ("video:frozen:2", 0), ("video:frozen:2", 1), ("video:frozen:2", 2), ("video:blur:4", 0),
    ]  # fmt: skip
    rows = evaluate(Average(), make_batches(), conditions, device="cpu", sensors=SENSORS).rows
    assert len({row.figures["verb_loss"] for row in rows}) == 5


def test_the_suite_is_every_kind_of_the_models_sensors():
    names = {corruption.name for corruption in parse_corruptions(["suite"], ["video", "audio"])}
    assert names == {name for name in KINDS if name.startswith(("video:", "audio:"))}
    assert len(parse_corruptions(["suite", "video:blur:3"], MODALITIES)) == 3 * len(HERE)


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 5))
def test_a_corruption_round_trips_through_its_text(name, severity):
    corruption = parse_corruption(f"{name}:{severity}")
    assert (corruption.name, corruption.severity) == (name, severity)
    assert parse_corruption(str(corruption)) == corruption
    assert corruption.meaning


def test_letters_name_sensors_too():
    assert parse_corruption("V:blur:3") == parse_corruption("video:blur:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video", "video:frozen, video:black, video:blur, video:noise"),
        ("video:blurr:3", "no 'video:blurr' (did you mean 'video:blur'"),
        ("lidar:blur:3", "camera:frozen"),
        ("video:blur", "severity ''"),
        ("video:blur:0", "severity '0' is not 1"),
        ("video:blur:6", "severity '6' is not 1"),
        ("video:blur:3:4", "severity '3:4'"),
        ("video:blur:²", "severity '²'"),
        ("detections:dropped:3", "breaks detections, which is not evaluated here: video, audio"),
    ],
)
def test_a_wrong_corruption_is_one_line_with_the_choices(text, message):
    with pytest.raises(UserError, match="corruption") as caught:
        build_conditions(["video", "audio"], corrupt=[text])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prepared_batches_have_no_sensor_to_break():
    prepared = [SENSORS.intact(batch) for batch in make_batches()]
    with pytest.raises(UserError, match="video:blur:3"):
        evaluate(Average(), prepared, conditions_for("video:blur:3"), device="cpu")


def test_averages_and_curves_use_intact_sensors_only(tmp_path: Path):
    choices: dict[str, object] = {"subsets": True, "sweep": True, "num_seeds": 2}
    intact = evaluate(Average(), make_batches(), conditions_for(**choices), device="cpu", sensors=SENSORS)
    broken = evaluate(Average(), make_batches(), conditions_for(*EVERY, **choices), device="cpu", sensors=SENSORS)
    assert broken.rows[: len(intact.rows)] == intact.rows
    assert summarise(broken.rows) == summarise(intact.rows)
    text = write_report(tmp_path, ReportContent("t", {"m": broken})).read_text()
    assert "corruptions.png" in text
    assert (tmp_path / "corruptions.png").is_file()
    text = write_report(tmp_path, ReportContent("t", {"m": intact})).read_text()
    assert "Broken sensors" not in text


def test_the_report_names_every_corruption_and_its_cost(tmp_path: Path):
    results = evaluate(Average(), make_batches(), conditions_for(*EVERY), device="cpu", sensors=SENSORS)
    rows = [replace(row, figures=row.figures | {"action_top1": 50.0 - 5 * (row.corrupt is not None)})
            for row in results.rows]  # fmt: skip
    text = write_report(tmp_path, ReportContent("t", {"m": replace(results, rows=rows)})).read_text()
    for name in EVERY:
        assert f"| {name} | {parse_corruption(name).meaning} | 45.00 (-5.00) |" in text
    assert "| average | relative drop (%) | 10.00 |" in text
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_table(terminal_rows(results, "m"), console)
    assert " audio:mute:3 " in console.export_text()  # and no emoji
