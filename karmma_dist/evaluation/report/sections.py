"""The sections of an evaluation's report: the tables, pictures and sentences made from the results.

Rows with a broken sensor, and those in which a share of the clips lacks one modality, appear in their own sections
(see `failures`) and in the tables of all rows and tests, nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from karmma_dist.evaluation.metrics import ACTION, Figure
from karmma_dist.evaluation.report.cells import capitalised, cells_of, extremes, interval_note, point_of, summary_cells
from karmma_dist.evaluation.report.content import ReportContent
from karmma_dist.evaluation.report.failures import broken_sensors, missing_shares
from karmma_dist.evaluation.report.model import (
    NONE,
    Cell,
    Page,
    Picture,
    Section,
    Table,
    TableLine,
    best_cells,
    interval,
    p_value,
    percent,
)
from karmma_dist.evaluation.report.plots import Line, Point, bar_figure, line_figure
from karmma_dist.evaluation.report.rows import clips_behind, condition_cells, every_figure, every_row
from karmma_dist.evaluation.report.sentences import (
    FALL,
    FIGURE_NAMES,
    Models,
    compared_heading,
    fullest_name,
    headline,
    result_sentences,
    verdicts,
)
from karmma_dist.evaluation.results import DropCurve, ResultRow, Results
from karmma_dist.evaluation.statistics.compare import Comparison, ConditionTest, FigureTest
from karmma_dist.evaluation.summary import (
    LEVEL,
    METRIC,
    Subset,
    fullest,
    model_ranks,
    rows_of,
    subset_rows,
)
from karmma_dist.modalities import letters

CURVE_PLOT, SUBSET_PLOT = "drop_curve.png", "subsets.png"


def evaluation_page(content: ReportContent) -> Page:
    """Return the report; sections without rows (no subsets, no sweep) are empty."""
    models, comparison = content.models, content.comparison
    pictures = [picture for picture in (curve_picture(models), subset_picture(models)) if picture is not None]
    sections = [
        at_a_glance(models),
        missing_at_random(models),
        subsets_section(models),
        missing_shares(models),
        *broken_sensors(models),
        Section("findings", "Findings", result_sentences(models, comparison)),
        *([] if comparison is None else differences(comparison)),
        what_was_measured(models),
        every_figure(models),
        every_row(models),
        clips_behind(models),
        Section("notes", "Notes", list(content.notes)),
        times(content.timings),
    ]
    return Page(content.title, Section("outcome", "", [headline(models, comparison)], pictures=pictures), sections)


def shorter_pages(page: Page, content: ReportContent) -> Iterator[Page]:
    """Yield shorter and shorter versions of a report, for a file that must stay small; detail tables shrink first.

    Args:
        page: Result of `evaluation_page`.
        content: Content of the report.
    """
    source = "report.md, in the same folder as this page"

    def rows(is_shown: Callable[[Figure], bool]) -> Section:
        return replace(every_row(content.models, is_shown), sentences=[f"For the other figures, see {source}."])

    if content.comparison is not None:
        page = _with(page, differences(content.comparison, has_words=False)[0])
        yield page
    page = _with(page, rows(lambda figure: figure.scored == ACTION))
    yield page
    for anchor in ("counts", "broken-others", "tests"):
        for section in page.parts:
            if section.anchor == anchor:
                page = _with(page, replace(section, sentences=[f"{section.summary}: see {source}."], tables=[]))
                yield page
    yield _with(page, rows(lambda figure: figure.name == METRIC))


def _with(page: Page, changed: Section) -> Page:
    sections = [changed if section.anchor == changed.anchor else section for section in page.sections]
    return replace(page, sections=sections)


def at_a_glance(models: Models) -> Section:
    """Return one line per model with the figures by which models are compared."""
    subsets = [results.summary.subsets for results in models.values()]
    curves = [results.summary.drop_curve for results in models.values()]
    columns = {fullest_name(models): cells_of([point_of(fullest(results.rows)) for results in models.values()])}
    if any(subsets):
        columns["average over subsets"] = summary_cells(subsets, "average")
        columns["relative drop (%)"] = summary_cells(subsets, "relative_drop", lower_is_better=True)
        if len(models) > 1:
            columns["average rank"] = best_cells(list(model_ranks(models).values()), lower_is_better=True)
    if any(curves):
        columns["mean over drop probabilities"] = summary_cells(curves, "area")
        columns["fall (points)"] = summary_cells(curves, "fall", lower_is_better=True)
        columns["fall (% of initial value)"] = summary_cells(curves, "relative_fall", lower_is_better=True)
    body: list[TableLine] = [
        [name, *(cells[place] for cells in columns.values())] for place, name in enumerate(models)
    ]
    caption = "Relative drop: loss against the largest subset, averaged over the smaller ones. Best values are in bold."
    heading = compared_heading()
    table = Table(f"{capitalised(heading)} of each model", [f"{heading} (%)", *columns], body,
                  caption=caption if any(subsets) else "")  # fmt: skip
    return Section("glance", "At a glance", tables=[table])


def what_was_measured(models: Models) -> Section:
    """Return clip counts, chance levels, and modalities that the dataset lacks, per model."""
    first = next(iter(models.values())).summary
    heads = [
        [name, f"{num:,}", f"{first.chance_top1[name]:.3g}", percent(first.majority_top1[name])]
        for name, num in first.num_classes.items()
    ]
    modalities = list(dict.fromkeys(m for results in models.values() for m in results.summary.modalities))
    clips = []
    for name, results in models.items():
        summary = results.summary
        counts = [summary.num_clips, summary.num_unlabelled, summary.num_pruned, summary.num_damaged]
        lacking = [f"{summary.num_clips - summary.num_present[m]:,}" if m in summary.num_present else "not used"
                   for m in modalities]  # fmt: skip
        clips.append([name, *(f"{count:,}" for count in counts), *lacking])
    fewest = min(results.summary.num_clips for results in models.values())
    seeds = max(len(results.summary.seeds) for results in models.values())
    damage = dict.fromkeys(line for results in models.values() for line in results.summary.damage)
    sentences = [
        f"Number of seeds: {seeds}. The modalities that a clip loses depend on seed and clip key, not on the model.",
        f"With {fewest:,} clips, the 95 % interval from sampling alone is up to ±{98 / math.sqrt(fewest):.1f} points.",
        "“Without” counts clips for which the dataset does not have the modality. If a modality exists but cannot be "
        "read, the clip is damaged and counts as unreadable.",
        *(f"Unreadable: {line}" for line in damage),
    ]
    columns = ["model", "clips", "unlabelled", "excluded by noun", "unreadable", *(f"without {m}" for m in modalities)]
    tables = [
        Table("Classes and chance per head", ["head", "classes", "chance (%)", "most frequent class (%)"], heads),
        Table("Clips per model", columns, clips),
    ]
    return Section("measured", "What was measured", sentences, tables)


def subsets_section(models: Models) -> Section:
    """Return the compared figure under every subset of the modalities, with averages."""
    probability, rows, subsets = _subsets(models)
    if len(subsets) < 2:
        return Section("subsets", "")
    body: list[TableLine] = [
        [
            letters(subset),
            _clip_counts([row for groups in rows.values() for row in groups.get(subset, [])]),
            *cells_of([point_of(groups.get(subset, [])) for groups in rows.values()]),
        ]
        for subset in subsets
    ]
    summaries = [results.summary.subsets for results in models.values()]
    foot: list[TableLine] = [
        ["average over subsets", "", *summary_cells(summaries, "average")],
        ["average relative drop (%)", "", *summary_cells(summaries, "relative_drop", lower_is_better=True)],
    ]
    if len(models) > 1:
        ranks = list(model_ranks(models).values())
        foot.append(["average rank", "", *best_cells(ranks, lower_is_better=True)])
    suffix, heading = f" at drop probability {probability:g}" if probability else "", compared_heading()
    caption = "A clip that has none of a subset's modalities cannot be shown to a model; it is counted as “without”."
    table = Table(f"{capitalised(heading)} per subset{suffix}", ["present", "clips", *models], body, foot,
                  caption=caption + interval_note(models))  # fmt: skip
    return Section("subsets", f"Subsets of the modalities{suffix}: {heading} (%)", tables=[table], short="Subsets")


def subset_picture(models: Models) -> Picture | None:
    """Return the bar chart of all subsets; None: the models have fewer than two subsets."""
    probability, rows, subsets = _subsets(models)
    if len(subsets) < 2:
        return None
    points = {name: {letters(subset): point_of(groups[subset]) for subset in subsets if subset in groups}
              for name, groups in rows.items()}  # fmt: skip
    suffix, label = f" at drop probability {probability:g}" if probability else "", f"{compared_heading()} (%)"
    return Picture(
        SUBSET_PLOT,
        f"{capitalised(compared_heading())} per subset of the modalities{suffix}",
        " ".join(
            extremes(name, {group: point.value for group, point in bars.items()}) for name, bars in points.items()
        ),
        lambda: bar_figure(points, "modalities present", label),
    )


def missing_at_random(models: Models) -> Section:
    """Return the compared figure over the drop probability."""
    curves = _curves(models)
    body: list[TableLine] = [
        [f"{100 * probability:g}", *_curve_cells(models, curves, probability)]
        for probability in sorted({p for curve in curves.values() for p in curve.drop_prob})
    ]
    summaries = list(curves.values())
    foot: list[TableLine] = [
        ["mean height (area)", *summary_cells(summaries, "area")],
        ["fall (points)", *summary_cells(summaries, "fall", lower_is_better=True)],
        ["fall (% of initial value)", *summary_cells(summaries, "relative_fall", lower_is_better=True)],
    ]
    has_seeds = any(curve.num_seeds > 1 for curve in summaries)
    deviation = " ± is the standard deviation over the seeds." if has_seeds else ""
    columns = ["drop probability (%)", *(f"{name} ({letters(curve.modalities)})" for name, curve in curves.items())]
    table = Table(
        f"{capitalised(compared_heading())} per drop probability", columns, body, foot,
        caption=f"At least one modality of each clip is kept.{deviation}{_band_note(models)}",
    )  # fmt: skip
    heading = f"Modalities missing at random: {compared_heading()} (%)"
    return Section("sweep", heading, tables=[table], short="Missing at random")


def curve_picture(models: Models) -> Picture | None:
    """Return the plot over the drop probability; None: nothing was swept."""
    curves = _curves(models)
    if not curves:
        return None
    is_same = len({curve.modalities for curve in curves.values()}) == 1
    lines: dict[str, Line] = {
        name if is_same else f"{name} ({letters(curve.modalities)})": {
            100 * probability: _bounded(models[name], curve, place) for place, probability in enumerate(curve.drop_prob)
        }
        for name, curve in curves.items()
    }
    chance = next(iter(models.values())).summary.chance_top1[ACTION]
    label = f"{compared_heading()} (%)"
    return Picture(
        CURVE_PLOT,
        f"{capitalised(compared_heading())} over the probability that a modality is missing at inference",
        " ".join(
            extremes(name, {f"{x:g} %": point.value for x, point in line.items()}) for name, line in lines.items()
        ),
        lambda: line_figure(
            lines, "probability that a modality is missing (%)", label, (f"chance ({chance:.2g} %)", chance)
        ),
    )


def differences(comparison: Comparison, has_words: bool = True) -> list[Section]:
    """Return the paired tests of averages and falls and, folded, those of single conditions.

    Args:
        comparison: The tests.
        has_words: False to leave out the sentences on averages and falls.
    """
    pairs, heading = comparison.pairs, compared_heading()
    over: list[TableLine] = [
        [_figure_label(figure), *reversed(pair.models), _difference(test), interval(test.ci), p_value(test.p_holm)]
        for figure in FIGURE_NAMES
        for pair in pairs
        if (test := pair.test(figure)) is not None
    ]
    explanation = (
        f"The tests are paired on the same {comparison.num_clips:,} clips. Differences are in points: “model” minus "
        "“against”. Averages and falls have a paired bootstrap test with a 95 % interval, single conditions an exact "
        "McNemar test. p-values are corrected with Holm's method over all pairs and, for single conditions, over all "
        "conditions (those with a failing sensor separately). Significant differences are in bold."
    )
    words = [sentence for pair in pairs for sentence in verdicts(pair)] if has_words else []
    columns = ["figure", "model", "against", "difference", "95 % interval", "p"]
    several = Table(f"Paired tests of averages and falls: {heading}", columns, over, text_columns=frozenset({0, 1, 2}))
    by_pair = [{test.condition: test for test in pair.conditions} for pair in pairs]
    single: list[TableLine] = [
        [*condition_cells(condition), *(_tested(tests.get(condition)) for tests in by_pair)]
        for condition in dict.fromkeys(condition for tests in by_pair for condition in tests)
    ]
    names = [f"{second} – {first}" for first, second in (pair.models for pair in pairs)]
    conditions = Table(
        f"Paired tests of single conditions: {heading}", ["present", "drop %", "seed", *names], single,
        caption="Each cell shows the difference in points, with its p-value in parentheses.",
    )  # fmt: skip
    return [
        Section("differences", f"Significance of the differences: {heading}", [explanation, *words],
                [several], short="Differences"),
        Section("tests", f"Tests of single conditions: {heading}", tables=[conditions], is_folded=True,
                short="All tests"),
    ]  # fmt: skip


def times(timings: Mapping[str, float]) -> Section:
    """Return the duration of each step in seconds."""
    body = [[step, f"{seconds:,.1f}"] for step, seconds in timings.items()]
    return Section("time", "Time", tables=[Table("Seconds per step", ["step", "seconds"], body)])


def _subsets(models: Models) -> tuple[float, dict[str, dict[Subset, list[ResultRow]]], list[Subset]]:
    """Return the drop probability at which subsets are compared, their rows per model, and all subsets."""
    probability, rows = subset_rows(models)
    return probability, rows, list(dict.fromkeys(subset for groups in rows.values() for subset in groups))


def _curves(models: Models) -> dict[str, DropCurve]:
    return {name: curve for name, results in models.items() if (curve := results.summary.drop_curve) is not None}


def _curve_point(results: Results, curve: DropCurve, place: int) -> Point:
    """Return the mean over seeds at one drop probability, with the curve's own interval if the summary has it."""
    point = point_of(rows_of(results.rows, curve.modalities, curve.drop_prob[place]))
    ends = None if curve.mean_ci is None else curve.mean_ci[METRIC][place]
    return point if ends is None else Point(point.value, *ends)


def _bounded(results: Results, curve: DropCurve, place: int) -> Point:
    """Return the curve point with bounds: its interval, or else one standard deviation over several seeds."""
    point, std = _curve_point(results, curve, place), curve.std[METRIC][place]
    if point.low is None and point.value is not None and std and curve.num_seeds > 1:
        return Point(point.value, point.value - std, point.value + std)
    return point


def _curve_cells(models: Models, curves: Mapping[str, DropCurve], probability: float) -> list[Cell]:
    """Return a line of the table: mean, standard deviation over several seeds, interval."""
    points, deviations = [], []
    for name, curve in curves.items():
        place = curve.drop_prob.index(probability) if probability in curve.drop_prob else None
        points.append(Point(None) if place is None else _curve_point(models[name], curve, place))
        std = None if place is None or curve.num_seeds < 2 else curve.std[METRIC][place]
        deviations.append(f"± {std:.2f}" if std else "")
    return cells_of(points, deviations)


def _clip_counts(rows: Sequence[ResultRow]) -> str:
    """Return the clip count of a line; several counts if the models differ."""
    counts = (f"{row.num_clips:,}" + (f" ({row.num_without:,} without)" if row.num_without else "") for row in rows)
    return " / ".join(dict.fromkeys(counts))


def _figure_label(figure: str) -> str:
    """Return the name of a figure; readers expect higher to be better, so the fall says that it is not."""
    return f"{FIGURE_NAMES[figure]} (lower is better)" if figure == FALL else FIGURE_NAMES[figure]


def _difference(test: FigureTest | ConditionTest, aside: str = "") -> Cell:
    return Cell(f"{test.difference:+.2f}", aside, test.p_holm < LEVEL)


def _tested(test: ConditionTest | None) -> Cell:
    return Cell(NONE) if test is None or test.difference is None else _difference(test, f"({p_value(test.p_holm)})")


def _band_note(models: Models) -> str:
    curves = _curves(models).values()
    if any(curve.mean_ci for curve in curves):
        return " Square brackets and bands show 95 % intervals."
    return " The band shows ± one standard deviation." if any(curve.num_seeds > 1 for curve in curves) else ""
