"""The sbatch scripts are sound shell, submit what they say, and take sbatch's and the recipe's flags."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.launching.slurm import sbatch_command, submit
from karmma_dist.recipe import SlurmRecipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """srun and scontrol that write down how they were called, in a job's environment."""
    commands = {
        "srun": 'echo "srun $* MASTER_ADDR=${MASTER_ADDR:-} MASTER_PORT=${MASTER_PORT:-}" >> calls; exit ${FAIL:-0}',
        "scontrol": 'case "$2" in hostnames) printf "n7\\nn8\\n";; node) echo "NodeName=$3 NodeAddr=10.0.0.7 x";; esac',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3",
        "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "slurm" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], timeout=60).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--severity=warning", str(script)], capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("distill.sh", [], "karmma-dist train recipes/epic_kitchens/distill.yaml"),
        ("distill.sh", ["--set", "seed=1"], "karmma-dist train recipes/epic_kitchens/distill.yaml --set seed=1"),
        ("distill.sh", ["demo/distill", "--set", "a=b c"], "karmma-dist train demo/distill --set a=b c"),
        ("teacher.sh", [], "karmma-dist train recipes/epic_kitchens/teacher.yaml"),
        ("eval.sh", [], "karmma-dist eval --subsets --sweep --seeds 3"),
        ("eval.sh", ["runs/x", "--drop-prob", "0.5"], "karmma-dist eval runs/x --drop-prob 0.5"),
        ("shard.sh", [], "karmma-dist shard epic_kitchens --part 2/4 --workers 3"),
        ("shard.sh", ["demo", "--raw", "r"], "karmma-dist shard demo --part 2/4 --workers 3 --raw r"),
    ],
)
def test_a_script_runs_its_command_under_srun(
    fake_slurm: Path, script: str, arguments: list[str], expected: str
) -> None:
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"{expected} MASTER_ADDR=" in (fake_slurm / "calls").read_text()
    assert "job 40123 on" in done.stdout
    assert "ended with status 0" in done.stdout


def test_ranks_meet_at_the_first_nodes_address(fake_slurm: Path) -> None:
    run_script("distill.sh")
    assert "MASTER_ADDR=10.0.0.7 MASTER_PORT=20123" in (fake_slurm / "calls").read_text()


def test_a_failing_program_fails_the_job(fake_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "2")
    done = run_script("distill.sh")
    assert done.returncode == 2
    assert "ended with status 2" in done.stdout
    assert fake_slurm.is_dir()


def test_launch_hands_the_recipes_flags_to_sbatch() -> None:
    slurm = SlurmRecipe(nodes=3, gpus_per_node=4, time="01:00:00", partition="a100", extra=["--qos=high"])
    command = sbatch_command(slurm, "job", ["demo/distill", "--set=seed=1"])
    assert command == [
        "sbatch", "--job-name=job", "--nodes=3", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=01:00:00",
        "--partition=a100", "--qos=high", str(ROOT / "slurm" / "distill.sh"), "demo/distill", "--set=seed=1",
    ]  # fmt: skip
    assert load_recipe("epic_kitchens/teacher").slurm.script == "teacher.sh"


def test_submitting_where_there_is_no_slurm_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is not on this machine's PATH"):
        submit(["sbatch", "x"])
