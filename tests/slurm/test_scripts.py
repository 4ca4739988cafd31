"""The sbatch scripts are sound shell, run what was recorded, and requeue only what was preempted or lost a node.

`KARMMA_DIST_RECORD=1 pytest tests/slurm/test_scripts.py` writes the records again; then look at the difference.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from karmma_dist.cli import main
from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import UserError
from karmma_dist.launching.slurm import plan_jobs, slurm_job, submit_jobs
from karmma_dist.recipe import SlurmRecipe, load_recipe
from kits.patience import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded"
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))

_COMMANDS = {
    "srun": """\
if [[ " $* " == *" true "* ]]; then echo "srun $*" >> calls; exit "${GONE:-0}"; fi
echo "srun $*" >> calls
if [[ " $* " == *" doctor "* ]]; then exit "${UNFIT:-0}"; fi
for name in MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK; do echo "  $name=${!name:-}" >> calls; done
exit "${STATUS:-0}"
""",
    "squeue": 'echo "${STATE:-RUNNING}"',
    "scontrol": """\
case "$1 $2" in
"show hostnames") printf "n7\\nn8\\n" ;;
"show node") echo "NodeName=$3 NodeAddr=10.0.0.7 x" ;;
"show job") printf "JobId=%s JobName=x\n   Command=%s a/b c\n   WorkDir=/\n" "$3" "${SUBMITTED:-}" ;;
*) echo "scontrol $*" >> calls ;;
esac
""",
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's environment and checkout, with an srun, a squeue and a scontrol that record their calls."""
    for name, body in _COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    (tmp_path / "tools").mkdir()
    for name in ("bash", "cat", "date", "sed", "sort", "timeout"):  # and none of a Slurm of this machine
        path = shutil.which(name)
        assert path is not None
        (tmp_path / "tools" / name).symlink_to(path)
    for name, value in {
        "PATH": f"{tmp_path}:{tmp_path / 'tools'}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "40123",
        "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3",
        "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of slurm/ with bash."""
    command = ["bash", str(ROOT / "slurm" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)


def compare(name: str, text: str) -> None:
    """Check that `text` is what was recorded under `name`."""
    path = RECORDED / f"{name}.txt"
    if os.environ.get("KARMMA_DIST_RECORD") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_sound_shell(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], timeout=HANGS_S).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "-x", str(script)], capture_output=True, text=True, timeout=HANGS_S, cwd=ROOT
        )
        assert checked.returncode == 0, checked.stdout


def test_teacher_and_student_are_trained_by_one_script() -> None:
    teacher, student = ((ROOT / "slurm" / name).read_text().splitlines() for name in ("teacher.sh", "distill.sh"))
    differing = [line for line, other in zip(teacher, student, strict=True) if line != other]
    assert [line for line in differing if not line.startswith("#")] == [
        '. "$train" recipes/epic_kitchens/teacher.yaml "$@"'
    ]
    assert not [line for line in (ROOT / "slurm/train.sh").read_text().splitlines() if line.startswith("#SBATCH")]


def test_a_script_of_an_installation_finds_its_train_script(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job / "slurm").unlink()
    copied = job / "spool" / "slurm_script"
    copied.parent.mkdir()
    shutil.copy(ROOT / "slurm/teacher.sh", copied)
    monkeypatch.setenv("SUBMITTED", str(ROOT / "slurm/teacher.sh"))
    done = subprocess.run(["bash", str(copied), "a.yaml"], capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr
    assert "karmma-dist train a.yaml\n" in (job / "calls").read_text()


@pytest.mark.parametrize("name", ["distill.sh", "teacher.sh"])
@pytest.mark.parametrize("submitted", ["", "/gone/slurm/distill.sh"])
def test_a_script_submitted_from_elsewhere_ends_with_one_line(
    job: Path, monkeypatch: pytest.MonkeyPatch, name: str, submitted: str
) -> None:
    (job / "slurm").unlink()
    monkeypatch.setenv("SUBMITTED", submitted)
    done = run_script(name)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {job}: ")
    assert "slurm/train.sh" in line
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize(
    ("record", "script", "arguments"),
    [
        ("distill", "distill.sh", []),
        ("distill_overridden", "distill.sh", ["demo/distill", "--set", "a=b c"]),
        ("distill_default_overridden", "distill.sh", ["--set", "seed=1"]),
        ("teacher", "teacher.sh", []),
        ("eval", "eval.sh", []),
        ("eval_of_a_run", "eval.sh", ["runs/x", "--drop-prob", "0.5"]),
        ("study_task", "study.sh", [str(ROOT / "slurm/distill.sh"), "first.yaml", "second.yaml", "third.yaml"]),
        ("shard", "shard.sh", []),
        ("shard_of_another", "shard.sh", ["demo", "--raw", "r"]),
    ],
)
def test_a_script_runs_what_was_recorded(job: Path, record: str, script: str, arguments: list[str]) -> None:
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr
    printed = re.sub(r"^\d{4}-\S+ ", "DATE ", done.stdout, flags=re.MULTILINE)
    compare(record, f"{printed}---\n{(job / 'calls').read_text()}")


@pytest.mark.parametrize(
    ("changes", "last_line", "requeued"),
    [
        ({"STATUS": "85"}, "status 85, saved: requeued", True),
        ({"STATUS": "85", "SLURM_RESTART_COUNT": "19"}, "status 85, saved: requeued", True),
        ({"STATUS": "85", "SLURM_RESTART_COUNT": "20"}, "saved: not requeued after 20 ", False),
        ({"STATUS": "85", "STATE": "CANCELLED"}, "status 85\n", False),
        ({"STATUS": "85", "STATE": "PENDING"}, "status 85\n", False),
        ({"STATUS": "140"}, "status 140, .*: requeued", True),
        ({"STATUS": "2"}, "status 2\n", False),
        ({"STATUS": "1"}, "ended with status 1\n", False),
        ({"STATUS": "137"}, "status 137\n", False),
        ({"STATUS": "137", "GONE": "1"}, "status 137, .*node.*: requeued", True),
        ({"GONE": "1"}, "status 0\n", False),
    ],
)
def test_only_preempted_jobs_and_lost_nodes_are_requeued(
    job: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], last_line: str, requeued: bool
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    done = run_script("distill.sh")
    assert done.returncode == int(changes.get("STATUS", "0"))
    assert re.search(last_line, done.stdout)
    assert ("scontrol requeue 40123" in (job / "calls").read_text()) is requeued


def test_nothing_is_trained_where_ranks_do_not_fit_together(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is not requeued either: a second start would fail as well."""
    monkeypatch.setenv("UNFIT", "1")
    done = run_script("distill.sh", "demo/distill", "--resume", "never", "--set", "a=b c", "--set=seed=1")
    assert done.returncode == 1
    assert "ended with status 1\n" in done.stdout
    calls = (job / "calls").read_text()
    assert "doctor --distributed demo/distill --set a=b c --set=seed=1\n" in calls
    assert " train " not in calls
    assert "requeue" not in calls


def test_the_preflight_can_be_left_out(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARMMA_DIST_PREFLIGHT", "0")
    assert run_script("distill.sh").returncode == 0
    assert "doctor" not in (job / "calls").read_text()


def test_a_job_restarted_too_often_does_not_start(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "21")
    done = run_script("distill.sh")
    assert done.returncode == 1
    assert re.search(r"\b21\b.*\b20\b", done.stdout)
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("numbers", [("7", "7", "1"), ("0", "3", "4"), ("1", "7", "4")])
def test_an_array_with_gaps_is_refused(
    job: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[str, str, str]
) -> None:
    for name, value in zip(("MIN", "MAX", "COUNT"), numbers, strict=True):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    done = run_script("shard.sh")
    assert done.returncode == 2
    assert "--array=1-8" in done.stdout
    assert (job / "calls").read_text() == ""


SUBMITTED = ["distill.sh", "teacher.sh", "eval.sh", "shard.sh", "study.sh"]
"""Scripts that users submit."""


def arguments_of(script: str) -> list[str]:
    """Return arguments with which a script has something to do."""
    return [str(ROOT / "slurm/distill.sh"), "a.yaml", "b.yaml", "c.yaml"] if script == "study.sh" else []


def replace_command(job: Path, name: str, body: str) -> None:
    (job / name).unlink(missing_ok=True)
    (job / name).write_text(f"#!/bin/bash\n{body}\n")
    (job / name).chmod(0o755)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return what an early end says: the script failed, and its last line says so."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert lines, "it ended without a line"
    return done.stdout.splitlines()[-1] if done.stdout else lines[-1]


HOSTS_ONLY = """
[ "$1 $2" = "show hostnames" ] && { echo n7; echo n8; exit 0; }
[ "$1 $2" = "show node" ] && { echo "Node $3 not found"; exit 1; }
exit 0
"""


@pytest.mark.parametrize("script", ["distill.sh", "teacher.sh", "eval.sh", "study.sh"])
def test_a_node_that_slurm_does_not_show_is_addressed_by_its_name(job: Path, script: str) -> None:
    replace_command(job, "scontrol", HOSTS_ONLY)
    done = run_script(script, *arguments_of(script))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  MASTER_ADDR=n7\n" in (job / "calls").read_text()
    assert "scontrol show node n7 gives no address: ranks meet at the name n7" in done.stdout


@pytest.mark.parametrize("script", ["distill.sh", "eval.sh"])
def test_a_node_without_an_address_is_addressed_by_its_name(job: Path, script: str) -> None:
    replace_command(job, "scontrol", '[ "$1 $2" = "show node" ] && { echo "NodeName=$3 State=IDLE"; exit 0; }\necho n7')
    done = run_script(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  MASTER_ADDR=n7\n" in (job / "calls").read_text()


@pytest.mark.parametrize("body", [None, "exit 1", 'echo "slurm_load_node error" >&2; exit 1', "exit 0"])
@pytest.mark.parametrize("script", ["distill.sh", "teacher.sh", "eval.sh", "study.sh"])
def test_without_the_hosts_of_the_job_a_script_says_so(job: Path, script: str, body: str | None) -> None:
    (job / "scontrol").unlink()
    if body is not None:
        replace_command(job, "scontrol", body)
    line = last_line(run_script(script, *arguments_of(script)))
    assert "scontrol show hostnames n[7-8] does not name the first node" in line
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("script", ["distill.sh", "eval.sh"])
def test_one_node_needs_no_scontrol(job: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (job / "scontrol").unlink()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n7")
    done = run_script(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  MASTER_ADDR=n7\n" in (job / "calls").read_text()


@pytest.mark.parametrize("script", SUBMITTED)
def test_a_script_without_slurm_says_so(job: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(job)
    line = last_line(run_script(script, *arguments_of(script)))
    assert re.search(r"SLURM_\w+ is not set: submit this script with sbatch", line)
    assert (job / "calls").read_text() == ""


NEEDED = {
    "distill.sh": ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"],
    "eval.sh": ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"],
    "shard.sh": [
        "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX",
        "SLURM_ARRAY_TASK_COUNT",
    ],
    "study.sh": ["SLURM_ARRAY_TASK_ID"],
}  # fmt: skip


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in NEEDED.items() for name in names])
def test_a_missing_variable_of_slurm_is_named(
    job: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    monkeypatch.delenv(name)
    assert f"{name} is not set" in last_line(run_script(script, *arguments_of(script)))
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("script", SUBMITTED)
def test_a_submit_folder_that_is_gone_is_named(job: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(job / "gone"))
    done = run_script(script, *arguments_of(script))
    last_line(done)
    assert "gone" in done.stdout + done.stderr
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("activate", ["false", "exit 3", "no_such_command", "echo $NO_SUCH_VARIABLE", "if"])
@pytest.mark.parametrize("script", ["distill.sh", "eval.sh", "shard.sh"])
def test_a_broken_venv_is_a_line(job: Path, script: str, activate: str) -> None:
    (job / ".venv" / "bin").mkdir(parents=True)
    (job / ".venv" / "bin" / "activate").write_text(f"{activate}\n")
    done = run_script(script)
    assert "ended with status " in last_line(done)
    assert activate == "exit 3" or "activate" in done.stdout + done.stderr or activate in done.stdout
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("script", ["distill.sh", "teacher.sh", "eval.sh", "shard.sh"])
@pytest.mark.parametrize("body", [None, "exit 127"])
def test_a_missing_srun_or_program_is_named(job: Path, script: str, body: str | None) -> None:
    (job / "srun").unlink()
    if body is not None:
        replace_command(job, "srun", body)
    done = run_script(script)
    assert done.returncode == 127
    assert "ended with status 127: srun or karmma-dist is not found" in last_line(done)


def test_the_report_of_a_study_without_the_program_is_a_line(job: Path) -> None:  # noqa: ARG001
    assert "karmma-dist is not found" in last_line(run_script("study.sh", "report", "grid_epic/tab1"))


@pytest.mark.parametrize("arguments", [["--set"], ["demo/distill", "--set"], ["--set", "a=1", "--set"]])
def test_set_without_a_value_is_refused(job: Path, arguments: list[str]) -> None:
    done = run_script("distill.sh", *arguments)
    assert done.returncode == 2
    assert "--set is the last argument: KEY=VALUE is missing" in last_line(done)
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("distill.sh", [""], "the recipe is an empty argument"),
        ("shard.sh", [""], "the specification is an empty argument"),
        ("study.sh", [], "no arguments"),
        ("study.sh", ["/gone/distill.sh", "a.yaml"], "/gone/distill.sh: no such script"),
        ("study.sh", [str(ROOT / "slurm/distill.sh"), "a.yaml", "b.yaml"], "task 2 of the array has no recipe: 2 are"),
    ],
)
def test_unusable_arguments_are_named(job: Path, script: str, arguments: list[str], said: str) -> None:
    done = run_script(script, *arguments)
    assert done.returncode == 2
    assert said in last_line(done)
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize(("script", "command"), [("distill.sh", "train"), ("eval.sh", "eval"), ("shard.sh", "shard")])
def test_arguments_with_blanks_and_empty_values_arrive_as_they_are(job: Path, script: str, command: str) -> None:
    replace_command(job, "srun", 'printf "<%s>" "$@" >> calls\necho >> calls')
    done = run_script(script, "my recipe", "--set", "a=b  c", "--set", "", "--set=*", "--resume", "$HOME")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (job / "calls").read_text()
    assert f"<{command}><my recipe>" in calls
    assert "<--set><a=b  c><--set><><--set=*><--resume><$HOME>\n" in calls
    if script == "distill.sh":
        assert "<doctor><--distributed><my recipe><--set><a=b  c><--set><><--set=*>\n" in calls


@pytest.mark.parametrize("value", ["many", "-1", "1.5"])
def test_a_number_of_restarts_that_is_none_is_refused(
    job: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("KARMMA_DIST_MAX_RESTARTS", value)
    assert f"KARMMA_DIST_MAX_RESTARTS={value} is not a number" in last_line(run_script("distill.sh"))
    assert (job / "calls").read_text() == ""


@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("tasks_per_node", [1, 2, 4])
def test_tasks_of_a_step_are_the_ranks_of_one_world(num_nodes: int, tasks_per_node: int) -> None:
    """Tasks are numbered as srun does it: node by node, with local ids from 0 on each."""
    size = num_nodes * tasks_per_node
    worlds = [
        find_world({
            "SLURM_JOB_ID": "40123", "SLURM_STEP_NUM_TASKS": str(size), "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % tasks_per_node), "SLURM_NODEID": str(rank // tasks_per_node),
            "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20123",
        })
        for rank in range(size)
    ]  # fmt: skip
    expected = [World(rank, rank % tasks_per_node, size, "10.0.0.7", 20123) for rank in range(size)]
    assert worlds == expected


def test_launch_hands_the_recipes_flags_to_sbatch() -> None:
    slurm = SlurmRecipe(
        nodes=3, gpus_per_node=4, cpus_per_task=9, time="01:00:00", partition="a100", extra=["--qos=high"]
    )
    assert slurm_job(slurm, "job", ["demo/distill", "--set=seed=1"]).command(after="12") == [
        "sbatch", "--job-name=job", "--nodes=3", "--gpus-per-node=4", "--ntasks-per-node=4", "--cpus-per-task=9",
        "--time=01:00:00", "--partition=a100", "--qos=high", "--dependency=afterok:12", "--kill-on-invalid-dep=yes",
        str(ROOT / "slurm" / "distill.sh"), "demo/distill", "--set=seed=1",
    ]  # fmt: skip
    assert load_recipe("epic_kitchens/teacher").slurm.script == "teacher.sh"


@pytest.mark.parametrize(
    ("record", "arguments"),
    [
        ("launch", ["epic_kitchens/distill", "--slurm", "--nodes", "4", "--set", "training.epochs=50"]),
        ("launch_without_gpus", ["demo/distill", "--slurm"]),
        (
            "launch_chain",
            [
                "epic_kitchens/teacher", "--then", "epic_kitchens/distill", "--then", "epic_kitchens/baseline",
                "--set", "runs_dir=my runs", "--set", "seed=1",
            ],
        ),
    ],
)  # fmt: skip
def test_launch_prints_what_was_recorded(
    record: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", *arguments, "--dry-run"]) == 0
    compare(record, capsys.readouterr().out.replace(f"{ROOT}/", ""))


def test_a_dry_run_prints_the_submission_as_shell_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pasted into a shell, the lines submit what `launch` without --dry-run submits."""
    (tmp_path / "sbatch").write_text(
        '#!/bin/bash\nfor word in "$@"; do [ "$word" = --parsable ] || echo "$word" >> calls; done\n'
        'echo >> calls\n[[ " $* " != *" --parsable "* ]] || grep -c "^$" calls\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    recipes = ["demo/video", "demo/teacher", "demo/distill"]
    overrides = ["runs_dir=my runs", "seed=1"]
    assert submit_jobs(plan_jobs(recipes, overrides)) == [
        "job 1: demo-video", "job 2: demo-teacher, after job 1", "job 3: demo-distill, after job 2",
    ]  # fmt: skip
    submitted = (tmp_path / "calls").read_text()
    (tmp_path / "calls").unlink()
    sets = [word for override in overrides for word in ("--set", override)]
    assert main(["launch", recipes[0], "--then", recipes[1], "--then", recipes[2], *sets, "--dry-run"]) == 0
    subprocess.run(["bash", "-eu"], input=capsys.readouterr().out, text=True, timeout=HANGS_S, check=True)
    assert (tmp_path / "calls").read_text() == submitted
    assert "--dependency=afterok:2" in submitted
    assert submitted.count("--set=runs_dir=my runs") == 3
    assert submitted.count("--set=seed=1") == 1


def test_a_chain_that_breaks_off_names_the_queued_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").write_text(
        '#!/bin/bash\nif [[ "$*" == *afterok* ]]; then echo "sbatch: error: full" >&2; exit 1; fi\necho 77\n'
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match=r"sbatch .*full.*job 77: demo-teacher"):
        submit_jobs(plan_jobs(["demo/teacher", "demo/distill"]))


def test_submitting_without_slurm_names_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"sbatch .*PATH"):
        submit_jobs(plan_jobs(["demo/teacher"]))


@pytest.mark.parametrize("option", [["--slurm"], ["--then", "demo/distill"], ["--nodes", "2"], ["--test-only"]])
def test_options_of_slurm_are_refused_with_local_ranks(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "demo/teacher", "--local", "2", *option]) == 2
    assert "--local" in capsys.readouterr().err


def test_the_last_job_of_a_study_is_the_study_itself(job: Path) -> None:
    (job / "karmma-dist").write_text('#!/bin/bash\necho "karmma-dist $*" >> calls\n')
    (job / "karmma-dist").chmod(0o755)
    assert run_script("study.sh", "report", "grid_epic/tab1", "--seeds=2").returncode == 0
    assert (job / "calls").read_text() == "karmma-dist study grid_epic/tab1 --seeds=2\n"
