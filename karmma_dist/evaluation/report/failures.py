"""The sections on sensors that fail: broken ones, and a modality that a share of the clips lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.conditions import MissingShare
from karmma_dist.evaluation.corruptions.kinds import NUM_SEVERITIES, parse_corruption
from karmma_dist.evaluation.report.cells import capitalised, cells_of, extremes, interval_note, point_of
from karmma_dist.evaluation.report.model import NONE, Picture, Section, Table, TableLine, best_cells
from karmma_dist.evaluation.report.plots import Point, panel_figure
from karmma_dist.evaluation.report.rows import condition_name
from karmma_dist.evaluation.report.sentences import Models, compared_heading
from karmma_dist.evaluation.results import ResultRow
from karmma_dist.evaluation.summary import (
    Subset,
    broken_condition,
    by_corruption,
    by_missing,
    mean_over_seeds,
    rows_of,
)
from karmma_dist.modalities import letters

CORRUPTION_PLOT, MISSING_PLOT = "corruptions.png", "missing.png"


def missing_shares(models: Models) -> Section:
    """Return the compared figure when a share of the clips lacks one modality, beside that of the intact clips."""
    rows = {name: by_missing(results.rows) for name, results in models.items()}
    conditions = list(dict.fromkeys(condition for groups in rows.values() for condition in groups))
    if not conditions:
        return Section("missing", "")
    body: list[TableLine] = []
    for subset in dict.fromkeys(subset for subset, _ in conditions):
        bases = [rows_of(results.rows, subset, 0.0) for results in models.values()]
        if any(bases):
            body.append([letters(subset), NONE, "0", *cells_of(list(map(point_of, bases)))])
        for condition in [condition for condition in conditions if condition[0] == subset]:
            share = MissingShare.parse(condition[1], subset)
            groups = [groups.get(condition, []) for groups in rows.values()]
            changes = [_change(group, base) for group, base in zip(groups, bases, strict=True)]
            cells = cells_of(list(map(point_of, groups)), changes)
            body.append([letters(subset), share.modality, f"{100 * share.share:g}", *cells])
    heading = compared_heading()
    table = Table(
        f"{capitalised(heading)} when a share of the clips lacks one modality",
        ["present", "missing", "share of clips (%)", *models], body, text_columns=frozenset({0, 1}),
        caption="A clip lacks the modality with this probability, unless it has no other. The clips depend on seed and "
        "clip key only and are nested. In parentheses: the change in points against no missing modality."
        + interval_note(models),
    )  # fmt: skip
    return Section(
        "missing", f"One modality missing in a share of the clips: {heading} (%)", tables=[table],
        pictures=_missing_picture(models, rows), short="Missing in a share",
    )  # fmt: skip


def _missing_picture(
    models: Models, rows: Mapping[str, Mapping[tuple[Subset, str], Sequence[ResultRow]]]
) -> list[Picture]:
    """Return one panel per modality over the share, of the fullest sets; nothing if no modality has two shares."""
    panels: dict[str, dict[str, dict[float, Point]]] = {}
    ends: dict[str, dict[str, float | None]] = {}
    for name, groups in rows.items():
        fullest = max((subset for subset, _ in groups), key=len, default=())
        for (subset, missing), seeds in groups.items():
            if subset == fullest:
                share, base = MissingShare.parse(missing, subset), rows_of(models[name].rows, subset, 0.0)
                lines = panels.setdefault(f"{letters([share.modality])} missing", {})
                line = lines.setdefault(name, {0: point_of(base)} if base else {})
                line[100 * share.share] = point_of(seeds)
                ends.setdefault(name, {})[f"{missing} of {letters(subset)}"] = mean_over_seeds(seeds)
    if not any(len(line) > 2 for lines in panels.values() for line in lines.values()):
        return []
    ordered = {title: {name: dict(sorted(line.items())) for name, line in lines.items()}
               for title, lines in panels.items()}  # fmt: skip
    label, shares = f"{compared_heading()} (%)", [0, 25, 50, 75, 100]
    return [Picture(
        MISSING_PLOT,
        f"{capitalised(compared_heading())} over the share of the clips that lacks a modality",
        " ".join(extremes(name, values) for name, values in ends.items()),
        lambda: panel_figure(ordered, "share of the clips that lacks the modality (%)", label, shares),
    )]  # fmt: skip


def broken_sensors(models: Models) -> list[Section]:
    """Return the cost of each corruption under each model's fullest condition and, folded, under the others."""
    fullest_conditions = {name: broken_condition(results) for name, results in models.items()}
    conditions = {name: condition for name, condition in fullest_conditions.items() if condition is not None}
    heading = compared_heading()
    if not conditions:
        return []
    rows = {name: by_corruption(models[name].rows, condition) for name, condition in conditions.items()}
    values = {name: {key: mean_over_seeds(seeds) for key, seeds in groups.items()} for name, groups in rows.items()}
    losses = [_average_loss(by_corrupt) for by_corrupt in values.values()]
    columns = [f"{name} ({condition_name(*condition)})" for name, condition in conditions.items()]
    table = Table(
        f"{capitalised(heading)} per corrupted sensor", ["broken sensor", "severity", *columns], _broken_lines(rows),
        [["average", "relative drop (%)", *best_cells(losses, lower_is_better=True)]], frozenset({0, 1}),
        "Names consist of sensor, kind and severity. A sensor that feeds several modalities, such as the camera, "
        "breaks all of them at once; a modality broken under its own name leaves the others intact. In parentheses: "
        "the change in points against intact sensors. A broken modality counts as present, and the model is not told "
        "that it is broken." + interval_note(models),
    )  # fmt: skip
    return [
        Section("broken", f"Broken sensors: {heading} (%)", tables=[table], pictures=[_broken_picture(values)],
                short="Broken sensors"),
        _other_conditions(models, conditions),
    ]  # fmt: skip


def _other_conditions(models: Models, shown: Mapping[str, tuple[Subset, float]]) -> Section:
    others = dict.fromkeys(
        (row.modalities, row.drop_prob)
        for name, results in models.items()
        for row in results.rows
        if row.corrupt is not None and (row.modalities, row.drop_prob) != shown[name]
    )
    tables = [
        Table(
            f"{condition_name(*condition)}: {compared_heading()} per corrupted sensor",
            ["broken sensor", "severity", *models],
            _broken_lines({name: by_corruption(results.rows, condition) for name, results in models.items()}),
            text_columns=frozenset({0, 1}),
        )
        for condition in others
    ]  # fmt: skip
    heading = f"Broken sensors under other conditions: {compared_heading()} (%)"
    return Section("broken-others", heading, tables=tables, is_folded=True, short="Under other conditions")


def _broken_lines(rows: Mapping[str, Mapping[str | None, Sequence[ResultRow]]]) -> list[TableLine]:
    """Return one line per corruption: each model's figure, its change against intact sensors, its interval."""
    lines: list[TableLine] = []
    for corrupt in dict.fromkeys(corrupt for groups in rows.values() for corrupt in groups):
        points = [point_of(groups.get(corrupt, [])) for groups in rows.values()]
        changes = ["" if corrupt is None else _change(groups.get(corrupt, []), groups.get(None, []))
                   for groups in rows.values()]  # fmt: skip
        meaning = "" if corrupt is None else parse_corruption(corrupt).meaning
        lines.append([corrupt or "none", meaning, *cells_of(points, changes)])
    return lines


def _change(rows: Sequence[ResultRow], intact: Sequence[ResultRow]) -> str:
    value, base = mean_over_seeds(rows), mean_over_seeds(intact)
    return "" if value is None or base is None else f"({value - base:+.2f})"


def _average_loss(values: Mapping[str | None, float | None]) -> float | None:
    broken = [value for corrupt, value in values.items() if corrupt is not None]
    return metrics.average_relative_drop(values.get(None), broken)


def _broken_picture(values: Mapping[str, Mapping[str | None, float | None]]) -> Picture:
    """Return one panel per kind of corruption, over the severity; severity 0 means intact sensors."""
    panels: dict[str, dict[str, dict[float, Point]]] = {}
    for name, by_corrupt in values.items():
        for corrupt, value in by_corrupt.items():
            if corrupt is not None:
                corruption = parse_corruption(corrupt)
                line = panels.setdefault(corruption.name, {}).setdefault(name, {0: Point(by_corrupt.get(None))})
                line[corruption.severity] = Point(value)
    ordered = {kind: {name: dict(sorted(line.items())) for name, line in lines.items()}
               for kind, lines in panels.items()}  # fmt: skip
    named = {name: {key or "intact sensors": value for key, value in by_corrupt.items()}
             for name, by_corrupt in values.items()}  # fmt: skip
    label = f"{compared_heading()} (%)"
    return Picture(
        CORRUPTION_PLOT,
        f"{capitalised(compared_heading())} over the severity of each corruption",
        " ".join(extremes(name, by_corrupt) for name, by_corrupt in named.items()),
        lambda: panel_figure(ordered, "severity (0: intact)", label, range(NUM_SEVERITIES + 1)),
    )


