"""The rank of this process in its job, read from the launcher's environment variables.

    torchrun     RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (all five)
    srun         SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS; MASTER_ADDR and MASTER_PORT from the script, else
                 the step's first host and a port derived from the job id
    neither      one rank on a free port of this machine

Variables of other launchers (Open MPI, PMI) are ignored: under mpirun, set torchrun's variables from them.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from karmma_dist.errors import UserError

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of torchrun, all of which a rank needs."""
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_HOST_NAME = re.compile(r"(?:[\w-]{1,63}\.)*[\w-]{1,63}\.?")
_DOTTED = re.compile(r"[0-9]+(?:\.[0-9]+){3}\.?")
_LONGEST_NAME = 253
_SCONTROL_S = 30.0


@dataclass(frozen=True)
class World:
    """The rank of this process among `size`, and the address at which the ranks join."""

    rank: int
    local_rank: int
    size: int
    address: str
    port: int

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes files and prints."""
        return self.rank == 0

    @property
    def endpoint(self) -> str:
        """Address and port for messages: `n1:29500`, `[::1]:29500`."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


ALONE = World(0, 0, 1, "127.0.0.1", 0)
"""The world of a process that works alone."""


def find_world(environment: Mapping[str, str]) -> World:
    """Return this process's world, read from environment variables.

    Raises:
        UserError: some of a launcher's variables are missing, or a value is not a number or is out of range.
    """
    if "SLURM_STEP_NUM_TASKS" in environment and "RANK" not in environment:
        return _slurm_world(environment)
    present = [name for name in TORCHRUN_VARIABLES if name in environment]
    if all(name.startswith("MASTER_") for name in present):
        return World(0, 0, 1, "127.0.0.1", free_port())
    missing = [name for name in TORCHRUN_VARIABLES if name not in environment]
    if missing:
        raise UserError(
            f"{', '.join(present)} set but {', '.join(missing)} missing: start ranks with torchrun, srun or "
            "'karmma-dist launch', or unset all of them to run alone"
        )
    rank, local_rank, size, port = (
        _number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    address = _address(environment["MASTER_ADDR"])
    return _checked(World(rank, local_rank, size, address, port), "RANK", "WORLD_SIZE")


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _slurm_world(environment: Mapping[str, str]) -> World:
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if name not in environment]
    if missing:
        raise UserError(f"SLURM_STEP_NUM_TASKS set but {', '.join(missing)} missing: start ranks with srun")
    rank, local_rank, size = (
        _number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    )
    given = environment.get("MASTER_ADDR")
    address = _address(given) if given else _first_host(environment, size)
    has_port = bool(environment.get("MASTER_PORT"))
    port = _number(environment, "MASTER_PORT") if has_port else 20_000 + _number(environment, "SLURM_JOB_ID") % 20_000
    return _checked(World(rank, local_rank, size, address, port), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _checked(world: World, rank_name: str, size_name: str) -> World:
    """Return `world` if its values are valid; errors name the given variables."""
    if world.size < 1:
        raise UserError(f"{size_name}={world.size}: a job has at least one rank")
    if not 0 <= world.rank < world.size:
        raise UserError(f"{rank_name}={world.rank}: the ranks of {size_name}={world.size} are 0 to {world.size - 1}")
    if not 0 <= world.local_rank <= world.rank:
        raise UserError(
            f"local rank {world.local_rank} of {rank_name}={world.rank}: ranks are counted from 0 on every node"
        )
    if not 0 < world.port < 2**16:
        raise UserError(f"MASTER_PORT={world.port}: a port is 1 to 65535")
    return world


def _first_host(environment: Mapping[str, str], size: int) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if size == 1:
        return "127.0.0.1"
    scontrol = shutil.which("scontrol")
    if not nodes or not scontrol:
        raise UserError("MASTER_ADDR is not set and the first host of the Slurm step is unknown: export MASTER_ADDR")
    command = [scontrol, "show", "hostnames", nodes]
    try:
        hostnames = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SCONTROL_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol show hostnames {nodes} failed: export MASTER_ADDR ({error})") from None
    if hostnames.returncode or not hostnames.stdout.split():
        raise UserError(f"scontrol show hostnames {nodes} failed: export MASTER_ADDR ({hostnames.stderr.strip()})")
    return hostnames.stdout.split()[0]


def _address(text: str) -> str:
    """Return a MASTER_ADDR without the brackets of an IPv6 address.

    Raises:
        UserError: it is empty, or neither a host's name nor an address.
    """
    address = text.strip()
    if not address:
        raise UserError("MASTER_ADDR is empty: set it to the host of rank 0")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    is_ip = True
    try:
        ipaddress.ip_address(address)
    except ValueError:
        is_ip = False
    if is_ip or (_HOST_NAME.fullmatch(address) and len(address) <= _LONGEST_NAME and not _DOTTED.fullmatch(address)):
        return address
    host, _, port = address.rpartition(":")
    has_port = bool(_HOST_NAME.fullmatch(host)) and port.isdecimal()
    advice = f"set it to {host}, and MASTER_PORT to {port}" if has_port else "set it to the host of rank 0"
    raise UserError(f"MASTER_ADDR={text!r} is neither a host name nor an address: {advice}")


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name].strip()
    if not _NUMBER.fullmatch(text):
        raise UserError(f"{name}={environment[name]} is not a number")
    return int(text)
