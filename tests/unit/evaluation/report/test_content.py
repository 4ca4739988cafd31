"""A report of thousands of conditions shows the rows that people read, and names the file with the others."""

from __future__ import annotations

import pytest

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.report.content import MOST_BROKEN, ReportContent, condense
from karmma_dist.evaluation.report.rows import terminal_rows
from karmma_dist.evaluation.report.write import PAGE_BYTES, write_report
from karmma_dist.evaluation.statistics.compare import compare
from kits.fusion import MODALITIES, make_results
from kits.pages import Page

FULL = ("video", "flow", "audio")


def make_content(corrupt: list[str], **choices: object) -> ReportContent:
    """Return two models under the chosen conditions, with their comparison."""
    conditions = build_conditions(MODALITIES, corrupt=corrupt, **choices)
    models = {name: make_results(skill, 1, 40, conditions) for name, skill in (("a", 0.5), ("b", 0.8))}
    comparison = compare(models, num_draws=20)
    return ReportContent("x", models, ["A note."], comparison=comparison)


@pytest.fixture(scope="module")
def suite() -> ReportContent:
    return make_content(["suite"], subsets=True, sweep=True, num_seeds=3)


def test_a_few_failures_are_shown_under_every_condition():
    content = make_content(["video:blur:3", "audio:noise:5"], subsets=True, num_seeds=3)
    assert condense(content) is content


def test_a_suite_is_shown_with_all_modalities_and_intact_rows(suite):
    shown = condense(suite)
    for name, results in suite.models.items():
        rows = shown.models[name].rows
        intact = [row for row in results.rows if row.corrupt is None]
        assert [row for row in rows if row.corrupt is None] == intact
        broken = [row for row in results.rows if row.corrupt and row.modalities == FULL]
        assert [row for row in rows if row.corrupt] == [row for row in broken if row.drop_prob == 0]
        assert {row.corrupt for row in rows} == {row.corrupt for row in results.rows}
        assert len(rows) < MOST_BROKEN < len(results.rows)
        assert shown.models[name].summary == results.summary


def test_paired_tests_stay_with_their_rows(suite):
    rows = condense(suite).models["a"].rows
    tests = condense(suite).comparison.pairs[0].conditions
    assert [test.condition for test in tests] == [row.condition for row in rows]


def test_the_report_names_omitted_rows_and_their_file(suite, tmp_path):
    num_out = len(suite.models["a"].rows) - len(condense(suite).models["a"].rows)
    *_, note = condense(suite).notes
    for part in (f"{num_out:,} rows", "V+F+A", "results.json", "comparison.json"):
        assert part in note
    text = write_report(tmp_path, suite).read_text()
    assert f"* {note}" in text
    assert "* A note." in text
    page = tmp_path / "report.html"
    assert note in Page(page.read_text()).items
    assert page.stat().st_size <= PAGE_BYTES


def test_the_terminal_names_omitted_rows_too():
    results = make_results(0.5, 1, 40, build_conditions(MODALITIES, subsets=True, num_seeds=3, corrupt=["suite"]))
    table = terminal_rows(results, "x")
    assert len(table.body) < len(results.rows)
    assert f"{len(results.rows) - len(table.body):,} more rows with broken sensors: see results.json" in table.caption


def test_report_content_without_results_is_refused():
    with pytest.raises(UserError, match="no results to report"):
        ReportContent("x", {})
