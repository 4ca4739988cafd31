"""One pass that encodes each clip once gives the same results as running the model anew under every condition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.streaming.batch import Batch, Damage
from kits.evaluation import but_for_rounding, flat
from kits.fusion import CONDITIONS, HEADS, MODALITIES, WIDTH, Fusion, make_batch, make_batches, naive_row, singles


def test_encoding_once_equals_running_every_condition_anew():
    batches = make_batches()
    results = evaluate(Fusion().eval(), batches, CONDITIONS, device="cpu")
    for condition, row in zip(CONDITIONS, results.rows, strict=True):
        assert (row.modalities, row.drop_prob, row.seed) == (
            condition.modalities, condition.drop_prob, condition.seed
        )  # fmt: skip
        expected = naive_row(Fusion().eval(), singles(batches), condition)
        assert {name: row.to_dict()[name] for name in expected} == expected


def test_encoders_run_once_and_fusion_once_per_distinct_mask():
    batches, model = make_batches(), Fusion()
    evaluate(model, batches, CONDITIONS, device="cpu")
    num_present = {m: sum(int(b.present_BM[:, c].sum()) for b in batches) for c, m in enumerate(MODALITIES)}
    assert model.num_encoded == num_present
    assert model.num_fused <= len(batches) * 7 < len(batches) * len(CONDITIONS)


def test_encoders_of_modalities_that_no_condition_uses_do_not_run():
    model = Fusion()
    evaluate(model, make_batches(), [Condition(("audio",)), Condition(("video", "audio"), 0.5)], device="cpu")
    assert model.num_encoded["flow"] == 0
    assert model.num_encoded["audio"] > 0


@pytest.mark.parametrize("batch_size", [1, 5, 37, 64])
def test_results_do_not_depend_on_the_batch_size(batch_size):
    expected = evaluate(Fusion(), make_batches(), CONDITIONS, device="cpu").to_dict()
    actual = evaluate(Fusion(), make_batches(batch_size=batch_size), CONDITIONS, device="cpu").to_dict()
    assert flat(actual) == but_for_rounding(expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_gathers_the_rows_of_one(num_ranks):
    """Deal 37 clips in batches of 8 in turn: with 2 and 3 ranks, some ranks get a batch that is all padding."""
    batches = make_batches()
    expected = evaluate(Fusion(), batches, CONDITIONS, device="cpu")
    assert expected.summary.num_clips == 37
    dealt = [*batches, *(make_batch([], 8, HEADS) for _ in range(-len(batches) % num_ranks))]
    sent: list = []
    for rank in range(num_ranks):
        mine = dealt[rank::num_ranks]
        evaluate(Fusion(), mine, CONDITIONS, device="cpu", gather=lambda scores: sent.extend(scores) or scores)
    for order in (1, -1):
        actual = evaluate(
            Fusion(), dealt[:1], CONDITIONS, device="cpu", gather=lambda _own, order=order: sent[::order]
        )
        assert actual == expected


def test_a_rank_whose_batch_is_all_padding_adds_nothing():
    batches = make_batches()
    empty = make_batch([], 8, HEADS)
    expected = evaluate(Fusion(), batches, CONDITIONS, device="cpu")
    assert evaluate(Fusion(), [*batches, empty], CONDITIONS, device="cpu") == expected


def test_padding_is_never_counted_even_if_it_resembles_clips():
    batches = make_batches(num=16)
    batches[1].valid_B[3:] = False
    finished: list[int] = []
    results = evaluate(Fusion(), batches, CONDITIONS[:7], device="cpu", progress=finished.append)
    assert finished == [8, 3]
    assert results.summary.num_clips == 11
    assert all(row.num_clips + row.num_without == 11 for row in results.rows)


def test_clips_without_any_modality_are_counted_separately():
    batches = make_batches()
    present_NM = torch.cat([b.present_BM[b.valid_B] for b in batches])
    results = evaluate(Fusion(), batches, build_conditions(MODALITIES, subsets=True), device="cpu")
    for row in results.rows:
        shown_N = present_NM[:, [MODALITIES.index(m) for m in row.modalities]].any(dim=1)
        assert row.num_clips == int(shown_N.sum())
        assert row.num_without == int((~shown_N).sum())
        assert list(row.num_present.values()) == present_NM[shown_N].sum(dim=0).tolist()
    assert any(row.num_without for row in results.rows)
    assert list(results.summary.num_present.values()) == present_NM.sum(dim=0).tolist()


def test_a_subset_that_no_clip_has_leaves_its_figures_empty():
    batch = make_batches(num=4, batch_size=4)[0]
    batch.present_BM[:] = torch.tensor([True, False, False])
    batch.inputs = {"video": torch.ones(4, WIDTH)}
    row = evaluate(Fusion(), [batch], [Condition(("audio",)), Condition(("video",))], device="cpu").rows[0]
    assert (row.num_clips, row.num_without, row.figures["action_top1"]) == (0, 4, None)


def test_kept_modalities_follow_from_presence_and_drops():
    batches = make_batches()
    rows = evaluate(Fusion(), batches, build_conditions(MODALITIES, sweep=True), device="cpu").rows
    assert rows[0].num_kept == rows[0].num_present
    totals = [sum(row.num_kept.values()) for row in rows]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] >= rows[-1].num_clips


def test_modes_of_all_modules_are_restored():
    model = Fusion().train()
    model.frozen.eval()
    evaluate(model, make_batches(), CONDITIONS[:1], device="cpu")
    assert model.training
    assert not model.frozen.training
    model.frozen.train()
    with pytest.raises(UserError):
        evaluate(model, [], CONDITIONS[:1], device="cpu")
    assert model.frozen.training


def test_dropped_nouns_and_unlabelled_clips_are_counted_not_scored():
    batches = make_batches()
    nouns = torch.cat([b.labels["noun"][b.valid_B] for b in batches])
    batches[0].labels["verb"][0] = -1
    left_out = 2 if int(nouns[0]) != 2 else 3
    results = evaluate(Fusion(), batches, CONDITIONS[-1:], device="cpu", drop_nouns=[left_out])
    pruned = int((nouns == left_out).sum())
    assert results.summary.num_pruned == pruned > 0
    assert results.summary.num_unlabelled == 1
    assert results.rows[0].num_clips == len(nouns) - pruned - 1


def test_a_single_head_is_the_action_itself():
    heads = {"action": 6}
    results = evaluate(Fusion(heads=heads), make_batches(heads=heads), CONDITIONS[:1], device="cpu")
    assert {figure.scored for figure in results.figures} == {"action"}
    assert results.summary.num_classes == {"action": 6}
    assert results.summary.chance_top1["action"] == pytest.approx(100 / 6)


def test_unreadable_clips_are_counted_and_listed():
    batches = make_batches()
    batches[0].damage = [Damage("val-000000.tar", "clip_99", "clip_99.flow.mp4", "crc32 differs")]
    summary = evaluate(Fusion(), batches, CONDITIONS[:1], device="cpu").summary
    assert summary.num_damaged == 1
    assert summary.damage == ["val-000000.tar: clip clip_99: clip_99.flow.mp4: crc32 differs"]


def test_summary_averages_over_seeds_subsets_and_probabilities():
    results = evaluate(Fusion(), make_batches(num=80), CONDITIONS, device="cpu")
    alone = [row.figures["verb_top1"] for row in results.rows[:7]]
    subsets, curve = results.summary.subsets, results.summary.drop_curve
    assert subsets.average["verb_top1"] == pytest.approx(np.mean(alone))
    assert subsets.relative_drop["verb_top1"] == pytest.approx(
        np.mean([100 * (alone[-1] - value) / alone[-1] for value in alone[:-1]])
    )
    half = [row.figures["verb_top1"] for row in results.rows if row.drop_prob == 0.5]
    assert len(half) == 2
    assert curve.mean["verb_top1"][5] == pytest.approx(np.mean(half))
    assert curve.fall["verb_top1"] == pytest.approx(curve.mean["verb_top1"][0] - curve.mean["verb_top1"][-1])
    assert results.summary.seeds == [0, 1]


def test_bad_input_is_one_line_that_names_the_clip():
    def raises(message: str, batches: list[Batch], **options: object) -> None:
        model = options.pop("model", None) or Fusion()
        with pytest.raises(UserError, match=message) as caught:
            evaluate(model, batches, options.pop("conditions", CONDITIONS), device="cpu", **options)
        assert "\n" not in str(caught.value)

    unlabelled = make_batches(num=8)
    unlabelled[0].labels["noun"][:] = -1
    raises("no clip has a label", unlabelled)
    other = make_batches(num=8)
    other[0].labels["noun"][2] = 5
    raises("clip_2: noun 5 is out of range", other)
    diverged = Fusion()
    diverged.classifiers["noun"].data[0, 0] = float("nan")
    raises("clip clip_0: head 'noun' predicts nan", make_batches(num=8), model=diverged)
    raises("twice", make_batches(num=8) * 2)
    raises("no clip to evaluate", [])
    raises("no condition", make_batches(num=8), conditions=[])
    raises("leaves no clip", make_batches(num=8), drop_nouns=range(5))
    raises("no 'action' label", make_batches(num=8), model=Fusion(heads={"action": 3}))
    raises("no head 'noun'", make_batches(num=8), model=Fusion(heads={"action": 3}), drop_nouns=[1])


@settings(max_examples=40, deadline=None)
@given(
    subset=st.sets(st.sampled_from(MODALITIES), min_size=1),
    drop_prob=st.floats(0, 1),
    seed=st.integers(0, 2**62),
    others=st.lists(st.sampled_from(CONDITIONS), max_size=4),
    data_seed=st.integers(0, 99),
    batch_size=st.integers(1, 13),
)
def test_any_set_of_conditions_equals_the_naive_evaluation(
    subset: set[str], drop_prob: float, seed: int, others: list[Condition], data_seed: int, batch_size: int
):
    condition = Condition(tuple(m for m in MODALITIES if m in subset), drop_prob, seed)
    batches = make_batches(12, batch_size, seed=data_seed)
    rows = evaluate(Fusion(), batches, [*others, condition], device="cpu").rows
    expected = naive_row(Fusion().eval(), singles(batches), condition) if rows[-1].num_clips else {"num_clips": 0}
    assert {name: rows[-1].to_dict()[name] for name in expected} == expected
