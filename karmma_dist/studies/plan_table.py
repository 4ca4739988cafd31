"""The table of `study --dry-run`: what each run, each row and the study compute, with and without memories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from karmma_dist.errors import UserError, nearest, quoted
from karmma_dist.recipe.model import EncoderMemory
from karmma_dist.studies.costs import RunCost, StudyCosts
from karmma_dist.studies.memories import FOLDER, Held, unremembered
from karmma_dist.studies.plan import StudyPlan
from karmma_dist.terminal import print_table
from karmma_dist.training.throughput import PEAK_TFLOPS, peak_tflops

MFU = 0.25
"""Share of a GPU's bf16 peak at which hours are estimated."""

_PLANNED, _ADVISED = "planned", "with tokens"


class Hours:
    """The hours of one GPU that FLOPs take.

    Args:
        gpu: Name of the GPU, such as H100.

    Raises:
        UserError: its peak is unknown.
    """

    def __init__(self, gpu: str) -> None:
        peak = peak_tflops(gpu)
        if peak is None:
            known = ", ".join(PEAK_TFLOPS)
            raise UserError(f"--gpu {quoted(gpu)}: unknown{nearest(gpu[:60], list(PEAK_TFLOPS))}; known are {known}")
        self.gpu, self._flops_per_hour = gpu, 3600 * MFU * peak * 1e12

    def text(self, flops: float | None) -> str:
        """Return the hours as text, or `?` if the FLOPs are unknown."""
        if flops is None:
            return "?"
        hours = flops / self._flops_per_hour
        return f"{hours:,.0f}" if hours >= 100 else f"{hours:.1f}" if hours >= 1 else f"{hours:.2g}"


def print_plan(plan: StudyPlan, costs: StudyCosts, gpu: str) -> None:
    """Print a line per run, in training order, then the cost of each row and of the study.

    Raises:
        UserError: the peak of the GPU is unknown.
    """
    hours = Hours(gpu)
    places = {cost.run.name: place for place, cost in enumerate(costs.runs, 1)}
    rows = []
    for place, cost in enumerate(costs.runs, 1):
        needs = ", ".join(str(places[need]) for need in cost.run.needs)
        passes = f"{cost.run.recipe.training.epochs} x {'?' if cost.clips is None else f'{cost.clips:,}'}"
        costly = [flops_text(cost.flops), flops_text(cost.planned), hours.text(cost.flops), hours.text(cost.planned)]
        rows.append([str(place), cost.run.name, cost.state, needs, passes, *costly])
    numbers = ["#", "after", "epochs x clips", *_headings(hours)]
    print_table(
        ["#", "run", "state", *numbers[1:]], rows, right=numbers, footer=[""],
        title=f"{plan.file.study.title} ({plan.file.path})",
    )  # fmt: skip
    _print_totals(plan, costs, hours)


def flops_text(flops: float | None) -> str:
    """Return FLOPs as text, such as `1.23e+18`, or `?` if unknown."""
    return "?" if flops is None else f"{flops:.2e}"


def _headings(hours: Hours) -> list[str]:
    return ["FLOPs", _PLANNED, f"{hours.gpu} hours", f"{_PLANNED} hours"]


def _print_totals(plan: StudyPlan, costs: StudyCosts, hours: Hours) -> None:
    """Print the cost of each row, including shared runs, of each stage, and of the study, which count each run once."""
    groups = [(label, [cost for cost in costs.runs if label in cost.run.labels]) for label in plan.chosen]
    for stage in dict.fromkeys(cost.run.recipe.stage for cost in costs.runs):
        groups.append((f"stage {stage}", [cost for cost in costs.runs if cost.run.recipe.stage == stage]))
    groups.append(("study", costs.runs))
    groups.append(("not finished", [cost for cost in costs.runs if cost.state != "finished"]))
    rows = []
    for label, chosen in groups:
        flops, planned, advised = (_sum(chosen, which) for which in (_flops, _planned, _advised))
        shared = sum(len(cost.run.labels) > 1 for cost in chosen)
        cells = [flops_text(flops), flops_text(planned), hours.text(flops), hours.text(planned)]
        rows.append([label, str(len(chosen)), str(shared), *cells, *([hours.text(advised)] * bool(costs.advised))])
    numbers = ["runs", "shared", *_headings(hours), *([f"hours {_ADVISED}"] * bool(costs.advised))]
    print_table(["row", *numbers], rows, right=numbers, footer=["", *_explanation(costs, hours)])


def _explanation(costs: StudyCosts, hours: Hours) -> list[str]:
    """Return what the columns count, and what the memories take on disk."""
    kinds = {"logits": "teachers' answers", "tokens": "encoders' tokens"}
    sizes = [f"{size} of {shown}" for kind, shown in kinds.items() if (size := _size(costs.planned, kind, costs.runs))]
    held = f"with memories ({' and '.join(sizes)}), if runs that share one train one after another"
    lines = [
        f"FLOPs: without any memory; hours: of one {hours.gpu} at {100 * MFU:.0f} % of its bf16 peak",
        f"{_PLANNED}: {held if sizes else 'the plan has no memory'}",
    ]
    if costs.advised:
        views = EncoderMemory.model_fields["views"].default
        lines += [
            f"{_ADVISED}: if every frozen encoder had a memory ({_size(costs.advised, 'tokens', costs.runs)}). Epochs "
            f"would take {views} views of a clip in turn instead of a new one each: another training, under other "
            "names. In the recipe:",
            *(f"    {line}" for line in _advice(costs.runs)),
        ]
    return lines


def _advice(costs: Iterable[RunCost]) -> list[str]:
    """Return the lines that give each frozen encoder a memory, by recipe."""
    lines: dict[str, None] = {}
    for run in (cost.run for cost in costs):
        recipe = run.group.partition("+")[0]
        for name in unremembered(run.recipe):
            lines[f"{recipe}: model.encoders.{name}.memory: {{path: {FOLDER}/{recipe}/{name}}}"] = None
    return list(lines)


def _size(memories: Sequence[Held], kind: str, costs: Sequence[RunCost]) -> str:
    """Return the bytes that the memories of a kind take on disk; empty without such memories."""
    sizes = [memory.disk_bytes for memory in memories if memory.kind == kind]
    if not sizes or any(cost.clips is None for cost in costs):
        return "? GB" if sizes else ""
    power, unit = next(((n, unit) for n, unit in ((9, "GB"), (6, "MB")) if sum(sizes) >= 10**n), (3, "kB"))
    value = sum(sizes) / 10**power
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def _sum(costs: Sequence[RunCost], which: Callable[[RunCost], float | None]) -> float | None:
    known = [flops for flops in map(which, costs) if flops is not None]
    return sum(known) if len(known) == len(costs) else None


def _flops(cost: RunCost) -> float | None:
    return cost.flops


def _planned(cost: RunCost) -> float | None:
    return cost.planned


def _advised(cost: RunCost) -> float | None:
    return cost.advised
