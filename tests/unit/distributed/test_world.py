"""The rank of a process: each launcher's variables, complete and incomplete, and invalid values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77", "MASTER_ADDR": "n0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "4", "RANK=4: the ranks of WORLD_SIZE=4 are 0 to 3"),
        ("RANK", "-1", "RANK=-1: the ranks of WORLD_SIZE=4"),
        ("RANK", "", "RANK= is not a number"),
        ("WORLD_SIZE", "0", "WORLD_SIZE=0: a job has at least one rank"),
        ("WORLD_SIZE", "two", "WORLD_SIZE=two is not a number"),
        ("LOCAL_RANK", "-1", "local rank -1 of RANK=3"),
        ("LOCAL_RANK", "4", "local rank 4 of RANK=3"),
        ("MASTER_PORT", "http", "MASTER_PORT=http is not a number"),
        ("MASTER_PORT", "0", "MASTER_PORT=0: a port is 1 to 65535"),
        ("MASTER_PORT", "65536", "MASTER_PORT=65536: a port is 1 to 65535"),
        ("MASTER_ADDR", " ", "MASTER_ADDR is empty"),
    ],
)
def test_an_invalid_torchrun_variable_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_world({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SLURM_PROCID", "8", "SLURM_PROCID=8: the ranks of SLURM_STEP_NUM_TASKS=8 are 0 to 7"),
        ("SLURM_STEP_NUM_TASKS", "0", "SLURM_STEP_NUM_TASKS=0"),
        ("SLURM_JOB_ID", "a", "SLURM_JOB_ID=a is not a number"),
        ("MASTER_PORT", "x", "MASTER_PORT=x is not a number"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999: a port is 1 to 65535"),
    ],
)
def test_an_invalid_slurm_variable_is_named(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_world({**SLURM, name: value})


@given(st.integers(1, 2**31 - 1))
def test_a_port_derived_from_a_job_id_is_valid(job: int) -> None:
    assert 20_000 <= find_world({**SLURM, "SLURM_JOB_ID": str(job)}).port < 40_000


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert find_world(batch).size == 1


def test_torchrun_variables_override_slurm_variables() -> None:
    assert find_world({**SLURM, **TORCHRUN}) == World(3, 1, 4, "n1", 1234)


def test_variables_of_open_mpi_are_ignored() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1"}
    assert find_world(mpi).size == 1
    assert find_world({**mpi, **TORCHRUN}).rank == 3


def test_a_master_port_and_address_alone_mean_one_process() -> None:
    assert find_world({"MASTER_PORT": "29500", "MASTER_ADDR": "n0"}).size == 1
