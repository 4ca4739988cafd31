"""Ranks agree with sorting, the action metric with the full joint, and averages with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation import scores as scoring
from karmma_dist.evaluation.metrics import ClipScores, find_figure

sizes = st.integers(1, 7)


def percent(name: str, ranks_N: np.ndarray) -> float | None:
    return find_figure(name).metric.of(ClipScores(ranks_N, np.zeros_like(ranks_N), np.ones(len(ranks_N), np.float32)))


@st.composite
def scored(draw: st.DrawFn, num_heads: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Draw log-probabilities of a few clips, often tied, and labels, some of them missing."""
    num = draw(st.integers(1, 5))
    scores, labels = [], []
    for _ in range(num_heads):
        classes = draw(sizes)
        values = st.sampled_from([0.0, -0.25, -1.0, -3.5]) | st.floats(-50, 0, width=32)
        scores.append(torch.from_numpy(draw(arrays(np.float64, (num, classes), elements=values))))
        labels.append(torch.tensor(draw(st.lists(st.integers(-1, classes - 1), min_size=num, max_size=num))))
    return scores, labels


@given(scored(1))
def test_rank_is_the_true_classs_position_when_sorted_stably(case):
    (scores_BC,), (labels_B,) = case
    order_BC = torch.argsort(scores_BC, dim=1, descending=True, stable=True)
    expected = [-1 if t < 0 else row.tolist().index(t) for row, t in zip(order_BC, labels_B.tolist(), strict=True)]
    assert scoring.class_ranks(scores_BC, labels_B).tolist() == expected


@given(scored(1))
def test_a_clip_is_right_exactly_when_argmax_names_its_class(case):
    (scores_BC,), (labels_B,) = case
    right = (scores_BC.numpy().argmax(axis=1) == labels_B.numpy()).tolist()
    assert (scoring.class_ranks(scores_BC, labels_B) == 0).tolist() == right


@given(scored(1), st.data())
def test_nan_scores_never_help(case, data):
    (scores_BC,), (labels_B,) = case
    whole_B = scoring.class_ranks(scores_BC, labels_B)
    spoilt_BC = torch.tensor(data.draw(arrays(np.bool_, tuple(scores_BC.shape))))
    ranks_B = scoring.class_ranks(scores_BC.masked_fill(spoilt_BC, float("nan")), labels_B)
    assert (ranks_B >= whole_B).all()
    known_B = labels_B >= 0
    lost_B = known_B & spoilt_BC.gather(1, labels_B.clamp(min=0)[:, None])[:, 0]
    assert (ranks_B[lost_B] == scores_BC.shape[1]).all()
    assert ((ranks_B < 0) == ~known_B).all()


@given(scored(2), st.sampled_from([1, 2**23]))
def test_action_rank_equals_the_rank_among_all_pairs(case, elements):
    (verb_BV, noun_BN), (verb_B, noun_B) = case
    original = scoring._JOINT_ELEMENTS
    scoring._JOINT_ELEMENTS = elements
    try:
        ranks = scoring.joint_ranks([verb_BV, noun_BN], [verb_B, noun_B]).tolist()
    finally:
        scoring._JOINT_ELEMENTS = original
    for clip, rank in enumerate(ranks):
        pairs = [(v, n) for v in range(verb_BV.shape[1]) for n in range(noun_BN.shape[1])]
        pairs.sort(key=lambda pair: -float(verb_BV[clip, pair[0]] + noun_BN[clip, pair[1]]))
        true = (int(verb_B[clip]), int(noun_B[clip]))
        assert rank == (-1 if -1 in true else pairs.index(true))


@given(scored(1))
def test_the_joint_of_one_head_is_the_head(case):
    scores, labels = case
    assert torch.equal(scoring.joint_ranks(scores, labels), scoring.class_ranks(scores[0], labels[0]))


def test_action_is_right_exactly_when_verb_and_noun_are():
    generator = torch.Generator().manual_seed(0)
    verb_BV, noun_BN = (torch.randn(300, c, generator=generator).double().log_softmax(1) for c in (4, 5))
    verb_B, noun_B = (torch.randint(c, (300,), generator=generator) for c in (4, 5))
    both = (scoring.class_ranks(verb_BV, verb_B) == 0) & (scoring.class_ranks(noun_BN, noun_B) == 0)
    assert torch.equal(scoring.joint_ranks([verb_BV, noun_BN], [verb_B, noun_B]) == 0, both)
    assert both.any()


def test_a_model_with_equal_scores_is_at_chance():
    labels_B = torch.arange(10)
    ranks = scoring.class_ranks(torch.zeros(10, 10), labels_B).numpy()
    assert percent("action_top1", ranks) == 10.0
    assert percent("action_top5", ranks) == 50.0
    frequent = scoring.class_ranks(torch.zeros(10, 10), torch.tensor([0] * 7 + [9] * 3)).numpy()
    assert percent("action_top1", frequent) == 70.0


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_mean_class_accuracy_is_the_average_over_classes_that_occur(clips):
    labels = np.array([label for label, _ in clips])
    ranks = np.array([0 if right else 4 for _, right in clips])
    expected = np.mean([100 * (ranks[labels == label] == 0).mean() for label in set(labels.tolist())])
    assert metrics.mean_class_accuracy(ranks, labels) == pytest.approx(expected)


def test_figures_over_zero_clips_are_none():
    nothing = np.zeros(0, dtype=np.int64)
    none = ClipScores(nothing, nothing, nothing.astype(np.float32), nothing.astype(np.float64))
    assert {metric.of(none) for metric in metrics.metric_table().values()} == {None}
    assert metrics.majority_share(nothing) is None
    assert metrics.average([None]) is None


def test_majority_share_is_the_commonest_class():
    assert metrics.majority_share(np.array([3, 3, 1, 0])) == 50.0


def test_relative_drop_is_a_share_of_the_full_set():
    assert metrics.average_relative_drop(40.0, [30.0, 10.0]) == pytest.approx((25 + 75) / 2)
    assert metrics.relative_drop(40.0, 44.0) == pytest.approx(-10)
    assert metrics.relative_drop(0.0, 0.0) is None


@given(st.lists(st.floats(0, 100), min_size=2, max_size=10))
def test_curve_area_lies_between_the_lowest_and_highest_point(values):
    probabilities = [k / 10 for k in range(len(values))]
    area = metrics.curve_area(probabilities, values)
    assert min(values) - 1e-9 <= area <= max(values) + 1e-9


def test_curve_area_of_a_line_is_its_middle():
    assert metrics.curve_area([0.0, 0.1, 0.9], [90.0, 80.0, 0.0]) == pytest.approx(45.0)
    assert metrics.curve_area([0.0, 0.5], [90.0, None]) is None


def test_average_rank_shares_ties_and_skips_incomplete_columns():
    ranks = metrics.average_ranks({"a": [50.0, 10.0, 1.0], "b": [50.0, 20.0, None], "c": [40.0, 30.0, 2.0]})
    assert ranks == {"a": (1.5 + 3) / 2, "b": (1.5 + 2) / 2, "c": (3 + 1) / 2}


@given(st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=1, max_size=4))
def test_average_ranks_sum_to_a_full_ranking(table):
    ranks = metrics.average_ranks({str(place): values for place, values in enumerate(table)})
    assert sum(ranks.values()) == pytest.approx(len(table) * (len(table) + 1) / 2)
