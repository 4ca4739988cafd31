"""The report's section on broken sensors: what each failure costs each model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karmma_dist.evaluation import metrics
from karmma_dist.evaluation.corruptions.kinds import parse_corruption
from karmma_dist.evaluation.report import markdown
from karmma_dist.evaluation.report.plots import severity_curves
from karmma_dist.evaluation.report.rows import Row, mean_over_seeds
from karmma_dist.evaluation.summary import METRIC
from karmma_dist.modalities import letters

CORRUPTION_PLOT = "corruptions.png"


def corruption_values(results: Mapping[str, Any]) -> tuple[tuple[str, ...], float, dict[str | None, float | None]]:
    """The largest set of modalities and the lowest drop probability with broken sensors, and the figures there.

    Returns:
        The modalities, the drop probability, and action top-1 (percent, mean over seeds) per corruption; None is with
        whole sensors. Empty where no row has a broken sensor.
    """
    rows = [row for row in results["rows"] if row.get("corrupt")]
    if not rows:
        return (), 0.0, {}
    modalities: tuple[str, ...] = max((tuple(row["modalities"]) for row in rows), key=len)
    probability = min(row["drop_prob"] for row in rows if tuple(row["modalities"]) == modalities)
    groups: dict[str | None, list[Row]] = {None: []}
    for row in results["rows"]:
        if tuple(row["modalities"]) == modalities and row["drop_prob"] == probability:
            groups.setdefault(row.get("corrupt"), []).append(row)
    return modalities, probability, {name: mean_over_seeds(of, METRIC) for name, of in groups.items()}


def corruption_section(folder: Path, models: Mapping[str, dict[str, Any]]) -> str:
    """Table and plot of action top-1 per failure, or an empty string where no sensor is broken."""
    found = {name: corruption_values(results) for name, results in models.items()}
    found = {name: of for name, of in found.items() if of[2]}
    if not found:
        return ""
    names = list(dict.fromkeys(name for *_, values in found.values() for name in values))
    table = []
    for name in names:
        cells = [_cell(values.get(name), values.get(None)) for *_, values in found.values()]
        table.append([name or "none", "" if name is None else parse_corruption(name).meaning, *cells])
    losses = [_average_loss(values) for *_, values in found.values()]
    table.append(["average", "relative drop (%)", *map(markdown.percent, losses)])
    curves = {model: values for model, (*_, values) in found.items()}
    severity_curves(folder / CORRUPTION_PLOT, _panels(curves), "action top-1 (%)")
    columns = [_column(model, *of[:2]) for model, of in found.items()]
    return "\n".join(
        [
            "## Sensors that are there but broken: action top-1 (%)\n",
            _table(["broken", "severity means", *columns], table),
            "\nIn brackets the change in points against whole sensors. The model is not told that a sensor is broken.",
            "A broken camera is both video and flow; `video:...` leaves the stored flow as it was.",
            f"\n![action top-1 per failure]({CORRUPTION_PLOT})\n",
        ]
    )


def _panels(curves: Mapping[str, Mapping[str | None, float | None]]) -> dict[str, dict[str, dict[int, float | None]]]:
    """Per failure and model, the figure at each severity; 0 is with whole sensors."""
    panels: dict[str, dict[str, dict[int, float | None]]] = {}
    for model, values in curves.items():
        for name, value in values.items():
            if name is not None:
                corruption = parse_corruption(name)
                points = panels.setdefault(corruption.name, {}).setdefault(model, {0: values.get(None)})
                points[corruption.severity] = value
    return panels


def _cell(value: float | None, whole: float | None) -> str:
    change = "" if value is None or whole is None or value is whole else f" ({value - whole:+.2f})"
    return markdown.percent(value) + change


def _average_loss(values: Mapping[str | None, float | None]) -> float | None:
    whole = values.get(None)
    if whole is None:
        return None
    return metrics.average_relative_drop(whole, [value for name, value in values.items() if name is not None])


def _column(model: str, modalities: tuple[str, ...], probability: float) -> str:
    dropped = f", dropped with {probability:g}" if probability else ""
    return f"{markdown.text(model)} ({letters(modalities)}{dropped})"


def _table(header: list[str], body: list[list[str]]) -> str:
    rule = ["---", "---"] + ["---:"] * (len(header) - 2)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *body])
