"""Results are written and read strictly, and contain every registered metric, including those of other packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.groups import read_groups
from karmma_dist.evaluation.metrics import GROUPS, Metric, find_figure, known_figure, metric_table, top_k
from karmma_dist.evaluation.results import ResultRow, Results, parse_results, parse_row
from karmma_dist.evaluation.run import validate
from karmma_dist.evaluation.statistics.bootstrap import add_intervals
from karmma_dist.evaluation.statistics.compare import compare, parse_comparison
from karmma_dist.studies.study import Column
from kits.evaluation import participant_of, write_lists
from kits.fusion import HEADS, MODALITIES, Fusion, make_batches, make_results
from kits.metrics import ODD_RANKS, TOP3, installed
from kits.reports import random_results

FIELDS = [
    "modalities", "drop_prob", "seed", "corrupt", "num_clips", "num_without", "num_present", "num_kept",
    "action_top1", "action_top1_ci", "action_top5", "action_mean_class", "action_ece",
    "verb_top1", "verb_top1_ci", "verb_top5", "verb_mean_class", "verb_ece",
    "noun_top1", "noun_top1_ci", "noun_top5", "noun_mean_class", "noun_ece", "verb_loss", "noun_loss",
    "num_tail", "action_top1_tail", "verb_top1_tail", "noun_top1_tail",
    "num_unseen", "action_top1_unseen", "verb_top1_unseen", "noun_top1_unseen",
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    lists = write_lists(tmp_path_factory.mktemp("lists"), [0, 3], [1], validation=["P01"])
    conditions = build_conditions(MODALITIES, subsets=True, sweep=True)
    groups = read_groups(lists, HEADS, participant_of)
    return add_intervals(evaluate(Fusion(), make_batches(), conditions, device="cpu", groups=groups), num_draws=20)


def test_a_row_keeps_the_order_of_its_fields(results: Results) -> None:
    for row in results.to_dict()["rows"]:
        assert list(row) == FIELDS


def test_results_are_read_back_byte_for_byte(results: Results) -> None:
    text = json.dumps(results.to_dict())
    read = parse_results(json.loads(text), "results.json")
    assert read == results
    assert json.dumps(read.to_dict()) == text


def test_a_comparison_is_read_back_to_the_byte() -> None:
    conditions = build_conditions(MODALITIES, sweep=True, corrupt=["video:blur:3"])
    models = {name: make_results(skill, 1, 40, conditions) for name, skill in (("a", 0.4), ("b", 0.9))}
    comparison = compare(models, num_draws=20)
    text = json.dumps(comparison.to_dict())
    assert parse_comparison(json.loads(text), "comparison.json") == comparison
    with pytest.raises(UserError, match=r"^comparison\.json: comparison\.pairs\.0\.conditions\.0\.p: "):
        parse_comparison(json.loads(text.replace('"p": ', '"q": ')), "comparison.json")


finite = st.floats(0, 100)
rows = st.builds(
    ResultRow,
    modalities=st.sampled_from([("video",), ("video", "audio")]),
    drop_prob=st.floats(0, 1),
    seed=st.integers(0, 99),
    corrupt=st.none() | st.just("video:blur:3"),
    missing=st.none() | st.just("audio:0.5"),
    num_clips=st.integers(0, 999),
    num_without=st.integers(0, 999),
    num_present=st.dictionaries(st.sampled_from(MODALITIES), st.integers(0, 99)),
    num_kept=st.dictionaries(st.sampled_from(MODALITIES), st.integers(0, 99)),
    figures=st.fixed_dictionaries(
        {"action_top1": st.none() | finite, "main_verb_loss": finite, "action_top1_tail": finite}
    ),
    intervals=st.dictionaries(st.just("action_top1"), st.none() | st.tuples(finite, finite)),
    group_sizes=st.dictionaries(st.sampled_from(GROUPS), st.just({"action": 3})),
)


@given(row=rows)
def test_any_row_is_read_back_with_group_sizes_first(row: ResultRow) -> None:
    written = row.to_dict()
    assert parse_row(json.loads(json.dumps(written)), "x") == row
    keys = list(written)
    assert ("missing" in keys) == (row.missing is not None)
    if "num_tail" in keys:
        assert keys.index("num_tail") < keys.index("action_top1_tail")
    if row.intervals:
        assert keys.index("action_top1_ci") == keys.index("action_top1") + 1


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"seed": "0"}, r"rows\.0\.seed"),
        ({"num_clips": True}, r"rows\.0\.num_clips"),
        ({"num_present": [1]}, r"rows\.0\.num_present"),
        ({"action_top1": "43"}, r"rows\.0\.figures\.action_top1"),
        ({"action_top1_ci": [1.0]}, r"rows\.0\.intervals\.action_top1"),
        ({"action_top7": 1.0}, r"rows\.0\.action_top7: .*known are top1, top5"),
        ({"comment": "x"}, r"rows\.0\.comment"),
        ({"num_rare": {"action": 1}}, r"rows\.0\.num_rare"),
    ],
)
def test_an_invalid_row_is_one_line_with_file_and_field(results: Results, change: dict, place: str) -> None:
    content = results.to_dict()
    content["rows"][0] |= change
    with pytest.raises(UserError, match=rf"^runs/x/results\.json: {place}") as caught:
        parse_results(content, "runs/x/results.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["modalities", "seed", "num_kept", "corrupt"])
def test_a_missing_field_is_named(results: Results, field: str) -> None:
    row = {key: value for key, value in results.rows[0].to_dict().items() if key != field}
    with pytest.raises(UserError, match=rf"^x\.{field}: "):
        parse_row(row, "x")


@pytest.mark.parametrize("content", [[], {"rows": []}, {"rows": {}, "summary": {}}, None, {"rows": [3], "summary": {}}])
def test_invalid_results_are_one_line(content: object) -> None:
    with pytest.raises(UserError, match=r"^x\.json: "):
        parse_results(content, "x.json")


def test_a_figures_metric_is_the_longest_that_fits() -> None:
    assert find_figure("action_top1_tail").metric.name == "top1_tail"
    assert find_figure("main_verb_mean_class").scored == "main_verb"
    assert find_figure("main_verb_top1").heading == "main verb top-1"
    assert known_figure("num_clips") is None
    assert known_figure("top1") is None
    with pytest.raises(UserError, match=r"action_top7.*known are top1, top5, mean_class"):
        find_figure("action_top7")


def test_a_metric_from_outside_is_in_rows_summary_and_comparison(tmp_path: Path) -> None:
    conditions = build_conditions(MODALITIES, subsets=True, sweep=True)
    before = evaluate(Fusion(), make_batches(), conditions, device="cpu").to_dict()
    with installed(tmp_path, top3=TOP3, odd=ODD_RANKS):
        results = add_intervals(evaluate(Fusion(), make_batches(), conditions, device="cpu"), num_draws=20)
        ranks_NK = results.per_clip.ranks["verb"]
        for k, row in enumerate(results.rows):
            shown_N = ranks_NK[ranks_NK[:, k] >= 0, k]
            assert row.figures["verb_top3"] == 100 * (shown_N < 3).mean()
            assert row.figures["verb_odd"] == (shown_N % 2 == 1).sum()
            low, high = row.intervals["verb_top3"]
            assert low <= row.figures["verb_top3"] <= high
        content = results.to_dict()
        assert list(content["rows"][0])[12:16] == ["action_ece", "action_odd", "action_top3", "action_top3_ci"]
        for key in ("average", "relative_drop", "average_ci"):
            assert "verb_top3" in content["summary"]["subsets"][key]
        for key in ("mean", "std", "area", "fall", "relative_fall", "area_ci", "mean_ci"):
            assert "verb_top3" in content["summary"]["drop_curve"][key]
            assert "verb_odd" not in content["summary"]["drop_curve"][key]  # not a percentage
        assert parse_results(json.loads(json.dumps(content)), "x") == results
        assert "verb_top3" in validate.metrics(HEADS)
        assert Column(name="three", metric="action_top3").metric == "action_top3"
        models = {"a": results, "b": results}
        (pair,) = compare(models, num_draws=20, metric="action_top3").pairs
        assert pair.subset_average is not None
        with pytest.raises(UserError, match="action_odd"):
            compare(models, num_draws=20, metric="action_odd")
    for row, old in zip(content["rows"], before["rows"], strict=True):  # nothing else changes
        assert {key: row[key] for key in old} == old
    with pytest.raises(UserError, match=r"rows\.0\.action_odd"):
        parse_results(content, "x")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("3", "of type int, not Metric"),
        ('Metric("top1", "again", right=top_k(1))', "name 'top1' of a metric is taken"),
        ('Metric("Top 9", "x", right=top_k(9))', "metric 'Top 9'"),
        ('Metric("both", "x", right=top_k(9), measure=len)', "metric 'both'"),
        ('Metric("mean", "x", measure=len, has_interval=True)', "metric 'mean'"),
        ('Metric("rare", "x", right=top_k(9), group="rare")', "metric 'rare': unknown group 'rare'"),
    ],
)
def test_a_wrong_entry_is_one_line(tmp_path: Path, entry: str, message: str) -> None:
    with installed(tmp_path, wrong=entry):
        with pytest.raises(UserError, match=message) as caught:
            metric_table()
        assert "\n" not in str(caught.value)


def test_a_broken_entry_point_is_named_with_known_metrics(tmp_path: Path) -> None:
    with installed(tmp_path, gone="None"):
        (tmp_path / "others_metrics.py").unlink()
        with pytest.raises(UserError, match=r"entry point gone = others_metrics:gone .*; known are top1, top5, .*"):
            metric_table()


def test_validation_measures_figures_that_can_select_the_best() -> None:
    assert validate.metrics(["verb", "noun"]) == {
        "action_top1": False, "action_top5": False, "verb_top1": False, "verb_top5": False, "noun_top1": False,
        "noun_top5": False, "verb_loss": True, "noun_loss": True,
    }  # fmt: skip
    assert list(validate.metrics(["action"])) == ["action_top1", "action_top5", "action_loss"]


def test_the_kits_results_are_results() -> None:
    results = random_results(0, num_clips=20, extras=True)
    assert parse_results(json.loads(json.dumps(results.to_dict())), "x") == results


def test_a_study_needs_a_metric_per_clip() -> None:
    with pytest.raises(ValueError, match=r"action_ece.*action_top1, action_top5, or of a head"):
        Column(name="x", metric="action_ece")
    assert Column(name="x", metric="main_verb_top5").lower_is_better is False
    assert Column(name="x", at="fall").lower_is_better is True
    assert Metric("x", "x", right=top_k(1), group="tail").is_per_clip is False
