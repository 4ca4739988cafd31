"""Hand a study to Slurm: per training an array with one task per seed, each task after the same seed of what it needs.

A last job, after all arrays, is `karmma-dist study` itself: it finds every run finished, evaluates and reports.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.launching.slurm import SlurmJob, slurm_job, slurm_ranks, submit
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.settings import find_file
from karmma_dist.studies.jobs import recipe_file
from karmma_dist.studies.plan import StudyPlan, StudyRun

SCRIPT = "study.sh"


@dataclass(frozen=True)
class ArrayJob:
    """One sbatch call and what it waits for."""

    job: SlurmJob
    waits: list[int]
    """Places, in the list of jobs, of those to finish before."""
    kind: str
    """`aftercorr`: a task after the same task; `afterok`: after all of them."""

    def command(self, ids: Sequence[str], *more: str) -> list[str]:
        """Return the sbatch command, given the ids of the jobs before it."""
        after = ":".join(ids[place] for place in self.waits)
        return self.job.command(*more, after=after or None, kind=self.kind)


def plan_arrays(plan: StudyPlan, out: Path, arguments: Sequence[str]) -> list[ArrayJob]:
    """Return the jobs of what is not finished, each after those it needs; the last one reports.

    Args:
        plan: The runs.
        out: Folder of the report and recipes.
        arguments: Of the `karmma-dist study` that reports.

    Raises:
        UserError: no such script, a folder holds a run of another recipe, or ranks that do not divide a batch.
    """
    groups: dict[str, list[StudyRun]] = {}
    for run in plan.chosen_runs:
        groups.setdefault(run.group, []).append(run)
    script = str(find_file(SCRIPT, "slurm"))
    jobs: list[ArrayJob] = []
    places: dict[str, int] = {}
    for group, runs in groups.items():
        if all(run.state() == "finished" for run in runs):
            continue
        slurm = runs[0].recipe.slurm
        if (ranks := slurm_ranks(slurm)) is not None:
            check_batches([runs[0].recipe], ranks)
        files = [str(recipe_file(out, run)) for run in runs]
        inner = slurm_job(slurm, group.replace("/", "-"), files)
        seeds = [run.recipe.seed for run in runs]
        # A seed that is finished ends at once, and so every task has its counterpart in the arrays it waits for.
        flags = [*inner.flags, f"--array=0-{len(seeds) - 1}"]
        job = SlurmJob(inner.name, flags, [script, *inner.script])
        needs = dict.fromkeys(plan.runs[need].group for run in runs for need in run.needs)
        places[group] = len(jobs)
        jobs.append(ArrayJob(job, [places[need] for need in needs if need in places], "aftercorr"))
    slurm = next(iter(plan.runs.values())).recipe.slurm
    changes = {"nodes": 1, "gpus_per_node": min(1, slurm.gpus_per_node), "extra": [*slurm.extra, "--output=%x_%j.log"]}
    one_gpu = slurm.model_copy(update={"script": SCRIPT, **changes})
    report = slurm_job(one_gpu, f"study-{plan.file.name.replace('/', '-')}", ["report", *arguments])
    return [*jobs, ArrayJob(report, list(range(len(jobs))), "afterok")]


def shown_arrays(jobs: Sequence[ArrayJob]) -> list[str]:
    """Return the shell lines that do what `submit_arrays` does."""
    marks = [f"JOB{number}JOB" for number in range(len(jobs))]
    lines = []
    for number, job in enumerate(jobs):
        line = shlex.join(job.command(marks))
        for place in job.waits:
            line = line.replace(marks[place], f'"$job{place + 1}"', 1)
        is_last = number == len(jobs) - 1
        lines.append(line if is_last else f"job{number + 1}=$({line.replace('sbatch', 'sbatch --parsable', 1)})")
    return lines


def submit_arrays(jobs: Sequence[ArrayJob]) -> list[str]:
    """Submit them and return a line for each.

    Raises:
        UserError: there is no sbatch here, or it refused; jobs submitted before are named.
    """
    ids: list[str] = []
    lines: list[str] = []
    for job in jobs:
        ids.append(submit(job.command(ids, "--parsable"), lines))
        after = ", ".join(ids[place] for place in job.waits)
        lines.append(f"job {ids[-1]}: {job.job.name}" + (f", after {after}" if after else ""))
    return lines
