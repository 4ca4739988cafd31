"""The checks of `doctor` outside Python: compiler, Slurm, disks, shards, shared memory, limits."""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from karmma_dist.distributed.endpoint import check_endpoint, hosts_store
from karmma_dist.distributed.world import TORCHRUN_VARIABLES, find_world
from karmma_dist.errors import UserError, masked, one_line
from karmma_dist.io.cache import cache_root
from karmma_dist.io.download import is_url
from karmma_dist.launching.doctor.check import Check, State
from karmma_dist.launching.slurm import slurm_ranks
from karmma_dist.modalities import MODALITIES
from karmma_dist.recipe import InputRecipe, Recipe
from karmma_dist.recipe.micro_batches import check_batches, divide_batch
from karmma_dist.runs.folder import finished_names
from karmma_dist.shards.folder import ShardFolder
from karmma_dist.streaming.handover import temporary_folder_problem

BATCH = "batch"
"""Name of the check that fails because of the user's input, not the state of the machine."""
TEMPORARY_FILES = "temporary files"
_COMMAND_LIMIT_S = 15.0
_COMPILE_LIMIT_S = 60.0
_GB = 1e9
_LOW_BYTES = 1 * _GB
"""Free space below which a checkpoint does not fit."""
_SCARCE_BYTES = 20 * _GB
_BATCHES_AHEAD = 3
"""Number of batches of a worker in shared memory: two prefetched and one in use."""
_LEAST_SHARED_BYTES = 2**28


def check_compiler() -> list[Check]:
    """Check for a C++ compiler that finds Python's headers, which torch.compile and DeepSpeed's operators need."""
    compiler = os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)
    needed = "only torch.compile and DeepSpeed's compiled operators need it"
    if compiler is None:
        return [Check("compiler", "note", "none", f"{needed}: apt install g++ python3-dev, or module load gcc")]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <Python.h>\nint answer() { return PY_MAJOR_VERSION; }\n", encoding="utf-8")
        command = [
            *compiler.split(), "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", str(source), "-o",
            str(source.with_suffix(".so")),
        ]  # fmt: skip
        code, out, err = _run(command, _COMPILE_LIMIT_S)
    if code:
        missing = "Python.h" in err
        advice = "install Python's headers: apt install python3-dev" if missing else f"see: {compiler} --version"
        reason = "no Python.h" if missing else _first_line(err or out)
        return [Check("compiler", "note", f"{compiler} cannot build an extension ({reason})", f"{needed}; {advice}")]
    ninja = "" if shutil.which("ninja") else "; no ninja"
    _, version, _ = _run([*compiler.split(), "--version"], _COMMAND_LIMIT_S)
    return [Check("compiler", "ok", f"{_first_line(version)}{ninja}")]


def check_slurm() -> list[Check]:
    """Check Slurm's commands, and that its controller responds."""
    commands = ("sbatch", "srun", "scontrol", "squeue")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands):
        return [Check("Slurm", "note", "not on this machine", "for a cluster run this on its login node")]
    if missing:
        return [Check("Slurm", "fix", f"no {', '.join(missing)} on PATH", "install all of Slurm's client commands")]
    code, out, err = _run(["scontrol", "ping"], _COMMAND_LIMIT_S)
    if "configuration source" in err:
        return [Check("Slurm", "note", "installed, but not configured for a cluster", "to submit jobs, set SLURM_CONF")]
    _, version, _ = _run(["sbatch", "--version"], _COMMAND_LIMIT_S)
    if code or " UP" not in out:
        reason = _first_line(out if "DOWN" in out else err or out)
        advice = "the controller does not respond: ask the administrator, or see slurmctld's log"
        return [Check("Slurm", "fix", f"{_first_line(version)}: {reason}", advice)]
    code, nodes, err = _run(["sinfo", "--noheader", "--format=%P %D %t"], _COMMAND_LIMIT_S)
    partitions = ", ".join(one_line(line) for line in nodes.splitlines()[:8]) or "no partition"
    job = os.environ.get("SLURM_JOB_ID")
    return [Check("Slurm", "ok", f"{_first_line(version)}, {partitions}" + (f", inside job {job}" if job else ""))]


def check_disk(chain: Sequence[Recipe]) -> list[Check]:
    """Check the space for runs, caches and temporary files."""
    places: dict[str, Path] = {"runs": Path(chain[-1].runs_dir) if chain else Path("runs")}
    remote = [recipe for recipe in chain if any(map(is_url, recipe.data.locations))]
    if remote:
        places["cache"] = cache_root(remote[0].data.cache_dir)
    return [*(check_room(name, path) for name, path in places.items()), *check_temporary_files(chain)]


def check_temporary_files(chain: Sequence[Recipe] = ()) -> list[Check]:
    """Check the folder for temporary files: its space, and that loader workers, if any, can open sockets there."""
    name, asked = TEMPORARY_FILES, os.environ.get("TMPDIR")
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        return [Check(name, "fix", one_line(error.strerror or error), "set TMPDIR to a folder that can be written")]
    checks = [check_room(name, Path(folder))]
    problem = temporary_folder_problem(folder)
    if problem is not None and (not chain or any(recipe.data.num_workers for recipe in chain)):
        checks.append(Check(name, "fix", problem, "set TMPDIR to a shorter path, such as /tmp"))
    if asked and os.path.abspath(asked) != os.path.abspath(folder):
        advice = "create TMPDIR, or change its permissions, or set another"
        checks.append(Check(name, "note", f"TMPDIR {asked} cannot be written: {folder} is used instead", advice))
    return checks


def check_rendezvous(environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Check the variables by which ranks find each other, if any are set, and that this machine can use them."""
    name = "rendezvous"
    if not any(variable in environment for variable in (*TORCHRUN_VARIABLES, "SLURM_STEP_NUM_TASKS")):
        return []
    try:
        world = find_world(environment)
        if world.size > 1:
            check_endpoint(world, hosts=hosts_store(world, environment))
    except UserError as error:
        return [Check(name, "fix", "the ranks of this job cannot meet", str(error))]
    if world.size == 1:
        return [Check(name, "ok", "one rank, which waits for no other")]
    return [Check(name, "ok", f"rank {world.rank} of {world.size}, at {world.endpoint}")]


def check_room(name: str, path: Path) -> Check:
    """Check that a folder is writable and has space, judging by its nearest existing parent."""
    path = path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = f"change the permissions of {existing}, or choose another folder"
        return Check(name, "fix", f"{path} is not writable", advice)
    free = shutil.disk_usage(existing).free
    shown = f"{path}: {free / _GB:,.1f} GB free"
    if free < _LOW_BYTES:
        return Check(name, "fix", shown, "too little for a checkpoint: free some space or choose another folder")
    if free < _SCARCE_BYTES and name != TEMPORARY_FILES:
        return Check(name, "note", shown, "this is little: the paper's runs keep two checkpoints and their weights")
    return Check(name, "ok", shown)


def check_shards(chain: Sequence[Recipe]) -> list[Check]:
    """Check that the recipes' shards can be opened, except those behind a URL, which the run itself checks."""
    checks = []
    for location in dict.fromkeys(location for recipe in chain for location in recipe.data.locations):
        if is_url(location):
            checks.append(Check("shards", "ok", f"{masked(location)}, fetched on demand"))
            continue
        try:
            folder = ShardFolder(location)
            counts = ", ".join(f"{split} {len(folder.clips(split)):,}" for split in folder.splits)
            checks.append(Check("shards", "ok", f"{location}: {counts} clips"))
        except UserError as error:
            checks.append(Check("shards", "fix", f"{location} cannot be opened", str(error)))
    return checks


def check_batch(chain: Sequence[Recipe], num_gpus: int) -> list[Check]:
    """Check that the ranks of this machine, one per GPU, divide the batches of unfinished recipes; also in Slurm jobs.

    Args:
        chain: the recipes.
        num_gpus: number of GPUs of this machine; if 0, one rank trains.
    """
    done = finished_names(chain)
    if all(recipe.name in done for recipe in chain):
        return []
    checks = []
    try:
        divisions = check_batches(chain, num_gpus or 1, done)
        warnings = dict.fromkeys(division.warning for division in divisions if division.warning)
        shown = "; ".join(dict.fromkeys(map(str, divisions)))
        checks.append(Check(BATCH, "note" if warnings else "ok", shown, "; ".join(warnings)))
    except UserError as error:
        checks.append(Check(BATCH, "fix", f"does not divide over {num_gpus or 1} ranks, one per GPU", str(error)))
    submitted = slurm_ranks(chain[-1].slurm)
    try:
        check_batches(chain if submitted else (), submitted or 1, done)
    except UserError as error:
        shown = f"does not divide over the {submitted} ranks of its Slurm job"
        checks.append(Check(f"{BATCH}, Slurm", "note", shown, str(error)))
    return checks


def check_shared_memory(chain: Sequence[Recipe], folder: Path = Path("/dev/shm")) -> Check:
    """Check that /dev/shm can hold the batches that decoding processes hand over."""
    name, advice = str(folder), "enlarge it: docker run --shm-size=16g, or mount -o remount,size=16g /dev/shm"
    if not folder.is_dir():
        return Check(name, "fix", "missing", "mount a tmpfs there, or set data.num_workers=0")
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    needed = max((shared_memory_bytes(recipe) for recipe in chain), default=_LEAST_SHARED_BYTES)
    shown = f"{free / 2**20:,.0f} MiB free"
    if chain:
        shown += f", decoding needs up to {needed / 2**20:,.0f} MiB per node"
    if free < needed:
        return Check(name, "fix", shown, f"{advice}; or lower data.num_workers")
    return Check(name, "ok", shown)


def shared_memory_bytes(recipe: Recipe) -> int:
    """Return the bytes of shared memory that one node needs if every clip has all modalities.

    Together, the ranks of a node hold the node's share of a batch, once per worker and prefetched batch.
    """
    if not recipe.data.num_workers:
        return 0
    nodes = min(recipe.slurm.nodes, recipe.training.batch_size)
    try:
        accumulation = divide_batch(recipe, slurm_ranks(recipe.slurm) or nodes).accumulation
    except UserError:  # reported by `check_batch`
        accumulation = recipe.training.accumulation or 1
    clips = math.ceil(recipe.training.batch_size / (accumulation * nodes))
    return clips * clip_bytes(recipe.inputs, recipe.data.modalities) * recipe.data.num_workers * _BATCHES_AHEAD


def clip_bytes(inputs: InputRecipe, modalities: Sequence[str]) -> int:
    """Return the bytes of a decoded clip with all these modalities, in the arrays of their decoders."""
    return sum(MODALITIES[name].decoder.num_bytes(inputs.section(name)) for name in modalities)


def check_limits() -> list[Check]:
    """Check the kernel's limits for a process: open files, and locked memory on InfiniBand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{_limit(soft)} (hard limit {_limit(hard)})"
    advice = f"ulimit -n {min(65536, hard) if hard != resource.RLIM_INFINITY else 65536} in the job script or shell"
    state: State = "ok"
    if soft != resource.RLIM_INFINITY and soft < 4096:
        state = "note" if soft >= 1024 else "fix"
        advice = f"batches are passed as open files, and many workers need more: {advice}"
    checks = [Check("open files", state, shown, "" if state == "ok" else advice)]
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked == resource.RLIM_INFINITY:
            checks.append(Check("locked memory", "ok", "unlimited"))
        else:
            advice = "InfiniBand needs it: ulimit -l unlimited (limits.conf; Slurm: LimitMEMLOCK of slurmd)"
            checks.append(Check("locked memory", "note", f"{locked / 2**20:.0f} MiB", advice))
    return checks


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _run(command: Sequence[str], limit_s: float) -> tuple[int, str, str]:
    """Run a command; return exit code, stdout and stderr. The code is 127 if it cannot start, 124 if it times out."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=limit_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"no response within {limit_s:.0f} s"
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no output")[:200]
