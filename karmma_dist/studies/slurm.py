"""Submit a study to Slurm: one array per training with one task per seed.

A task starts after the tasks of the same seed in the arrays that it needs. The last job, after all arrays, is
`karmma-dist study` itself, which finds every run finished, evaluates the runs and writes the report.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_dist.io.named_file import find_file
from karmma_dist.launching.slurm import SlurmJob, slurm_job, slurm_ranks, submit
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.recipe.name import job_name
from karmma_dist.studies.jobs import recipe_file
from karmma_dist.studies.plan import StudyPlan, StudyRun

SCRIPT = "study.sh"


@dataclass(frozen=True)
class ArrayJob:
    """One sbatch call and its dependencies."""

    job: SlurmJob
    waits: list[int]
    """Indices, in the list of jobs, of the jobs that must finish first."""
    dependency: str
    """`aftercorr`: each task waits for the same task of the other arrays; `afterok`: the job waits for all tasks."""

    def command(self, ids: Sequence[str], *more: str) -> list[str]:
        """Return the sbatch command, given the ids of the earlier jobs."""
        after = ":".join(ids[place] for place in self.waits)
        return self.job.command(*more, after=after or None, kind=self.dependency)


def plan_arrays(plan: StudyPlan, out: Path, arguments: Sequence[str]) -> list[ArrayJob]:
    """Return the jobs for all unfinished runs, each after the jobs that it needs; the last job writes the report.

    Args:
        plan: Planned runs.
        out: Folder for report and recipes.
        arguments: Arguments of the `karmma-dist study` that writes the report.

    Raises:
        UserError: the script is missing, a folder holds a run of another recipe, or the number of ranks does not
            divide a batch.
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
        inner = slurm_job(slurm, job_name(group), files)
        seeds = [run.recipe.seed for run in runs]
        # Finished seeds are submitted too and end at once, so every task has its counterpart in dependent arrays.
        flags = [*inner.flags, f"--array=0-{len(seeds) - 1}"]
        job = SlurmJob(inner.name, flags, [script, *inner.script])
        needs = dict.fromkeys(plan.runs[need].group for run in runs for need in run.needs)
        places[group] = len(jobs)
        jobs.append(ArrayJob(job, [places[need] for need in needs if need in places], "aftercorr"))
    slurm = next(iter(plan.runs.values())).recipe.slurm
    changes = {"nodes": 1, "gpus_per_node": min(1, slurm.gpus_per_node), "extra": [*slurm.extra, "--output=%x_%j.log"]}
    one_gpu = slurm.model_copy(update={"script": SCRIPT, **changes})
    report = slurm_job(one_gpu, job_name(f"study-{plan.file.name}"), ["report", *arguments])
    return [*jobs, ArrayJob(report, list(range(len(jobs))), "afterok")]


def shown_arrays(jobs: Sequence[ArrayJob]) -> list[str]:
    """Return shell commands equivalent to `submit_arrays`."""
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
    """Submit the jobs and return a line about each.

    Raises:
        UserError: sbatch is missing or refused a job; the message names the jobs already submitted.
    """
    ids: list[str] = []
    lines: list[str] = []
    for job in jobs:
        ids.append(submit(job.command(ids, "--parsable"), lines))
        after = ", ".join(ids[place] for place in job.waits)
        lines.append(f"job {ids[-1]}: {job.job.name}" + (f", after {after}" if after else ""))
    return lines
