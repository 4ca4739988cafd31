"""The rank of a process: each launcher's variables, complete and incomplete, and invalid values."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.distributed import world as world_module
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
        ("MASTER_ADDR", "", "MASTER_ADDR is empty"),
        ("MASTER_ADDR", "n 1", "MASTER_ADDR='n 1' is neither a host name nor an address"),
        ("MASTER_ADDR", "n1:29500", "set it to n1, and MASTER_PORT to 29500"),
        ("MASTER_ADDR", "tcp://n1", "MASTER_ADDR='tcp://n1' is neither"),
        ("MASTER_ADDR", "256.1.1.1", "MASTER_ADDR='256.1.1.1' is neither"),
        ("MASTER_ADDR", "[::1", "MASTER_ADDR='\\[::1' is neither"),
        ("MASTER_ADDR", "::1:29500", "MASTER_ADDR='::1:29500' is neither"),
        ("MASTER_ADDR", "n" * 64, "is neither a host name nor an address"),
        ("MASTER_PORT", "1_000", "MASTER_PORT=1_000 is not a number"),
        ("MASTER_PORT", "٣٤", "MASTER_PORT=٣٤ is not a number"),
        ("MASTER_PORT", "9" * 5000, "is not a number"),
        ("MASTER_PORT", "-1", "MASTER_PORT=-1: a port is 1 to 65535"),
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


@pytest.mark.parametrize(
    ("address", "endpoint"),
    [
        ("::1", "[::1]:1234"), ("[::1]", "[::1]:1234"), (" n1\n", "n1:1234"), ("127.0.0.1", "127.0.0.1:1234"),
        ("n_1.lan.", "n_1.lan.:1234"), ("fe80::1%eth0", "[fe80::1%eth0]:1234"),
    ],
)  # fmt: skip
def test_names_and_addresses_of_both_kinds_are_taken(address: str, endpoint: str) -> None:
    assert find_world({**TORCHRUN, "MASTER_ADDR": address}).endpoint == endpoint
    assert find_world({**SLURM, "MASTER_ADDR": address, "MASTER_PORT": "1234"}).endpoint == endpoint


@given(st.sampled_from(sorted(TORCHRUN)), st.text(st.characters(exclude_characters="\0"), max_size=20))
def test_any_value_of_a_variable_is_taken_or_one_line(name: str, value: str) -> None:
    message, world = "", World(0, 0, 1, "", 1)
    try:
        world = find_world({**TORCHRUN, name: value})
    except UserError as error:
        message = str(error)
    assert not message or name in message or "local rank" in message
    assert 0 <= world.rank < world.size
    assert not any(character.isspace() for character in world.address)


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_a_missing_torchrun_variable_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} missing"):
        find_world({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize("body", ["exit 1", "sleep 60", "exit 0"])
def test_a_scontrol_that_fails_or_hangs_is_one_line(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{'exec ' if 'sleep' in body else ''}{body}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(world_module, "_SCONTROL_S", 0.5)
    environment = {key: value for key, value in SLURM.items() if key != "MASTER_ADDR"}
    with pytest.raises(UserError, match=r"scontrol show hostnames n\[0-3\] failed: export MASTER_ADDR"):
        find_world({**environment, "SLURM_STEP_NODELIST": "n[0-3]"})


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
