"""The launcher: sets torchrun's variables, passes signals and exit codes on, prints each error once, leaves no process.

Ranks here are a few lines of Python. Their standard output is the launcher's, so reading it to its end means that
every process that held it is gone.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from karmma_dist.distributed.world import World, find_world
from karmma_dist.errors import ERROR_FILE, UserError, say
from karmma_dist.launching.local import launch_local, rank_command, shown_commands
from kits.patience import HANGS_S

LAUNCHER = """
import sys
from karmma_dist.launching.local import launch_local
sys.exit(launch_local(int(sys.argv[1]), [sys.executable, "-c", sys.argv[2]], float(sys.argv[3])))
"""
RANK = """
import os, signal, subprocess, sys
from karmma_dist.errors import say
rank = int(os.environ["RANK"])
def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
"""


@contextmanager
def launcher(body: str, num_ranks: int = 2, grace_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher whose ranks run `body`."""
    command = [sys.executable, "-c", LAUNCHER, str(num_ranks), RANK + body, str(grace_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(body: str, num_ranks: int = 2, grace_s: float = 60.0) -> tuple[int, str, str]:
    """Launch ranks that run `body`; return exit code, stdout and stderr."""
    with launcher(body, num_ranks, grace_s) as process:
        out, err = process.communicate(timeout=HANGS_S)
        return process.returncode, out, err


def lines(process: subprocess.Popen[str], num: int) -> list[str]:
    """Return the next lines of the ranks, sorted."""
    assert process.stdout is not None
    return sorted(process.stdout.readline().strip() for _ in range(num))


def test_every_rank_gets_torchruns_variables() -> None:
    code, out, err = run("import json\ntell(json.dumps(dict(os.environ)))", num_ranks=3)
    assert (code, err) == (0, "")
    worlds = sorted((find_world(json.loads(line)) for line in out.splitlines()), key=lambda world: world.rank)
    assert worlds == [World(rank, rank, 3, "127.0.0.1", worlds[0].port) for rank in range(3)]


def test_shown_commands_are_those_of_the_ranks() -> None:
    shown = shown_commands(2, ["train", "my recipe"])
    assert [line.split()[0] for line in shown] == ["RANK=0", "RANK=1"]
    assert all(line.endswith("-m karmma_dist train 'my recipe'") for line in shown)
    assert rank_command(["train"])[1:] == ["-m", "karmma_dist", "train"]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP])
def test_signal_reaches_every_rank_and_exit_code_is_85(number: signal.Signals) -> None:
    body = f"""
signal.pthread_sigmask(signal.SIG_BLOCK, [{int(number)}])
tell("ready")
tell("got", int(signal.sigwait([{int(number)}])))
sys.exit(85)
"""
    with launcher(body) as process:
        assert lines(process, 2) == ["ready", "ready"]
        process.send_signal(number)
        out, err = process.communicate(timeout=HANGS_S)
    assert (process.returncode, err) == (85, "")
    assert out.splitlines() == [f"got {int(number)}"] * 2


def test_killed_rank_is_named_and_ends_all_other_processes() -> None:
    body = """
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
tell(rank, os.getpid())
signal.pause()
"""
    with launcher(body, num_ranks=3, grace_s=0.1) as process:
        pids = dict(line.split() for line in lines(process, 3))
        subprocess.run(["kill", "-KILL", pids["1"]], check=True, timeout=HANGS_S)
        _, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == 137
    assert err == "error: rank 1 was killed by SIGKILL; the others were ended\n"


def test_no_rank_survives_a_killed_launcher() -> None:
    with launcher('tell("ready")\nsignal.pause()') as process:
        assert lines(process, 2) == ["ready", "ready"]
        process.kill()
        out, err = process.communicate(timeout=HANGS_S)  # returns when no rank holds the pipes open
    assert (process.returncode, out, err) == (-signal.SIGKILL, "", "")


def test_error_of_all_ranks_is_printed_once() -> None:
    assert run('say("error: no teacher in runs/a")\nsys.exit(2)', num_ranks=3) == (
        2, "", "error: no teacher in runs/a\n",
    )  # fmt: skip


def test_error_of_one_rank_names_it_and_others_are_silent() -> None:
    body = """
if rank == 1:
    say("error: disk full")
    sys.exit(2)
say("error: rank 1 is gone", of_another=True)
sys.exit(1)
"""
    assert run(body) == (2, "", "rank 1: error: disk full\n")


def test_bug_in_one_rank_is_reported_with_its_exit_code() -> None:
    body = """
if rank == 1:
    sys.exit(7)
say("error: rank 1 is gone", of_another=True)
sys.exit(1)
"""
    code, _, err = run(body)
    assert code in (1, 7)  # whichever was first
    assert err == "error: rank 1 ended with exit code 7; the others were ended\n"


@pytest.mark.parametrize(
    ("end", "line"),
    [
        ("sys.exit(2)", "error: ranks 1, 2 ended with exit code 2; the others were ended\n"),
        ("sys.exit(7)", "error: ranks 1, 2 ended with exit code 7; the others were ended\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "error: ranks 1, 2 were killed by SIGKILL; the others were ended\n"),
    ],
)
def test_ranks_that_end_without_a_word_before_the_others_meet_are_named(end: str, line: str) -> None:
    body = f"""
if rank:
    {end}
"""
    _, out, err = run(body, num_ranks=3)
    assert (out, err) == ("", line)


def test_a_rank_that_has_said_what_is_wrong_is_not_named_again() -> None:
    body = 'if rank == 1:\n    say("error: bad")\n    sys.exit(2)\nif rank == 2:\n    sys.exit(2)'
    _, _, err = run(body, num_ranks=3)
    assert sorted(err.splitlines()) == [
        "error: rank 2 ended with exit code 2; the others were ended", "rank 1: error: bad",
    ]  # fmt: skip


def test_ranks_that_cannot_meet_leave_one_line() -> None:
    """Rank 0's port is taken: the other rank, which is told nothing, has nothing to add."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        body = f"""
os.environ["MASTER_PORT"] = "{taken.getsockname()[1]}"
sys.argv = ["karmma-dist"]
from karmma_dist import cli
from karmma_dist.distributed.process_group import process_group
from karmma_dist.distributed.world import find_world
def join():
    with process_group(find_world(os.environ)):
        pass
cli.cli = lambda **_: join()
sys.exit(cli.main([]))
"""
        code, _, err = run(body, grace_s=1.0)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: rank 0 (")
    assert "cannot listen at 127.0.0.1:" in line


def test_a_folder_for_temporary_files_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=r"Read-only file system.*TMPDIR"):
        launch_local(1, ["true"])


def test_ranks_that_wait_for_a_failed_rank_are_killed() -> None:
    code, _, err = run('if rank == 0:\n    say("error: bad")\n    sys.exit(2)\nsignal.pause()', grace_s=0.1)
    assert (code, err) == (2, "error: bad\n")


def test_ctrl_c_reaches_every_rank_once_and_prints_one_line() -> None:
    body = """
try:
    tell("ready")
    while True:
        signal.pause()
except KeyboardInterrupt:
    tell("interrupted")
    say("interrupted: run the same command again to go on")
    sys.exit(130)
"""
    with launcher(body) as process:
        assert lines(process, 2) == ["ready", "ready"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANGS_S)
    assert (process.returncode, err) == (130, "interrupted: run the same command again to go on\n")
    assert out.splitlines() == ["interrupted"] * 2


def test_a_second_ctrl_c_ends_ranks_that_ignore_the_first() -> None:
    body = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
tell("ready")
signal.sigwait([signal.SIGINT])
tell("ignored")
signal.pause()
"""
    with launcher(body) as process:
        assert lines(process, 2) == ["ready", "ready"]
        process.send_signal(signal.SIGINT)
        assert lines(process, 2) == ["ignored", "ignored"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANGS_S)
    assert (process.returncode, err) == (130, "interrupted: the ranks were killed before they reported anything\n")


def test_rank_end_is_noticed_if_another_thread_takes_sigchld() -> None:
    program = """
import signal, sys, threading, time
from karmma_dist.launching import local
threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()  # does not block SIGCHLD
collect = local.Ranks._collect
def collect_slowly(ranks):
    collect(ranks)
    time.sleep(1)  # the second rank ends in here
local.Ranks._collect = collect_slowly
body = "import os, time; time.sleep(0.5 * int(os.environ['RANK']))"
sys.exit(local.launch_local(2, [sys.executable, "-c", body]))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=HANGS_S).returncode == 0


def test_command_that_cannot_start_leaves_the_signal_mask_unchanged() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(FileNotFoundError):
        launch_local(2, ["/nonexistent/python"])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "error: x"),
        ({"RANK": "0"}, "error: x"),
        ({"RANK": "2"}, "rank 2: error: x"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, "rank 3: error: x"),
        ({"SLURM_PROCID": "0"}, "error: x"),
        ({"RANK": "1", ERROR_FILE: "/nonexistent/1"}, "rank 1: error: x (not left in /nonexistent/1: No such file or"),
    ],
)
def test_ranks_of_other_launchers_print_their_rank(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ERROR_FILE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say("error: x")
    assert capsys.readouterr().err.startswith(expected)


def test_message_about_a_lost_rank_is_shown_if_alone() -> None:
    assert run("say('error: rank 1 hangs', of_another=True)\nsys.exit(1)", num_ranks=1) == (
        1, "", "error: rank 1 hangs\n",
    )  # fmt: skip
