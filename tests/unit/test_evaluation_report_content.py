"""A report of thousands of conditions shows those that somebody would read, and says where the others are."""

from __future__ import annotations

import json

import pytest
from test_evaluation_compare import MODALITIES, make_results

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.report.content import MOST_BROKEN, ReportContent, condense
from karmma_dist.evaluation.report.write import results_table, write_report
from karmma_dist.evaluation.statistics.compare import compare

FULL = ["video", "flow", "audio"]


def make_content(corrupt: list[str], **choices: object) -> ReportContent:
    """Two models under the chosen conditions, compared."""
    conditions = build_conditions(MODALITIES, corrupt=corrupt, **choices)
    models = {name: make_results(skill, 1, 40, conditions) for name, skill in (("a", 0.5), ("b", 0.8))}
    comparison = compare(models, num_draws=20).to_dict()
    return ReportContent("x", {name: of.to_dict() for name, of in models.items()}, ["said"], comparison=comparison)


@pytest.fixture(scope="module")
def suite() -> ReportContent:
    return make_content(["suite"], subsets=True, sweep=True, num_seeds=3)


def test_a_few_failures_are_shown_under_every_condition():
    content = make_content(["video:blur:3", "audio:noise:5"], subsets=True, num_seeds=3)
    assert condense(content) is content


def test_of_a_suite_every_failure_is_shown_with_all_modalities_and_every_row_with_whole_sensors(suite):
    shown = condense(suite)
    for name, results in suite.models.items():
        rows = shown.models[name]["rows"]
        whole = [row for row in results["rows"] if row["corrupt"] is None]
        assert [row for row in rows if row["corrupt"] is None] == whole
        broken = [row for row in results["rows"] if row["corrupt"] and row["modalities"] == FULL]
        assert [row for row in rows if row["corrupt"]] == [row for row in broken if row["drop_prob"] == 0]
        assert {row["corrupt"] for row in rows} == {row["corrupt"] for row in results["rows"]}
        assert len(rows) < MOST_BROKEN < len(results["rows"])
        assert shown.models[name]["summary"] == results["summary"]


def test_paired_tests_stay_with_their_rows(suite):
    rows = condense(suite).models["a"]["rows"]
    tests = condense(suite).comparison["pairs"][0]["conditions"]
    assert [(of["modalities"], of["drop_prob"], of["seed"], of["corrupt"]) for of in tests] == [
        (of["modalities"], of["drop_prob"], of["seed"], of["corrupt"]) for of in rows
    ]


def test_the_report_says_how_many_rows_it_leaves_out_and_where_they_are(suite, tmp_path):
    num_out = len(suite.models["a"]["rows"]) - len(condense(suite).models["a"]["rows"])
    said = (
        f"{num_out:,} rows of a model with broken sensors, under other conditions than V+F+A, are not in this report: "
        "they are in results.json, their paired tests in comparison.json."
    )
    text = write_report(tmp_path, suite).read_text()
    assert said in text
    assert "* said" in text
    page = (tmp_path / "report.html").read_text()
    assert said in page
    assert len(page) < len(json.dumps(suite.models))


def test_the_terminal_says_so_too():
    results = make_results(0.5, 1, 40, build_conditions(MODALITIES, subsets=True, num_seeds=3, corrupt=["suite"]))
    table = results_table(results)
    assert table.row_count < len(results.rows)
    assert f"{len(results.rows) - table.row_count:,} more rows with broken sensors: results.json" in table.caption


def test_a_report_of_nothing_is_refused():
    with pytest.raises(UserError, match="no results to report"):
        ReportContent("x", {})
