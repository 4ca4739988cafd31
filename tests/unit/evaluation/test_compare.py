"""Models are compared only on the same clips, pair by pair, and the report names the significant differences."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from karmma_dist.errors import UserError
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.evaluate import evaluate
from karmma_dist.evaluation.metrics import find_figure
from karmma_dist.evaluation.report import html, markdown
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.model import p_value
from karmma_dist.evaluation.report.sections import differences, evaluation_page
from karmma_dist.evaluation.report.sentences import headline, result_sentences, verdicts
from karmma_dist.evaluation.report.write import write_report
from karmma_dist.evaluation.results import Results
from karmma_dist.evaluation.scores import BatchScores, score_rows
from karmma_dist.evaluation.statistics import bootstrap
from karmma_dist.evaluation.statistics.compare import Comparison, FigureTest, PairTests, compare, holm, mcnemar
from kits.fusion import CONDITIONS, HEADS, MODALITIES, Fusion, make_batches, make_results, singles
from kits.pages import Page

TOP1 = find_figure("action_top1")


def markdown_of(comparison: Comparison) -> str:
    return "".join(map(markdown.section, differences(comparison)))


MODELS = {"weak": make_results(0.5, 1), "strong": make_results(0.8, 2), "as strong": make_results(0.8, 3)}


def test_confidence_is_the_probability_of_the_predicted_class():
    batches, model = make_batches(), Fusion().eval()
    conditions = build_conditions(MODALITIES)
    (row,) = evaluate(model, batches, conditions, device="cpu").rows
    sure = {name: [] for name in ("action", "verb", "noun")}
    right = {name: [] for name in sure}
    for clip in singles(batches):
        with torch.no_grad():
            logits = model.fuse(model.encode(clip.inputs, clip.present_BM), clip.present_BM, clip.present_BM)
        verb, noun = (logits[head][0].double().softmax(0) for head in ("verb", "noun"))
        probabilities = {"verb": verb, "noun": noun, "action": torch.outer(verb, noun).flatten()}
        truth = {head: int(clip.labels[head]) for head in HEADS}
        truth["action"] = truth["verb"] * HEADS["noun"] + truth["noun"]
        for name, values in probabilities.items():
            sure[name].append(float(values.max()))
            right[name].append(int(values.argmax()) == truth[name])
    for name in sure:
        bins = [min(int(np.ceil(confidence * 15)) - 1, 14) for confidence in sure[name]]
        gaps = [
            abs(sum(r - c for b, r, c in zip(bins, right[name], sure[name], strict=True) if b == place))
            for place in range(15)
        ]
        assert row.figures[f"{name}_ece"] == pytest.approx(100 * sum(gaps) / len(bins), abs=1e-4)


def test_every_top1_average_area_and_curve_has_an_interval():
    results = MODELS["strong"]
    for row in results.rows:
        for name in ("action", "verb", "noun"):
            low, high = row.intervals[f"{name}_top1"]
            assert low <= row.figures[f"{name}_top1"] <= high
            assert 0 < high - low < 15
    subsets, curve = results.summary.subsets, results.summary.drop_curve
    for value, (low, high) in (
        (subsets.average["action_top1"], subsets.average_ci["action_top1"]),
        (curve.area["action_top1"], curve.area_ci["action_top1"]),
        *zip(curve.mean["action_top1"], curve.mean_ci["action_top1"], strict=True),
    ):
        assert low < value < high


def test_intervals_are_deterministic_and_change_no_figure():
    again = make_results(0.8, 2)
    assert again == MODELS["strong"]
    assert again.rows[3].intervals.keys() < again.rows[3].figures.keys()
    assert json.loads(json.dumps(again.to_dict())) == again.to_dict()


def test_mcnemar_uses_clips_that_only_one_model_gets_right():
    comparison = compare(MODELS, num_draws=200)
    assert [pair.models for pair in comparison.pairs] == [
        ("weak", "strong"), ("weak", "as strong"), ("strong", "as strong")
    ]  # fmt: skip
    tests = []
    for pair in comparison.pairs:
        first, second = (MODELS[name] for name in pair.models)
        assert len(pair.conditions) == len(CONDITIONS)
        for k, test in enumerate(pair.conditions):
            ranks = [results.per_clip.ranks["action"][:, k] for results in (first, second)]
            shown = ranks[0] >= 0
            assert test.num_clips == first.rows[k].num_clips == int(shown.sum())
            assert test.only_first == int(((ranks[0] == 0) & (ranks[1] > 0)).sum())
            assert test.only_second == int(((ranks[1] == 0) & (ranks[0] > 0)).sum())
            expected = second.rows[k].figures["action_top1"] - first.rows[k].figures["action_top1"]
            assert test.difference == pytest.approx(expected)
            assert test.p == mcnemar(test.only_first, test.only_second)
            tests.append(test)
    assert [test.p_holm for test in tests] == holm([test.p for test in tests])


@pytest.mark.parametrize("more", [{"corrupt": ["suite"]}, {"missing": [f"audio:0.{tenth}" for tenth in range(1, 10)]}])
def test_failing_sensors_do_not_change_tests_of_plain_conditions(more: dict):
    """A correction over more tests has less power: a suite of corruptions would hide the other differences."""
    conditions = [*CONDITIONS, *build_conditions(MODALITIES, num_seeds=3, **more)[1:]]
    assert len(conditions) > len(CONDITIONS) + 20
    chosen = {"weak": (0.5, 1), "strong": (0.8, 2)}
    models = {name: make_results(skill, seed, conditions=conditions) for name, (skill, seed) in chosen.items()}
    alone = {"weak": MODELS["weak"], "strong": MODELS["strong"]}
    (pair,), (expected,) = (compare(compared, num_draws=20).pairs for compared in (models, alone))
    assert pair.conditions[: len(CONDITIONS)] == expected.conditions
    broken = pair.conditions[len(CONDITIONS) :]
    assert [test.p_holm for test in broken] == holm([test.p for test in broken])


def test_a_pair_is_tested_on_clips_shown_to_both():
    first, second = MODELS["weak"], MODELS["strong"]
    ranks_NK = second.per_clip.ranks["action"].copy()
    ranks_NK[:150] = -1
    fewer = replace(second, clips=replace(second.per_clip, ranks={**second.per_clip.ranks, "action": ranks_NK}))
    for models in ({"a": first, "b": fewer}, {"b": fewer, "a": first}):
        for k, test in enumerate(compare(models, num_draws=20).pairs[0].conditions):
            ranks_N = first.per_clip.ranks["action"][150:, k]
            right_N = {"a": ranks_N == 0, "b": ranks_NK[150:, k] == 0}
            assert test.num_clips == int((ranks_N >= 0).sum())
            right_1, right_2 = (right_N[name] for name in models)
            assert (test.only_first, test.only_second) == (
                int((right_1 & ~right_2).sum()), int((right_2 & ~right_1).sum()),
            )  # fmt: skip


def test_average_differences_match_summaries_and_only_real_ones_are_significant():
    comparison = compare(MODELS, num_draws=500)
    for pair in comparison.pairs:
        first, second = (MODELS[name].summary for name in pair.models)
        for figure, key, field in (
            ("subset_average", "subsets", "average"),
            ("drop_curve_area", "drop_curve", "area"),
            ("drop_curve_fall", "drop_curve", "fall"),
        ):
            test = pair.test(figure)
            ends = (getattr(getattr(summary, key), field)["action_top1"] for summary in (first, second))
            expected = -np.subtract(*ends)
            assert test.difference == pytest.approx(expected)
            assert test.ci[0] < test.difference < test.ci[1]
            assert (test.p_holm < 0.05) == ("weak" in pair.models)
    assert comparison.average_rank["weak"] == 3
    text = markdown_of(comparison)
    assert "strong is better than weak in the average over subsets by" in text
    assert "as strong and strong do not differ significantly in the mean height of the drop curve" in text


def test_a_bootstrap_p_is_twice_the_smaller_tail():
    names = ["strong", "as strong"]
    test = compare({name: MODELS[name] for name in names}, num_draws=300, seed=5).pairs[0].subset_average
    alone = [k for k, condition in enumerate(CONDITIONS) if condition.drop_prob == 0]
    draws = [bootstrap.resampled(MODELS[name].per_clip, TOP1, 300, 5)[:, alone].mean(axis=1) for name in names]
    differences = draws[1] - draws[0]
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    assert 10 < beyond < 140
    assert test.p == pytest.approx(2 * (beyond + 1) / 301)
    assert test.ci == pytest.approx(np.percentile(differences, [2.5, 97.5]))


def test_equal_models_have_no_difference():
    comparison = compare({"a": MODELS["strong"], "b": MODELS["strong"]}, num_draws=100)
    (pair,) = comparison.pairs
    assert {test.p for test in pair.conditions} == {1.0}
    for figure in ("subset_average", "drop_curve_area", "drop_curve_fall"):
        assert pair.test(figure) == FigureTest(0.0, (0.0, 0.0), 1.0, 1.0)


def test_models_are_compared_on_their_common_conditions():
    narrow = make_results(0.7, 5, conditions=build_conditions(["video", "flow"], subsets=True))
    (pair,) = compare({"wide": MODELS["strong"], "narrow": narrow}, num_draws=100).pairs
    assert [test.modalities for test in pair.conditions] == [("video",), ("flow",), ("video", "flow")]
    assert pair.subset_average is not None
    assert pair.drop_curve_area is None
    assert pair.drop_curve_fall is None


def swept(right_at_start_N: np.ndarray, right_at_end_N: np.ndarray) -> Results:
    """Return results of a model that is right on given clips with everything present, and at drop probability 0.5."""
    conditions = [Condition(("video",), drop_prob=probability) for probability in (0.0, 0.5)]
    right_NK = np.stack([right_at_start_N, right_at_end_N], axis=1)
    names = ("action", *HEADS)
    scores = BatchScores(
        keys=[f"clip_{number:04d}" for number in range(len(right_NK))],
        labels={head: np.arange(len(right_NK)) % num for head, num in HEADS.items()},
        present_BM=np.ones((len(right_NK), 1), dtype=bool),
        masks_BK=np.ones(right_NK.shape, dtype=np.uint8),
        ranks=dict.fromkeys(names, np.where(right_NK, 0, 4).astype(np.int32)),
        losses={head: np.ones(right_NK.shape) for head in HEADS},
        confidence=dict.fromkeys(names, np.full(right_NK.shape, 0.5, dtype=np.float32)),
        damage=[],
    )
    return score_rows(scores, conditions, ["video"], HEADS, ())


def test_falls_are_compared_on_the_same_clips():
    """Of 400 clips, change 8 at each end of the curve: significant in pairs, but not if drawn independently."""
    random = np.random.default_rng(0)
    start_N, end_N = random.random(400) < 0.6, random.random(400) < 0.3
    lower_N, higher_N = start_N.copy(), end_N.copy()
    lower_N[np.flatnonzero(start_N)[:8]] = False
    higher_N[np.flatnonzero(~end_N)[:8]] = True
    models = {"soft": swept(start_N, end_N), "firm": swept(lower_N, higher_N)}
    comparison = compare(models)
    test = comparison.pairs[0].drop_curve_fall
    assert test.difference == pytest.approx(-4.0)
    assert -7 < test.ci[0] < -4 < test.ci[1] < -1
    assert test.p < 0.01
    assert comparison.pairs[0].drop_curve_area.p > 0.5
    text = " ".join(result_sentences(models, comparison))
    assert "firm falls more slowly than soft" in text
    assert "not significant" not in text
    independent = 1.96 * np.sqrt(sum(row.figures["action_top1"] * (100 - row.figures["action_top1"]) / 400
                                     for results in models.values() for row in results.rows))  # fmt: skip
    assert independent > 2 * abs(test.difference)


def test_equal_falls_are_rejected_at_most_at_the_level():
    """Test 150 pairs on clips that are easy or hard for both; rejections are within 4 standard deviations of 5 %."""
    num_samples, rejected = 150, 0
    for sample in range(num_samples):
        random = np.random.default_rng(sample)
        easy_N1 = np.sort(random.random((300, 1)))
        start_N2, end_N2 = random.random((300, 2)) < easy_N1, random.random((300, 2)) < easy_N1**2
        models = {name: swept(start_N2[:, k], end_N2[:, k]) for k, name in enumerate("ab")}
        rejected += compare(models, num_draws=200, seed=sample).pairs[0].drop_curve_fall.p < 0.05
    spread = 4 * np.sqrt(0.05 * 0.95 / num_samples)
    assert rejected / num_samples <= 0.05 + spread


def test_swapping_a_pair_reverses_the_sentence_on_its_fall():
    names = ["weak", "strong"]  # the stronger has more to lose
    sentences, sizes = {}, {}
    for first, second in (names, names[::-1]):
        comparison = compare({name: MODELS[name] for name in (first, second)}, num_draws=200)
        (sentences[second],) = [text for text in verdicts(comparison.pairs[0]) if " falls by " in text]
        sizes[second] = comparison.pairs[0].drop_curve_fall.difference
        assert f"| fall of the drop curve (lower is better) | {second} | {first} | **{sizes[second]:+.2f}** |" in (
            markdown_of(comparison)
        )
    size = f"{sizes['strong']:.2f}"
    assert sizes["weak"] == -sizes["strong"] < 0
    assert sentences["strong"].startswith(f"strong falls by {size} more points than weak [")
    assert sentences["weak"].startswith(f"weak falls by {size} fewer points than strong [")
    assert sentences["strong"].split("[")[1] == sentences["weak"].split("[")[1]  # interval and p-value


def test_a_worse_model_has_the_same_difference_reversed():
    test = FigureTest(-3.0, (-5.0, -1.0), 0.004, 0.012)
    assert verdicts(PairTests(("a", "b"), [], None, test, None)) == [
        "b is worse than a in the mean height of the drop curve by 3.00 points [1.00, 5.00], p = 0.012."
    ]


def test_the_findings_name_differences_that_are_not_significant():
    comparison = compare(MODELS, num_draws=200)
    everything = result_sentences(MODELS, comparison)
    assert "not tested" not in " ".join(everything)
    of_pairs = {
        tuple(pair.models): [
            sentence
            for sentence in everything
            if sentence.startswith(f"{pair.models[1]} falls ") and f" {pair.models[0]}: " in sentence
        ]
        for pair in comparison.pairs
    }
    for (first, second), sentences in of_pairs.items():
        assert len(sentences) == 1
        assert ("is not significant (p = " in sentences[0]) == ("weak" not in (first, second))


def test_the_headline_states_the_significance_of_its_leads():
    comparison = compare(MODELS, num_draws=200)
    sentence = headline(MODELS, comparison)
    assert sentence.count("is not significant, p = ") == 2  # the two strong models lead each other by chance
    weak_and_strong = {name: MODELS[name] for name in ("weak", "strong")}
    sentence = headline(weak_and_strong, compare(weak_and_strong, num_draws=200))
    assert sentence.count("its lead over weak is significant, p ") == 2
    assert "its lead" not in headline(MODELS)


def test_the_report_contains_intervals_ranks_and_every_test(tmp_path):
    models = MODELS
    comparison = compare(MODELS, num_draws=200)
    text = write_report(tmp_path, ReportContent("t", models, comparison=comparison)).read_text()
    low, high = MODELS["weak"].summary.subsets.average_ci["action_top1"]
    average = MODELS["weak"].summary.subsets.average["action_top1"]
    assert f"| average over subsets |  | {average:.2f} [{low:.2f}, {high:.2f}] |" in text
    assert "| average rank |" in text
    assert "| action top-1 | action top-5 | action per class | action calibration error |" in text
    for pair in comparison.pairs:
        for test in pair.conditions:
            bold = "**" if test.p_holm < 0.05 else ""
            assert f"| {bold}{test.difference:+.2f}{bold} ({p_value(test.p_holm)}) |" in text


def test_the_html_report_contains_every_test():
    models = MODELS
    comparison = compare(MODELS, num_draws=200)
    page = Page(html.page(evaluation_page(ReportContent("t", models, comparison=comparison))))
    assert "is not significant" in page.text
    header, *lines = page.tables["Paired tests of averages and falls: action top-1"]
    assert header == ["figure", "model", "against", "difference", "95 % interval", "p"]
    assert len(lines) == 3 * len(comparison.pairs)
    for pair, line in zip(comparison.pairs, lines[-3:], strict=True):
        first, second = pair.models
        test = pair.drop_curve_fall
        figures = [f"{test.difference:+.2f}", "[{:.2f}, {:.2f}]".format(*test.ci), p_value(test.p_holm)]
        assert line == ["fall of the drop curve (lower is better)", second, first, *figures]
    header, *lines = page.tables["Paired tests of single conditions: action top-1"]
    assert header[3:] == [f"{second} – {first}" for first, second in (pair.models for pair in comparison.pairs)]
    assert len(lines) == len(CONDITIONS)
    shown = [cell for line in lines for cell in line[3:]]
    assert not any("(0.000)" in cell for cell in shown)  # smaller p-values are shown as a bound
    assert any("(< 0.001)" in cell for cell in shown)


def test_what_cannot_be_compared_is_one_line():
    def raises(message: str, **models: Results) -> None:
        with pytest.raises(UserError, match=message) as caught:
            compare(models, num_draws=10)
        assert "\n" not in str(caught.value)

    strong = MODELS["strong"]
    raises("at least two models", alone=strong)
    keys = [f"clip_{number:04d}" for number in range(399)] + ["clip_other"]
    other = make_results(0.5, 1, keys=keys)
    raises("b is evaluated on 400 clips, a on 400: only a has clip clip_0399", a=strong, b=other)
    raises("different classes", a=strong, b=make_results(0.5, 1, heads={"verb": 4, "noun": 6}))
    video, audio = (make_results(0.5, 1, conditions=[Condition((name,))]) for name in ("video", "audio"))
    raises("a and b have no condition in common", a=video, b=audio)
