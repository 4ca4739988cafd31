"""Hand a recipe to sbatch: the same script a user would submit, with the flags of the recipe's `slurm` section."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from karmma_dist.errors import UserError
from karmma_dist.recipe import SlurmRecipe
from karmma_dist.settings import find_file


def sbatch_command(slurm: SlurmRecipe, job_name: str, arguments: Sequence[str]) -> list[str]:
    """The sbatch command for a script of the slurm/ folder.

    Args:
        slurm: flags.
        job_name: shown by squeue.
        arguments: passed on to the script: the recipe and its overrides.
    """
    flags = [f"--job-name={job_name}", f"--nodes={slurm.nodes}"]
    if slurm.gpus_per_node:
        flags += [f"--gpus-per-node={slurm.gpus_per_node}", f"--ntasks-per-node={slurm.gpus_per_node}"]
    else:
        flags += ["--ntasks-per-node=1"]
    optional = {"time": slurm.time, "partition": slurm.partition, "account": slurm.account}
    flags += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    return ["sbatch", *flags, *slurm.extra, str(find_file(slurm.script, "slurm")), *arguments]


def submit(command: Sequence[str]) -> str:
    """Run sbatch; returns what it printed ("Submitted batch job N").

    Raises:
        UserError: there is no sbatch here, or it refused.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine's PATH: run this on a login node, or use --local N or --dry-run")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise UserError(f"sbatch refused: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()
