"""A real Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own.

No system service is used or touched: munged has its own key and socket, ports are picked free, every file lies in the
cluster's folder, and every process is ended by its id.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kits.patience import HANGS_S

NODES = ("n1", "n2")
REQUIRE = "KARMMA_DIST_REQUIRE_SLURM"
"""With this environment variable set to 1 a missing cluster is a failure, not a skip."""

_CONFIGURATION = """\
ClusterName=karmma
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MpiDefault=none
MessageTimeout=10
SchedulerParameters=sched_interval=2,batch_sched_delay=1,sched_min_interval=0
FirstJobId={first_job}
"""
# cred_expire is also how long a requeued job waits before it may start again: 120 s unless set.


def missing() -> str | None:
    """Return the reason why no cluster can be started on this machine, or None."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv") if _which(name) is None]
    if programs:
        return f"no {', '.join(programs)}: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts other people's jobs and must run as root"
    return None


def wait_for(condition: Callable[[], bool], what: str, limit_s: float, show: Callable[[], str]) -> None:
    """Return as soon as `condition` holds; fail with `show()` where it does not within `limit_s`."""
    end = time.monotonic() + limit_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {limit_s:.0f} s\n{show()}")
        pause.wait(0.1)


class Cluster:
    """The daemons of a cluster, and the commands of its users."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        others = ("SLURM_", "SBATCH_", "SRUN_")  # variables of a job in which the tests themselves may run
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration, start the daemons and wait until both nodes are idle."""
        ports = _free_ports(1 + len(NODES))
        (self.folder / "state").mkdir()
        text = _CONFIGURATION.format(
            folder=self.folder, controller_port=ports[0], first_job=10_000 + secrets.randbelow(10_000)
        )
        for node, port in zip(NODES, ports[1:], strict=True):
            text += f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=4096\n"
            (self.folder / f"spool.{node}").mkdir()
        text += f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        places = [f"--socket={self.folder}/munge.socket", f"--key-file={key}", f"--pid-file={self.folder}/munged.pid"]
        places += [f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed"]
        # --force: a folder below a world-writable one, such as /tmp, is only warned about.
        self._start("munged", ["munged", "--foreground", "--force", *places])
        self.wait((self.folder / "munge.socket").exists, "munged is up")
        self._start("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.node_states() == ["idle"] * len(NODES), "both nodes are idle")

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, ["slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf")], SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node: its slurmd, its step daemons and its tasks."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        for pid in self._processes(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End every job and every daemon."""
        if "slurmctld" in self._daemons:
            self.command("scancel", "--user=root", check=False)
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for process in self._daemons.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *arguments: str, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        """Run a Slurm command and return what it printed."""
        done = subprocess.run(
            arguments, env={**self.environment, **variables}, cwd=cwd, capture_output=True, text=True, timeout=HANGS_S
        )
        if check and done.returncode:
            raise AssertionError(f"{arguments}: status {done.returncode}: {done.stdout}{done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def sbatch(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Submit a job; return its id."""
        return self.command("sbatch", "--parsable", *arguments, cwd=cwd, **variables)

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        shown = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        """Return the job's state, e.g. RUNNING."""
        return self.job(job)["JobState"]

    def node_states(self) -> list[str]:
        """Return the state of each node in order, e.g. idle; that of a node that does not answer ends in a star."""
        shown = self.command("sinfo", "--noheader", "--Node", "--format=%t", check=False)
        return shown.split()

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = 60.0, log: Path | None = None) -> None:
        """Wait until `condition` holds; fail with all logs where it does not."""
        wait_for(condition, what, limit_s, lambda: self.logs(log))

    def wait_until_ended(self, job: str, log: Path | None = None, limit_s: float = 200.0) -> str:
        """Wait until a job has ended and is not requeued; return its last state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait(lambda: self.state(job) in ended, f"job {job} has ended", limit_s, log)
        return self.state(job)

    def logs(self, log: Path | None = None) -> str:
        """Return the ends of the daemons' logs and of a job's log, and the state of nodes and jobs."""
        paths = [*sorted(self.folder.glob("slurm*.log")), *([log] if log else [])]
        ends = [f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in paths if path.is_file()]
        shown = [self.command(*words, check=False) for words in (("sinfo", "-N"), ("scontrol", "show", "job"))]
        return "\n".join([*ends, *shown])

    def _start(self, name: str, arguments: list[str], **variables: str) -> None:
        program = _which(arguments[0])
        assert program is not None
        with open(self.folder / f"{name}.out.log", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", program, *arguments[1:]],  # no daemon outlives a killed test run
                env={**self.environment, **variables}, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,
            )  # fmt: skip

    def _processes(self, node: str | None = None) -> Iterator[int]:
        """Yield the ids of the processes of jobs and step daemons, on one node or on all."""
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # the process has ended meanwhile
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf".encode() not in variables:
                continue
            if node is None or f"SLURMD_NODENAME={node}".encode() in variables:
                yield int(folder.name)


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(num: int) -> list[int]:
    """Return different TCP ports on which nobody listens."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
