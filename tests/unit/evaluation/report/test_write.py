"""The report contains every row, and its sentences follow the numbers, whichever model is best."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import build_conditions
from karmma_dist.evaluation.report import terminal
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.rows import terminal_rows
from karmma_dist.evaluation.report.sentences import headline, result_sentences
from karmma_dist.evaluation.report.write import write_report, write_results
from karmma_dist.evaluation.results import Results, Summary
from karmma_dist.evaluation.summary import summarise
from karmma_dist.modalities import letters
from kits.reports import row_of

MODALITIES = ["video", "flow", "audio"]
NUM_CLIPS = 9644

BASELINE = [40.00, 36.16, 32.24, 28.38, 24.64, 21.55, 18.05, 15.82, 13.84, 12.79]
DROPOUT = [41.49, 39.45, 37.25, 34.77, 32.26, 29.85, 27.70, 25.93, 24.56, 23.43]
STUDENT = [43.00, 40.99, 38.79, 36.48, 33.82, 31.40, 29.78, 27.63, 26.14, 25.17]


def make_results(curve, modalities=MODALITIES, majority=1.0, **choices) -> Results:
    """Return results whose sweep is `curve` and whose subsets keep a share of its first value."""
    rows = []
    for condition in build_conditions(modalities, **(choices or {"subsets": True, "sweep": True, "num_seeds": 2})):
        share = len(condition.modalities) / len(modalities)
        top1 = curve[round(10 * condition.drop_prob)] * share
        figures = {"action_top1": top1, "action_top5": min(100.0, 2 * top1), "action_mean_class": top1 / 2}
        without = 12 * (condition.modalities == ("audio",))
        row = row_of(condition, figures, modalities, NUM_CLIPS)
        rows.append(replace(row, num_clips=NUM_CLIPS - without, num_without=without))
    seeds, subsets, drop_curve = summarise(rows)
    summary = Summary(
        modalities=tuple(modalities),
        num_clips=NUM_CLIPS,
        num_unlabelled=3,
        num_pruned=24,
        num_damaged=1,
        damage=["val-000000.tar: clip x: x.flow.mp4: cut"],
        num_present={name: NUM_CLIPS - 12 * (name == "audio") for name in modalities},
        num_classes={"action": 29100},
        chance_top1={"action": 100 / 29100},
        majority_top1={"action": majority},
        seeds=seeds,
        subsets=subsets,
        drop_curve=drop_curve,
    )
    return Results(rows, summary)


def as_models(**curves: list[float]) -> dict[str, Results]:
    return {name: make_results(curve) for name, curve in curves.items()}


def test_results_file_is_the_results(tmp_path):
    results = make_results(STUDENT)
    path = write_results(results, tmp_path / "eval")
    assert json.loads(path.read_text()) == results.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_report_holds_every_row_count_and_note(tmp_path):
    models = as_models(baseline=BASELINE, dropout=DROPOUT, student=STUDENT)
    notes, timings = ["Trained for one hour."], {"evaluate": 12.34}
    text = write_report(tmp_path, ReportContent("Sensors that fail", models, notes, timings)).read_text()
    for results in models.values():
        for row in results.rows:
            start = f"| {letters(row.modalities)} | {100 * row.drop_prob:g} | {row.seed} | {row.num_clips:,} |"
            figures = f"| {row.figures['action_top1']:.2f} | {row.figures['action_top5']:.2f} |"
            assert any(line.startswith(start) and figures in line for line in text.splitlines())
    for part in ("# Sensors that fail", "| action | 29,100 |", notes[0], "12.3", "(12 without)", "x.flow.mp4"):
        assert part in text
    assert "| student | 9,644 | 3 | 24 | 1 | 0 | 0 | 12 |" in text
    for plot in ("drop_curve.png", "subsets.png"):
        assert plot in text
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_the_best_is_bold_unless_the_model_is_alone(tmp_path):
    text = write_report(tmp_path, ReportContent("t", as_models(baseline=BASELINE, student=STUDENT))).read_text()
    assert "| V+F+A | 9,644 | 40.00 | **43.00** |" in text
    assert "| average rank |  | 2.00 | **1.00** |" in text
    alone = write_report(tmp_path, ReportContent("t", as_models(student=STUDENT))).read_text()
    assert "**" not in alone
    assert "average rank" not in alone


def test_sections_without_rows_are_left_out(tmp_path):
    models = {"run": make_results(STUDENT, modalities=["video"], drop_prob=0.0)}
    text = write_report(tmp_path, ReportContent("t", models)).read_text()
    assert "png" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert "| V | 0 | 0 | 9,644 | 0 | 43.00 |" in text


def test_models_with_different_modalities_share_tables(tmp_path):
    models = as_models(student=STUDENT) | {"one|camera": make_results([20.0] * 10, modalities=["video"])}
    text = write_report(tmp_path, ReportContent("t", models)).read_text()
    assert "| V+F | 9,644 | 28.67 | – |" in text
    assert "one\\|camera" in text
    assert "not used" in text
    assert any("not compared" in sentence for sentence in result_sentences(models))


def test_the_papers_figures_give_the_papers_result():
    text = " ".join(result_sentences(as_models(baseline=BASELINE, dropout=DROPOUT, student=STUDENT)))
    assert "dropout falls more slowly than baseline: 18.06 points against 27.21, or 43.5 % of its initial value" in text
    assert "student falls more slowly than baseline" in text
    assert "student falls more slowly than dropout: 17.83 points against 18.06" in text
    assert "student loses the fewest points and has the highest curve" in text


def test_the_opposite_result_is_stated_as_plainly():
    text = " ".join(result_sentences(as_models(dropout=DROPOUT, student=BASELINE)))
    assert "student falls faster than dropout: 27.21 points against 18.06" in text
    assert "It is above dropout at 0 of 10 drop probabilities." in text


def test_points_and_shares_that_disagree_are_both_stated():
    low = [value / 4 for value in BASELINE]
    one_way = " ".join(result_sentences(as_models(student=STUDENT, low=low)))
    assert "low falls by fewer points but a larger share than student" in one_way
    other_way = " ".join(result_sentences(as_models(low=low, student=STUDENT)))
    assert "student falls by more points but a smaller share than low" in other_way


def test_equal_models_fall_equally():
    assert "b falls as fast as a" in " ".join(result_sentences(as_models(a=STUDENT, b=STUDENT)))


def test_results_without_comparison_claim_no_significance():
    pair = result_sentences(as_models(dropout=DROPOUT, student=STUDENT))
    assert "significant" not in " ".join(pair)
    assert sum("not tested" in sentence for sentence in pair) == 1
    mixed = as_models(student=STUDENT) | {"camera": make_results(BASELINE, modalities=["video"])}
    for without_pairs in (as_models(student=STUDENT), mixed):
        assert "not tested" not in " ".join(result_sentences(without_pairs))


def test_a_model_no_better_than_the_commonest_action_is_named():
    models = {"untrained": make_results([2.0] * 10, majority=4.0)}
    assert any("untrained is never better" in sentence for sentence in result_sentences(models))


def test_terminal_table_has_a_line_per_row():
    results = make_results(STUDENT)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table = terminal_rows(results, "student")
    terminal.print_table(table, console)
    text = console.export_text()
    assert len(table.body) == len(results.rows)
    assert "43.0 " in text
    assert "action top-1" in text


@pytest.mark.parametrize("corrupt", [None, "detections:dropped:3"])
def test_the_terminal_table_fits_80_columns_and_names_excluded_clips(corrupt):
    results = make_results(STUDENT)
    rows = [replace(row, corrupt=corrupt, num_without=3, drop_prob=0.1 * (place % 2))
            for place, row in enumerate(results.rows)]  # fmt: skip
    summary = replace(results.summary, num_unlabelled=66, num_pruned=0)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    terminal.print_table(terminal_rows(Results(rows, summary), "student"), console)
    text = console.export_text()
    assert "…" not in text
    assert "66 unlabelled; without: clips that have none of the modalities" in " ".join(text.split())
    assert "by noun" not in text


def test_columns_without_information_are_left_out():
    results = make_results(STUDENT)
    rows = [replace(row, drop_prob=0.0, seed=0, num_without=0) for row in results.rows[:2]]
    assert terminal_rows(Results(rows, results.summary), "x").columns[:3] == ["modalities", "clips", "action top-1"]


def test_a_report_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="no results"):
        write_report(tmp_path, ReportContent("t", {}))


def test_the_report_opens_with_its_headline_and_two_pictures(tmp_path):
    models = as_models(baseline=BASELINE, dropout=DROPOUT, student=STUDENT)
    lines = [line for line in write_report(tmp_path, ReportContent("t", models)).read_text().splitlines() if line]
    area = models["student"].summary.drop_curve.area["action_top1"]
    assert lines[0] == "# t"
    assert lines[1] == headline(models)
    for part in ("Of 3 models, student is best", "43.00 % action top-1", f"{area:.2f} %"):
        assert part in lines[1]
    assert lines[2].endswith("(drop_curve.png)")
    assert lines[3].endswith("(subsets.png)")
    assert lines[4] == "## At a glance"


def test_the_headline_names_exactly_the_leading_models():
    low = [value / 2 for value in DROPOUT]
    firm = [20.0] * 10
    steep = [50.0, *[1.0] * 9]
    assert headline(as_models(a=STUDENT, b=STUDENT)).startswith("Of 2 models, a and b are best")
    apart = headline(as_models(steep=steep, firm=firm))
    assert "steep is best with all modalities present (50.00 %" in apart
    assert ", and firm is best when modalities are missing (20.00 %" in apart
    alone = headline({"run": make_results(low)})
    assert alone.startswith("run reaches 20.75 % action top-1")
    assert "11.71 %" in alone
    poor = headline({"untrained": make_results([2.0] * 10, majority=4.0)})
    assert poor.endswith("no better than always predicting the most frequent action.")
    assert headline({"x": make_results(STUDENT, subsets=True)}).endswith("24.57 % on average over the subsets.")
    video = make_results(STUDENT, modalities=["video"], drop_prob=0.0)
    assert headline({"x": video}).endswith("all modalities present.")
