"""Tests of modality dropout: both draws have one distribution, also with absent modalities; stratified waits less."""

from __future__ import annotations

import runpy
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.recipe import ModalityDropout
from karmma_dist.seeding import fallback_words
from karmma_dist.streaming.dropout import keep_patterns, keep_present

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "dropout_balance.py"
DRAWS = ["independent", "stratified"]
PLACES = 16_000


def recipe(probability: float, draw: str) -> ModalityDropout:
    return ModalityDropout.model_validate({"probability": probability, "draw": draw})


def chi_square_bound(freedom: int) -> float:
    """Return a bound that a chi-square variable exceeds once in e^10 draws (Laurent and Massart 2000, Lemma 1)."""
    return freedom + 2 * np.sqrt(10 * freedom) + 20


def distribution(probability: float, present: tuple[bool, ...]) -> dict[tuple[bool, ...], float]:
    """Return the probability of each subset under independent drops, where one modality is kept if all are dropped."""
    num_present = sum(present)
    chances = {}
    for kept in product([False, True], repeat=len(present)):
        if any(kept) and all(p or not k for k, p in zip(kept, present, strict=True)):
            alone = probability**num_present / num_present if sum(kept) == 1 else 0.0
            chances[kept] = (1 - probability) ** sum(kept) * probability ** (num_present - sum(kept)) + alone
    return chances


def kept_by_loader(dropout: ModalityDropout, present_NM: np.ndarray, seed: int) -> list[tuple[bool, ...]]:
    """Return the modalities that the loader keeps after the draw, place by place."""
    keep_NM = keep_patterns(*present_NM.shape, dropout, seed, epoch=0)
    words = fallback_words(len(present_NM), seed, 0).tolist()
    return [tuple(keep_present(*row).tolist()) for row in zip(keep_NM, present_NM, words, strict=True)]


def chi_square(seen: Counter[tuple[bool, ...]], chances: dict[tuple[bool, ...], float]) -> float:
    assert set(seen) <= set(chances)
    total = sum(seen.values())
    return sum((seen[kept] - total * chance) ** 2 / (total * chance) for kept, chance in chances.items())


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_every_subset_has_the_probability_of_independent_drops(
    modalities: int, probability: float, draw: str
) -> None:
    present = (True,) * modalities
    chances = distribution(probability, present)
    assert sum(chances.values()) == pytest.approx(1)
    kept = kept_by_loader(recipe(probability, draw), np.tile(present, (PLACES, 1)), seed=modalities)
    assert chi_square(Counter(kept), chances) <= chi_square_bound(len(chances) - 1)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_clips_without_some_modalities_keep_the_same_distribution(probability: float, draw: str) -> None:
    """Check it also if presence depends on the place, as for clips of one shard in a lane."""
    random = np.random.default_rng(7)
    for present_NM in (random.random((PLACES, 3)) < 0.6, np.arange(PLACES)[:, None] // [1, 2, 4] % 2 == 1):
        kept = kept_by_loader(recipe(probability, draw), present_NM, seed=3)
        for present in product([False, True], repeat=3):
            seen = Counter(k for k, row in zip(kept, present_NM.tolist(), strict=True) if tuple(row) == present)
            if any(present):
                chances = distribution(probability, present)
                assert chi_square(seen, chances) <= chi_square_bound(len(chances) - 1), present
            else:
                assert set(seen) == {present}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_each_modality_is_dropped_with_its_probability_everywhere(probability: float, draw: str) -> None:
    """Check it also for each place of the runs of 2^M places: the shuffle favours none."""
    kept_NM = keep_patterns(8 * PLACES, 3, recipe(probability, draw), seed=1, epoch=4)
    for rows in (kept_NM, *(kept_NM[place::8] for place in range(8))):
        tolerance = 5 * np.sqrt(probability * (1 - probability) / len(rows))
        assert np.abs(rows.mean(axis=0) - (1 - probability)).max() < tolerance
        pairs = np.array([(rows[:, a] & rows[:, b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))])
        assert np.abs(pairs - (1 - probability) ** 2).max() < 5 * np.sqrt(0.25 / len(rows))


@given(st.integers(1, 3), st.integers(0, 1000))
def test_stratified_dropout_at_one_half_has_every_pattern_per_run(modalities: int, seed: int) -> None:
    patterns = keep_patterns(2**modalities * 5, modalities, recipe(0.5, "stratified"), seed, epoch=1)
    for run in patterns.reshape(5, 2**modalities, modalities):
        assert len({tuple(pattern) for pattern in run}) == 2**modalities


@given(st.integers(1, 4), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from(DRAWS), st.integers(0, 99))
def test_a_clip_keeps_a_modality_that_it_has(
    modalities: int, probability: float, draw: str, seed: int
) -> None:
    present_NM = np.random.default_rng(seed).random((60, modalities)) < 0.5
    for kept, present in zip(kept_by_loader(recipe(probability, draw), present_NM, seed), present_NM, strict=True):
        assert any(kept) == present.any()
        assert not (np.array(kept) & ~present).any()


def test_an_empty_pattern_keeps_each_present_modality_equally_often() -> None:
    present = np.array([True, False, True])
    chosen = [keep_present(np.zeros(3, dtype=bool), present, word) for word in range(1000)]
    assert all(kept.sum() == 1 and not kept[1] for kept in chosen)
    assert sum(kept[0] for kept in chosen) == 500


@given(st.integers(1, 5), st.sampled_from(DRAWS), st.integers(0, 99))
def test_certain_dropout_keeps_exactly_one_modality_of_each_clip(num: int, draw: str, seed: int) -> None:
    """Experts of late fusion are trained so: each clip has one of its own modalities, all equally often."""
    present_NM = np.random.default_rng(seed).random((600, num)) < 0.7
    present_NM[:, 0] |= ~present_NM.any(axis=1)
    kept_NM = np.array(kept_by_loader(recipe(1.0, draw), present_NM, seed))
    assert (kept_NM.sum(axis=1) == 1).all()
    assert not (kept_NM & ~present_NM).any()
    expected_M = (present_NM / present_NM.sum(axis=1, keepdims=True)).sum(axis=0)
    assert (np.abs(kept_NM.sum(axis=0) - expected_M) <= 5 * np.sqrt(expected_M)).all()


@given(st.integers(0, 2**16), st.integers(1, 5), st.integers(0, 2**32))
def test_a_clip_keeps_a_student_modality_and_others_as_drawn(
    bits: int, num: int, word: int
) -> None:
    keep, present, needed = (np.array([bits >> (part * num + m) & 1 == 1 for m in range(num)]) for part in range(3))
    kept = keep_present(keep, present, word, needed)
    assert not (kept & ~present).any()
    assert (kept & needed).any() or not (present & needed).any()
    if (keep & present & needed).any():
        assert np.array_equal(kept, keep & present)
    else:
        assert kept.sum() - (keep & present).sum() == (present & needed).any()
    all_needed = np.ones(num, dtype=bool)
    assert np.array_equal(keep_present(keep, present, word, all_needed), keep_present(keep, present, word))


def test_without_dropout_everything_is_kept() -> None:
    assert keep_patterns(10, 3, ModalityDropout(), seed=0, epoch=0).all()


@pytest.mark.parametrize(
    ("ranks", "clips", "independent", "stratified"),
    [(8, 8, 1.23, 1.01), (64, 6, 1.45, 1.31), (64, 8, 1.38, 1.01), (64, 16, 1.27, 1.01), (256, 8, 1.46, 1.01)],
)
def test_ranks_wait_less_for_the_slowest_with_stratified_drops(
    ranks: int, clips: int, independent: float, stratified: float
) -> None:
    slowest_over_mean = runpy.run_path(str(BENCHMARK))["slowest_over_mean"]
    ratios = [slowest_over_mean(ranks, clips, draw, num_steps=60) for draw in DRAWS]
    assert ratios == pytest.approx([independent, stratified], abs=0.05)
    assert ratios[1] < ratios[0] - 0.1
