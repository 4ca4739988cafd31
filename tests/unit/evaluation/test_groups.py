"""Tail and unseen figures count exactly the clips of the published lists, and a bad list is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.groups import Groups, read_groups
from kits.evaluation import but_for_rounding, flat, participant_of, write_lists
from kits.fusion import CONDITIONS, HEADS, MODALITIES, Fusion, make_batches, naive_row, singles

SOURCES = {"action": ["verb", "noun"], "verb": ["verb"], "noun": ["noun"]}


clips = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=20)


@given(clips, st.frozensets(st.integers(0, 3)), st.frozensets(st.integers(0, 4)), st.frozensets(st.integers(0, 4)))
def test_an_action_is_tail_if_verb_or_noun_is(labels, verbs, nouns, people):
    groups = Groups({"verb": verbs, "noun": nouns}, frozenset(f"P{number:02d}" for number in people), participant_of)
    keys = [f"clip_{number}" for number in range(len(labels))]
    of_heads = {"verb": np.array([v for v, _ in labels]), "noun": np.array([n for _, n in labels])}
    actual = groups.members(keys, of_heads, SOURCES)
    assert actual["tail"]["verb"].tolist() == [v in verbs for v, _ in labels]
    assert actual["tail"]["noun"].tolist() == [n in nouns for _, n in labels]
    assert actual["tail"]["action"].tolist() == [v in verbs or n in nouns for v, n in labels]
    if people:
        unseen = [n % 5 in people for n in range(len(labels))]
        assert all(members_N.tolist() == unseen for members_N in actual["unseen"].values())
    else:
        assert "unseen" not in actual


def test_figures_of_a_group_use_only_its_clips(tmp_path):
    lists = write_lists(tmp_path / "lists", [0, 3], [1], validation=["P01"], test=["P04"])
    groups = read_groups(lists, HEADS, participant_of)
    conditions = build_conditions(MODALITIES, subsets=True)
    batches = make_batches(num=60)
    results = evaluate(Fusion(), batches, conditions, device="cpu", groups=groups)
    alone = singles(batches)
    for condition, row in zip(conditions, results.rows, strict=True):
        for group, figure, inside in (
            ("tail", "verb", lambda clip: int(clip.labels["verb"]) in (0, 3)),
            ("tail", "noun", lambda clip: int(clip.labels["noun"]) == 1),
            ("tail", "action", lambda clip: int(clip.labels["verb"]) in (0, 3) or int(clip.labels["noun"]) == 1),
            ("unseen", "action", lambda clip: participant_of(clip.keys[0]) in ("P01", "P04")),
        ):
            expected = naive_row(Fusion().eval(), [clip for clip in alone if inside(clip)], condition)
            assert row.figures[f"{figure}_top1_{group}"] == expected[f"{figure}_top1"]
            assert row.group_sizes[group][figure] == expected["num_clips"]
    without = evaluate(Fusion(), batches, conditions, device="cpu")
    assert not [figure for figure in without.figures if figure.metric.group is not None]
    assert without.rows[0].group_sizes == {}


def test_excluded_or_unlabelled_clips_are_in_no_figure():
    batches = make_batches(num=50)
    batches[0].labels["verb"][:2] = -1
    batches[0].labels["noun"][0] = 3
    actual = evaluate(Fusion(), batches, CONDITIONS, device="cpu", drop_nouns=[3])
    labels = {head: torch.cat([batch.labels[head][batch.valid_B] for batch in batches]) for head in HEADS}
    unlabelled_N = labels["verb"] < 0
    pruned_N = (labels["noun"] == 3) & ~unlabelled_N
    assert actual.summary.num_unlabelled == 2
    assert actual.summary.num_pruned == int(pruned_N.sum()) > 0
    counted = [clip for clip, out in zip(singles(batches), (unlabelled_N | pruned_N).tolist(), strict=True) if not out]
    assert actual.summary.num_clips == len(counted) == 50 - 2 - int(pruned_N.sum())
    alone = evaluate(Fusion(), counted, CONDITIONS, device="cpu")
    assert flat(actual.rows) == but_for_rounding(alone.rows)
    for name in ("num_clips", "num_present", "majority_top1", "subsets", "drop_curve"):
        assert flat(getattr(actual.summary, name)) == but_for_rounding(getattr(alone.summary, name))


def test_an_empty_group_has_no_figure(tmp_path):
    groups = read_groups(write_lists(tmp_path / "lists", [], [], test=["P99"]), HEADS, participant_of)
    (row,) = evaluate(Fusion(), make_batches(), build_conditions(MODALITIES), device="cpu", groups=groups).rows
    assert row.figures["action_top1_tail"] is None
    assert row.figures["action_top1_unseen"] is None
    assert row.group_sizes["unseen"]["action"] == 0


def test_a_bad_list_is_one_line_with_file_and_row(tmp_path):
    def raises(message: str, folder: Path, heads: dict[str, int] = HEADS) -> None:
        with pytest.raises(UserError, match=message) as caught:
            read_groups(folder, heads, participant_of)
        assert "\n" not in str(caught.value)

    raises("no such annotations folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    raises("none of EPIC_100_tail_verbs.csv", tmp_path / "empty")
    lists = write_lists(tmp_path / "lists", [1], [2, 5])
    raises("tail_nouns.csv, row 3: noun '5' is not one of the model's 5 classes", lists)
    raises("no head 'noun'", lists, {"verb": 4})
    (lists / "EPIC_100_tail_nouns.csv").write_text("class\n1\n")
    raises("tail_nouns.csv: column 'noun' is missing", lists)
    for content, message in (
        (b"\xff\xfen\x00o\x00", "tail_nouns.csv: is UTF-16"),
        (b"noun\n1\x00\n", "tail_nouns.csv, row 2: has a NUL byte"),
        (b"noun\n\xff\n", "tail_nouns.csv, row 2: byte 0xff is not UTF-8"),
        (b"noun,noun\n1,2\n", "tail_nouns.csv: column 'noun' occurs twice"),
        (b"noun,x\n1\n", "tail_nouns.csv, row 2: has fewer fields"),
        (b"noun\n1,2\n", "tail_nouns.csv, row 2: has more fields"),
        ("noun\n\u00b2\n".encode(), "tail_nouns.csv, row 2: noun '\u00b2' is not a whole number"),
        (b'noun\n"1\n', "a quote is opened and never closed"),
        (b"", "tail_nouns.csv: is empty"),
    ):
        (lists / "EPIC_100_tail_nouns.csv").write_bytes(content)
        raises(message, lists)
    (lists / "EPIC_100_tail_nouns.csv").write_bytes(b"\xef\xbb\xbfnoun\r\n1\r\n")
    assert read_groups(lists, HEADS, participant_of).tail["noun"] == {1}
    os.mkfifo(lists / "EPIC_100_unseen_participant_ids_fifo.csv")
    raises("ids_fifo.csv: cannot be read: is no regular file", lists)
    (lists / "EPIC_100_unseen_participant_ids_fifo.csv").unlink()
    (lists / "EPIC_100_tail_nouns.csv").unlink()
    raises("tail_nouns.csv: no such file, but the other tail list", lists)
