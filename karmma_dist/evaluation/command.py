"""What `karmma-dist eval` does: evaluate one run, or compare several, as it was asked to, write it down and say it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from karmma_dist.errors import UserError
from karmma_dist.evaluation.compare_runs import evaluate_and_compare, title, to_dict, write_comparison
from karmma_dist.evaluation.conditions import Condition, build_conditions
from karmma_dist.evaluation.exports import Exports
from karmma_dist.evaluation.ranks import joined_ranks
from karmma_dist.evaluation.report import results_table, write_report, write_results
from karmma_dist.evaluation.report_content import ReportContent
from karmma_dist.evaluation.run import Evaluated, evaluate_run, newest_finished_run
from karmma_dist.evaluation.views import parse_views
from karmma_dist.modality import parse_modalities
from karmma_dist.progress import Progress, Report, silent

RUNS = Path("runs")
"""Where runs are looked for, and where comparisons go."""


@dataclass(frozen=True)
class Request:
    """The command's options; None and empty: not given."""

    runs: tuple[Path, ...] = ()
    """Run folders or weights files; none: the newest finished run."""
    shards: str | None = None
    split: str | None = None
    drop_prob: float | None = None
    modalities: str | None = None
    subsets: bool = False
    sweep: bool = False
    num_seeds: int = 1
    corrupt: tuple[str, ...] = ()
    annotations: Path | None = None
    views: str | None = None
    exports: Exports = field(default_factory=Exports)
    out: Path | None = None

    def conditions(self, available: Sequence[str]) -> list[Condition]:
        """What is there at inference, of the modalities a model has."""
        chosen = None if self.modalities is None else parse_modalities(self.modalities, available)
        return build_conditions(
            available, modalities=chosen, drop_prob=self.drop_prob, subsets=self.subsets, sweep=self.sweep,
            num_seeds=self.num_seeds, corrupt=self.corrupt,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    done: dict[str, Evaluated]
    """Per run."""
    content: dict[str, Any]
    """The JSON object."""
    report: Path | None
    """The report.md; None: there were no labels to score."""

    @property
    def is_damaged(self) -> bool:
        """Whether a clip could not be read."""
        return any(one.results.summary["num_damaged"] for one in self.done.values())


def answer(request: Request) -> Answer | None:
    """Evaluate as asked, on all ranks of the job, and write reports. Every rank must call this.

    Returns:
        On rank 0 what came out, on the others None.

    Raises:
        UserError: see `run.evaluate_run` and `compare_runs.evaluate_and_compare`.
        Stopped: another rank is gone.
    """
    if len(request.runs) > 1 and request.exports.are_wanted:
        raise UserError("eval: --predictions and --submission are of one run: name only that one")
    views = None if request.views is None else parse_views(request.views)
    with ExitStack() as stack:
        world = stack.enter_context(joined_ranks())
        report: Report = stack.enter_context(Progress()) if world.is_main else silent
        evaluate = partial(
            evaluate_run, conditions=request.conditions, shards=request.shards, split=request.split,
            annotations=request.annotations, views=views, exports=request.exports, report=report, world=world,
        )  # fmt: skip
        if len(request.runs) > 1:
            done, comparison = evaluate_and_compare(request.runs, evaluate, writes=world.is_main)
            if world.is_main:
                path = write_comparison(request.out or RUNS / "comparison", done, comparison)
                return Answer(done, to_dict(done, comparison), path)
            return None
        one = evaluate(request.runs[0] if request.runs else newest_finished_run(RUNS))
        return _written(one, request.out or one.folder) if world.is_main else None


def _written(one: Evaluated, folder: Path) -> Answer:
    """Its results and report in `folder`, where there is something to report."""
    path, content = None, one.results.to_dict()
    if one.results.rows:
        write_results(one.results, folder)
        path = write_report(folder, ReportContent(title([one]), {one.name: content}))
    return Answer({one.name: one}, content, path)


def print_answer(found: Answer, as_text: bool) -> None:
    """Say what came out: on stdout tables and files where it is to be text, on stderr what a person should know."""
    for one in found.done.values():
        for line in one.exported:
            click.echo(line, err=not as_text)
        if not one.results.rows:
            split = one.data.validation_split
            click.echo(f"split '{split}' has no labels: predictions only, nothing is scored", err=True)
    if as_text and found.report is not None:
        for name, one in found.done.items():
            Console().print(results_table(one.results, name if len(found.done) > 1 else None))
        click.echo(f"report: {found.report}")
    for one in found.done.values():
        summary = one.results.summary
        if summary["num_damaged"]:
            first = summary["damage"][0]
            click.echo(f"{summary['num_damaged']} clips are damaged and not counted, the first: {first}", err=True)
