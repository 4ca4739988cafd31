"""Submits recipes with sbatch: the scripts that a user would submit, with flags from the recipes' `slurm` sections.

Several recipes form a chain: each job waits until the previous job succeeds (sbatch's afterok), however often that job
is preempted and requeued, and is cancelled if it fails.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from karmma_dist.errors import UserError, one_line
from karmma_dist.io.named_file import find_file
from karmma_dist.recipe import SlurmRecipe, load_chain, shared_overrides
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.recipe.name import job_name
from karmma_dist.runs.folder import finished_names

_SHAPE_FLAGS = ("-N", "-n", "-G", "--nodes", "--ntasks", "--gpus", "--gres")
"""Prefixes of the sbatch flags that change the number of ranks."""


@dataclass(frozen=True)
class SlurmJob:
    """One sbatch call."""

    name: str
    """Job name, shown by squeue and contained in the name of the log file."""
    flags: list[str]
    script: list[str]
    """Script and its arguments."""

    def command(self, *more: str, after: str | None = None, kind: str = "afterok") -> list[str]:
        """Return the sbatch command.

        Args:
            more: further flags.
            after: id of the job that must succeed first; several ids are joined by colons.
            kind: type of dependency: `afterok`, or `aftercorr` for arrays that wait task by task.
        """
        dependency = [] if after is None else [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", *self.flags, *dependency, *more, *self.script]


def slurm_job(slurm: SlurmRecipe, name: str, arguments: Sequence[str]) -> SlurmJob:
    """Return the job that runs a script of the slurm/ folder.

    Args:
        slurm: settings for the flags.
        name: name of the job.
        arguments: arguments of the script: the recipe and its overrides.

    Raises:
        UserError: the script does not exist.
    """
    # 0 GPUs are passed explicitly: flags missing here would be taken from the script's #SBATCH lines.
    flags = [
        f"--job-name={name}", f"--nodes={slurm.nodes}", f"--gpus-per-node={slurm.gpus_per_node}",
        f"--ntasks-per-node={slurm.gpus_per_node or 1}",
    ]  # fmt: skip
    optional = {
        "cpus-per-task": slurm.cpus_per_task, "time": slurm.time, "partition": slurm.partition,
        "account": slurm.account,
    }  # fmt: skip
    flags += [f"--{flag}={value}" for flag, value in optional.items() if value is not None]
    return SlurmJob(name, [*flags, *slurm.extra], [str(find_file(slurm.script, "slurm")), *arguments])


def slurm_ranks(slurm: SlurmRecipe) -> int | None:
    """Return a job's number of ranks: one per GPU, or per node without GPUs; None if flags in `extra` determine it."""
    if any(flag.startswith(_SHAPE_FLAGS) for flag in slurm.extra):
        return None
    return slurm.nodes * (slurm.gpus_per_node or 1)


def plan_jobs(
    recipes: Sequence[str], overrides: Sequence[str] = (), *, nodes: int | None = None, gpus_per_node: int | None = None
) -> list[SlurmJob]:
    """Return one job per recipe, in order.

    Args:
        recipes: names or paths.
        overrides: `a.b=c`; overrides of locations apply to all recipes, others only to the last recipe, as in
            `recipe.load_chain`.
        nodes: overrides the number of nodes of the recipes.
        gpus_per_node: overrides the number of GPUs per node of the recipes.

    Raises:
        UserError: a recipe or script does not exist or is invalid, or a batch does not divide over the ranks.
    """
    jobs = []
    earlier: set[str] = set()
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    for index, recipe in enumerate(recipes):
        applied = overrides if index == len(recipes) - 1 else shared_overrides(overrides)
        chain = load_chain(recipe, applied)
        loaded = chain[-1]
        slurm = loaded.slurm.model_copy(update={key: value for key, value in changes.items() if value is not None})
        if (ranks := slurm_ranks(slurm)) is not None:
            check_batches(chain, ranks, earlier | finished_names(chain))
        earlier |= {each.name for each in chain}
        arguments = [recipe, *(f"--set={override}" for override in applied)]
        jobs.append(slurm_job(slurm, job_name(loaded.name), arguments))
    return jobs


def shown_jobs(jobs: Sequence[SlurmJob]) -> list[str]:
    """Return shell lines that are equivalent to `submit_jobs`."""
    lines = []
    for number, job in enumerate(jobs, 1):
        words = [shlex.join(job.command())]
        if number > 1:  # the variable must stay outside the quotes that shlex adds
            words = [shlex.join(job.command(after="JOB")).replace("afterok:JOB", f'afterok:"$job{number - 1}"', 1)]
        last = number == len(jobs)
        lines.append(words[0] if last else f"job{number}=$({words[0].replace('sbatch', 'sbatch --parsable', 1)})")
    return lines


def submit_jobs(jobs: Sequence[SlurmJob]) -> list[str]:
    """Submit jobs, each waiting for the previous one, and return a line for each.

    Raises:
        UserError: sbatch is missing or refused a job; the message names the jobs submitted before.
    """
    lines: list[str] = []
    before: str | None = None
    for job in jobs:
        number = submit(job.command("--parsable", after=before), lines)
        lines.append(f"job {number}: {job.name}" + (f", after job {before}" if before else ""))
        before = number
    return lines


def submit(command: Sequence[str], before: Sequence[str]) -> str:
    """Run an sbatch command that prints only the job id, and return the id.

    Args:
        command: command with --parsable.
        before: lines about jobs submitted before, for the error message.

    Raises:
        UserError: sbatch is missing or refused a job.
    """
    try:
        output = _sbatch(command).stdout
    except UserError as error:
        queued = f"; already in the queue: {', '.join(before)} (scancel removes a job)" if before else ""
        raise UserError(f"{error}{queued}") from None
    return output.strip().partition(";")[0]  # "id;cluster" with several clusters


def ask_scheduler(jobs: Sequence[SlurmJob]) -> list[str]:
    """Ask the scheduler whether it would accept the jobs, and when they would start, without submitting anything.

    Raises:
        UserError: sbatch is missing or refused a job.
    """
    replies = [_sbatch(job.command("--test-only")).stderr for job in jobs]
    return [one_line(reply).removeprefix("sbatch: ") for reply in replies]


def _sbatch(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine's PATH: run this on a login node, or use --local N or --dry-run")
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError("sbatch did not respond within 120 s: is the controller up (scontrol ping)?") from None
    if done.returncode:
        raise UserError(f"sbatch refused: {one_line(done.stderr or done.stdout)}")
    return done
