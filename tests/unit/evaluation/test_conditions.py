"""Masks are a function of (seed, clip, modality), nested in the drop probability, and distributed as in the paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import DROP_PROBS, Condition, build_conditions, keep
from karmma_dist.seeding import uniform

MODALITIES = ("video", "flow", "audio", "detections")

probabilities = st.floats(0, 1)
seeds = st.integers(0, 1000)
subsets = st.lists(st.sampled_from(MODALITIES), min_size=1, unique=True).map(tuple)


@st.composite
def clips(draw: st.DrawFn) -> tuple[list[str], torch.Tensor]:
    """Draw distinct keys and arbitrary presence; a clip may have no modality."""
    keys = draw(st.lists(st.text("abc_0123", min_size=1, max_size=8), min_size=1, max_size=12, unique=True))
    present = draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=len(keys), max_size=len(keys)))
    return keys, torch.tensor(present)


def named(condition: Condition) -> torch.Tensor:
    return torch.tensor([name in condition.modalities for name in MODALITIES])


@given(clips(), subsets, probabilities, seeds)
def test_kept_modalities_are_present_and_named_and_never_empty(batch, subset, probability, seed):
    keys, present_BM = batch
    condition = Condition(subset, probability, seed)
    keep_BM = keep(condition, keys, present_BM, MODALITIES)
    eligible_BM = present_BM & named(condition)
    assert keep_BM.dtype == torch.bool
    assert not (keep_BM & ~eligible_BM).any()
    assert torch.equal(keep_BM.any(dim=1), eligible_BM.any(dim=1))


@given(clips(), subsets, probabilities, seeds, st.randoms())
def test_a_clips_mask_does_not_depend_on_its_batch(batch, subset, probability, seed, random):
    keys, present_BM = batch
    condition = Condition(subset, probability, seed)
    together_BM = keep(condition, keys, present_BM, MODALITIES)
    order = random.sample(range(len(keys)), len(keys))
    shuffled_BM = keep(condition, [keys[i] for i in order], present_BM[order], MODALITIES)
    assert torch.equal(shuffled_BM, together_BM[order])
    for row, key in enumerate(keys):
        assert torch.equal(keep(condition, [key], present_BM[row : row + 1], MODALITIES)[0], together_BM[row])


@given(clips(), probabilities, seeds)
def test_a_clips_mask_does_not_depend_on_the_other_modalities(batch, probability, seed):
    keys, present_BM = batch
    condition = Condition(("video", "audio"), probability, seed)
    wide_BM = keep(condition, keys, present_BM, MODALITIES)
    narrow_BM = keep(condition, keys, present_BM[:, [2, 0]], ("audio", "video"))
    assert torch.equal(narrow_BM, wide_BM[:, [2, 0]])


@given(clips(), subsets, st.tuples(probabilities, probabilities), seeds)
def test_dropped_modalities_stay_dropped_at_a_higher_probability(batch, subset, pair, seed):
    keys, present_BM = batch
    low_BM, high_BM = (keep(Condition(subset, p, seed), keys, present_BM, MODALITIES) for p in sorted(pair))
    assert not (high_BM & ~low_BM).any()


shares = st.floats(0.001, 1).map(lambda share: f"audio:{share:.3f}")


@given(clips(), shares, seeds)
def test_a_missing_share_takes_its_modality_and_nothing_else(batch, share, seed):
    keys, present_BM = batch
    keep_BM = keep(Condition(MODALITIES, seed=seed, missing=share), keys, present_BM, MODALITIES)
    audio = MODALITIES.index("audio")
    others = [column for column in range(len(MODALITIES)) if column != audio]
    assert torch.equal(keep_BM[:, others], present_BM[:, others])
    assert torch.equal(keep_BM.any(dim=1), present_BM.any(dim=1))  # the last modality of a clip stays
    assert not (keep_BM & ~present_BM).any()


@given(clips(), st.tuples(shares, shares), seeds)
def test_clips_lacking_a_modality_lack_it_at_larger_shares(batch, pair, seed):
    keys, present_BM = batch
    low, high = sorted(pair, key=lambda share: float(share.split(":")[1]))
    nested = [Condition(MODALITIES, seed=seed, missing=missing) for missing in (low, high)]
    low_BM, high_BM = (keep(condition, keys, present_BM, MODALITIES) for condition in nested)
    assert not (high_BM & ~low_BM).any()


@given(clips(), seeds)
def test_a_missing_share_of_one_is_the_subset_without(batch, seed):
    keys, present_BM = batch
    other = tuple(name for name in MODALITIES if name != "audio")
    keep_BM = keep(Condition(MODALITIES, seed=seed, missing="audio:1"), keys, present_BM, MODALITIES)
    has_other_B = present_BM[:, [MODALITIES.index(name) for name in other]].any(dim=1)
    without_BM = keep(Condition(other), keys, present_BM, MODALITIES)
    assert torch.equal(keep_BM[has_other_B], without_BM[has_other_B])


def test_a_missing_share_is_the_share_of_many_clips():
    keys, names = [f"P01_{number}" for number in range(20_000)], MODALITIES[:3]
    keep_BM = keep(Condition(names, missing="audio:0.3"), keys, torch.ones(20_000, 3, dtype=torch.bool), names)
    assert (~keep_BM[:, 2]).double().mean() == pytest.approx(0.3, abs=0.013)  # four standard deviations


@pytest.mark.parametrize("probability", [0.2, 0.5, 0.9])
def test_subsets_follow_the_papers_distribution(probability):
    num, names = 20_000, MODALITIES[:3]
    keys = [f"P01_{number}" for number in range(num)]
    keep_BM = keep(Condition(names, probability, 3), keys, torch.ones(num, 3, dtype=torch.bool), names)
    for kept in itertools.product((False, True), repeat=3):
        size = sum(kept)
        expected = probability ** (3 - size) * (1 - probability) ** size if size else 0.0
        expected += probability**3 / 3 if size == 1 else 0.0
        actual = int((keep_BM == torch.tensor(kept)).all(dim=1).sum()) / num
        assert abs(actual - expected) <= 5 * (expected * (1 - expected) / num) ** 0.5


def test_seeds_draw_differently():
    keys = [str(number) for number in range(200)]
    present_BM = torch.ones(200, 4, dtype=torch.bool)
    first, second = (keep(Condition(MODALITIES, 0.5, seed), keys, present_BM, MODALITIES) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_uniform_numbers_are_the_top_53_bits_of_blake2b():
    """Compare with the digests that `printf '0\\0P01_01_0\\0video' | b2sum -l 64` prints."""
    assert uniform(0, "P01_01_0", "video") == (0xF466C0CD9C8D4985 >> 11) / 2**53
    assert uniform(7, "P01_01_0", "audio") == (0xBBBE619921E7ADCB >> 11) / 2**53


def test_without_a_choice_everything_is_present():
    assert build_conditions(MODALITIES) == [Condition(MODALITIES)]


def test_all_subsets_are_built_once_each_in_the_models_order():
    conditions = build_conditions(MODALITIES[:3], subsets=True)
    assert len(conditions) == 2**3 - 1
    assert {c.modalities for c in conditions} == {
        ("video",), ("flow",), ("audio",), ("video", "flow"), ("video", "audio"), ("flow", "audio"), MODALITIES[:3]
    }  # fmt: skip


def test_a_sweep_repeats_only_probabilities_that_drop_something():
    conditions = build_conditions(MODALITIES, sweep=True, num_seeds=3)
    assert [c.drop_prob for c in conditions if c.seed == 0] == list(DROP_PROBS)
    assert sum(c.drop_prob == 0 for c in conditions) == 1
    assert len(conditions) == 1 + 9 * 3


def test_drop_probability_applies_to_every_subset():
    conditions = build_conditions(["video", "flow"], subsets=True, drop_prob=0.4, num_seeds=2)
    assert conditions == [
        Condition(("video",), 0.4, 0),
        Condition(("flow",), 0.4, 0),
        Condition(("video", "flow"), 0.4, 0),
        Condition(("video", "flow"), 0.4, 1),
    ]


def test_subsets_and_sweep_share_no_condition():
    conditions = build_conditions(MODALITIES[:3], subsets=True, sweep=True, num_seeds=2)
    assert len(conditions) == len(set(conditions)) == 7 + 9 * 2


def test_missing_shares_are_added_for_every_seed_and_set():
    conditions = build_conditions(MODALITIES[:3], subsets=True, num_seeds=2, missing=["A:0.50", "audio:0.5", "V:1"])
    added = [c for c in conditions if c.missing is not None]
    with_audio = [("video", "audio"), ("flow", "audio"), MODALITIES[:3]]
    lacking_audio = {(c.modalities, c.seed) for c in added if c.missing == "audio:0.5"}
    assert lacking_audio == set(itertools.product(with_audio, (0, 1)))
    assert {c.missing for c in added} == {"audio:0.5", "video:1"}
    assert len(added) == 12
    assert conditions[: len(conditions) - 12] == build_conditions(MODALITIES[:3], subsets=True)


def test_chosen_modalities_narrow_every_condition_and_take_the_models_order():
    conditions = build_conditions(MODALITIES, modalities=["audio", "video"], subsets=True, sweep=True)
    assert {name for c in conditions for name in c.modalities} == {"video", "audio"}
    assert max((c.modalities for c in conditions), key=len) == ("video", "audio")


def test_settings_without_effect_cause_a_warning(caplog):
    build_conditions(["video"], drop_prob=0.5, num_seeds=4)
    assert "seeds" in caplog.text
    assert "no effect on a single modality" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Condition(("video",), 1.5), "1.5"),
        (lambda: Condition(("video",), 0.5, -1), "seed -1"),
        (lambda: Condition(()), "at least one modality"),
        (lambda: Condition(("video", "video")), "once"),
        (lambda: Condition(("video", "audio"), 0.5, missing="audio:0.5"), "not together"),
        (lambda: Condition(("video", "audio"), corrupt="video:blur:3", missing="audio:0.5"), "not together"),
        (lambda: Condition(("video", "audio"), missing="flow:0.5"), "'flow' is not one of"),
        (lambda: Condition(("audio",), missing="audio:0.5"), "without another modality"),
        (lambda: build_conditions(["video", "audio"], missing=["audio"]), "as in audio:0.5"),
        (lambda: build_conditions(["video", "audio"], missing=["audio:nan"]), "as in audio:0.5"),
        (lambda: build_conditions(["video", "audio"], missing=["V,A:0.5"]), "as in audio:0.5"),
        (lambda: build_conditions(["video", "audio"], missing=["audio:0"]), "audio:0: the share"),
        (lambda: build_conditions(["video", "audio"], missing=["audio:50"]), "audio:50: the share"),
        (lambda: build_conditions(["video", "audio"], missing=["gaze:0.5"]), "unknown modality 'gaze'"),
        (lambda: build_conditions(["video"], missing=["video:0.5"]), "without another modality"),
        (lambda: build_conditions(["video"], modalities=["audio"]), "'audio'"),
        (lambda: build_conditions(["video"], num_seeds=0), "seeds 0"),
        (lambda: keep(Condition(("audio",)), ["a"], torch.ones(1, 1).bool(), ["video"]), "'audio'"),
    ],
)
def test_bad_choices_are_one_line_that_names_them(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
