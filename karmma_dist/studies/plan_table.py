"""The plan of a study as a table: each run once, whether it is done, what it waits for and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from karmma_dist.studies.costs import RunCost
from karmma_dist.studies.plan import StudyPlan


def plan_table(plan: StudyPlan, costs: Sequence[RunCost]) -> Table:
    """Return a line per run, in the order to train them."""
    places = {cost.run.name: place for place, cost in enumerate(costs, 1)}
    table = Table(title=f"{plan.file.study.title} ({plan.file.path})", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    table.add_column("state", no_wrap=True)
    for heading in ("after", "epochs x clips", "FLOPs"):
        table.add_column(heading, justify="right")
    for place, cost in enumerate(costs, 1):
        needs = ", ".join(str(places[need]) for need in cost.run.needs)
        passes = f"{cost.run.recipe.training.epochs} x {'?' if cost.clips is None else f'{cost.clips:,}'}"
        cells = [str(place), cost.run.name, cost.state, needs, passes, flops_text(cost.flops)]
        table.add_row(*map(Text, cells))
    return table


def total_lines(plan: StudyPlan, costs: Sequence[RunCost]) -> list[str]:
    """Return the cost per row, runs that rows share counted with each of them, and of the study, each run once."""
    lines = []
    for label in plan.chosen:
        own = [cost for cost in costs if label in cost.run.labels]
        shared = sum(len(cost.run.labels) > 1 for cost in own)
        aside = f", {shared} of them shared with other rows" if shared else ""
        lines.append(f"{label}: {_sum(own)} in {len(own)} run{'s' * (len(own) != 1)}{aside}")
    left = [cost for cost in costs if cost.state != "finished"]
    lines.append(f"study: {_sum(costs)} in {len(costs)} runs; not finished: {_sum(left)} in {len(left)}")
    return lines


def flops_text(flops: float | None) -> str:
    """Return FLOPs as a person reads them: 1.23e+18."""
    return "?" if flops is None else f"{flops:.2e}"


def _sum(costs: Sequence[RunCost]) -> str:
    known = [cost.flops for cost in costs if cost.flops is not None]
    return f"{flops_text(sum(known) if len(known) == len(costs) else None)} FLOPs"
