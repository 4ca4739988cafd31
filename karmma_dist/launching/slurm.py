"""Hand recipes to sbatch: the same scripts a user would submit, with the flags of the recipes' `slurm` sections.

Several recipes make a chain: each job waits for the one before to finish (sbatch's afterok), however often that one is
preempted and requeued on its way, and is cancelled when that one fails.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from karmma_dist.errors import UserError, one_line
from karmma_dist.recipe import SlurmRecipe, load_chain, shared_overrides
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names
from karmma_dist.settings import find_file

_SHAPE_FLAGS = ("-N", "-n", "-G", "--nodes", "--ntasks", "--gpus", "--gres")
"""Beginnings of the sbatch flags that change how many ranks there are."""


@dataclass(frozen=True)
class SlurmJob:
    """One sbatch call."""

    name: str
    """Shown by squeue and part of the log's name."""
    flags: list[str]
    script: list[str]
    """The script and its arguments."""

    def command(self, *more: str, after: str | None = None, kind: str = "afterok") -> list[str]:
        """The sbatch command.

        Args:
            more: further flags.
            after: id of the job that has to finish before; several are joined by colons.
            kind: how it waits: `afterok`, or of arrays `aftercorr`, task by task.
        """
        waits = [] if after is None else [f"--dependency={kind}:{after}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", *self.flags, *waits, *more, *self.script]


def slurm_job(slurm: SlurmRecipe, name: str, arguments: Sequence[str]) -> SlurmJob:
    """The job of a script of the slurm/ folder.

    Args:
        slurm: flags.
        name: the job's.
        arguments: passed on to the script: the recipe and its overrides.

    Raises:
        UserError: no such script.
    """
    # 0 GPUs are said aloud: what the command line leaves open, the script's own #SBATCH lines decide.
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
    """Return the ranks of a job: one per GPU, or per node without GPUs; None: flags in `extra` decide."""
    if any(flag.startswith(_SHAPE_FLAGS) for flag in slurm.extra):
        return None
    return slurm.nodes * (slurm.gpus_per_node or 1)


def plan_jobs(
    recipes: Sequence[str], overrides: Sequence[str] = (), *, nodes: int | None = None, gpus_per_node: int | None = None
) -> list[SlurmJob]:
    """One job per recipe, in order.

    Args:
        recipes: names or paths.
        overrides: `a.b=c`; where things are holds for all of them, the others for the last alone, as in
            `recipe.load_chain`.
        nodes: instead of the recipes' own.
        gpus_per_node: instead of the recipes' own.

    Raises:
        UserError: a recipe or a script that is not there or is wrong, or a batch that the ranks do not divide.
    """
    jobs = []
    earlier: set[str] = set()
    changes = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    for place, recipe in enumerate(recipes):
        applied = overrides if place == len(recipes) - 1 else shared_overrides(overrides)
        chain = load_chain(recipe, applied)
        loaded = chain[-1]
        slurm = loaded.slurm.model_copy(update={key: value for key, value in changes.items() if value is not None})
        if (ranks := slurm_ranks(slurm)) is not None:
            check_batches(chain, ranks, earlier | finished_names(chain))
        earlier |= {each.name for each in chain}
        arguments = [recipe, *(f"--set={override}" for override in applied)]
        jobs.append(slurm_job(slurm, loaded.name.replace("/", "-"), arguments))
    return jobs


def shown_jobs(jobs: Sequence[SlurmJob]) -> list[str]:
    """The shell lines that do what `submit_jobs` does."""
    lines = []
    for number, job in enumerate(jobs, 1):
        words = [shlex.join(job.command())]
        if number > 1:  # the variable has to stay outside the quotes that shlex puts around what is special
            words = [shlex.join(job.command(after="JOB")).replace("afterok:JOB", f'afterok:"$job{number - 1}"', 1)]
        last = number == len(jobs)
        lines.append(words[0] if last else f"job{number}=$({words[0].replace('sbatch', 'sbatch --parsable', 1)})")
    return lines


def submit_jobs(jobs: Sequence[SlurmJob]) -> list[str]:
    """Submit them, each waiting for the one before; returns a line for each.

    Raises:
        UserError: there is no sbatch here, or it refused; jobs submitted before are named.
    """
    lines: list[str] = []
    before: str | None = None
    for job in jobs:
        number = submit(job.command("--parsable", after=before), lines)
        lines.append(f"job {number}: {job.name}" + (f", after job {before}" if before else ""))
        before = number
    return lines


def submit(command: Sequence[str], before: Sequence[str]) -> str:
    """Run an sbatch command that is to print its job's id alone, and return that id.

    Args:
        command: with --parsable.
        before: lines about jobs submitted before, named in the error.

    Raises:
        UserError: as `submit_jobs`.
    """
    try:
        answer = _sbatch(command).stdout
    except UserError as error:
        left = f"; in the queue already: {', '.join(before)} (scancel takes a job out)" if before else ""
        raise UserError(f"{error}{left}") from None
    return answer.strip().partition(";")[0]  # "id;cluster" where there are several clusters


def ask_scheduler(jobs: Sequence[SlurmJob]) -> list[str]:
    """Ask the scheduler whether it would take them, and when they would start; nothing is submitted.

    Raises:
        UserError: as `submit_jobs`.
    """
    answers = [_sbatch(job.command("--test-only")).stderr for job in jobs]
    return [one_line(answer).removeprefix("sbatch: ") for answer in answers]


def _sbatch(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine's PATH: run this on a login node, or use --local N or --dry-run")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError("sbatch did not answer within 120 s: is the controller up (scontrol ping)?") from None
    if done.returncode:
        raise UserError(f"sbatch refused: {one_line(done.stderr or done.stdout)}")
    return done
