"""Starts a run's ranks on this machine, like torchrun on one node, and passes signals and exit codes on.

Every rank gets torchrun's environment variables, its own session, and a file for its final messages. The signals INT,
TERM, USR2 and HUP to the launcher reach every rank once. When a rank fails, the others get a grace period to end by
themselves; then they and their child processes are killed. If the launcher itself is killed, the kernel kills the
ranks.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from karmma_dist.distributed.world import free_port
from karmma_dist.errors import ERROR_FILE, LOST_RANK
from karmma_dist.io.files import scratch_folder
from karmma_dist.processes import dying_with_parent, kill_sessions, signal_name
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names
from karmma_dist.terminal import print_line

_GRACE_S = 15.0
"""Grace period of the ranks after one of them has failed, or after Ctrl-C."""
_POLL_EVERY_S = 1.0
"""Interval at which ranks are polled even without a signal, since another thread of the process may receive the signal
that a rank has ended."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_AWAITED = {signal.SIGCHLD, *_FORWARDED}
_USER_ERROR = 2
"""Exit code of ranks that have said what is wrong with their input."""
_PREEMPTED = 85
"""Exit code of ranks that were preempted and have saved."""


def rank_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that every rank runs: `karmma-dist ARGUMENTS`."""
    return [sys.executable, "-m", "karmma_dist", *arguments]


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank, with a currently free port of this machine."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(num_ranks)]


def check_local(chain: Sequence[Recipe], num_ranks: int) -> None:
    """Check that this number of ranks divides the batch of every unfinished recipe of a chain.

    Raises:
        UserError: a batch does not divide.
    """
    check_batches(chain, num_ranks, finished_names(chain))


def shown_commands(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """Return the ranks' command lines in shell syntax."""
    command = shlex.join(rank_command(arguments))
    return [
        f"{' '.join(f'{name}={value}' for name, value in environment.items())} {command}"
        for environment in rank_environments(num_ranks)
    ]


def launch_local(num_ranks: int, command: Sequence[str], grace_s: float = _GRACE_S) -> int:
    """Run `command` once per rank, wait for all ranks, and print their errors on stderr, each line once.

    Args:
        num_ranks: number of processes.
        command: command of every rank.
        grace_s: seconds from the first failure, or from Ctrl-C, until the ranks are killed.

    Returns:
        0 if all ranks succeeded, 2 if one ended with a user error, 85 if all failures are preemptions, 130 after
        Ctrl-C, 128 + signal if a signal killed the first rank that failed, else that rank's exit code.
    """
    # Blocked before the first rank starts and received one by one below, so that none is lost and none interrupts.
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        with scratch_folder("karmma-dist-launch-") as folder:
            ranks = Ranks(num_ranks, command, folder, unmasked)
            try:
                ranks.wait(grace_s)
            finally:
                ranks.kill()
            for line in ranks.final_messages():
                print_line(line, err=True)
            return ranks.exit_code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)


class Ranks:
    """The rank processes of one job."""

    def __init__(
        self, num_ranks: int, command: Sequence[str], folder: Path, unmasked: set[int | signal.Signals]
    ) -> None:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
        self._files = [folder / str(rank) for rank in range(num_ranks)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ended: dict[int, int] = {}
        """Return codes of the ranks that ended by themselves, in the order in which they ended."""
        self._interrupted = False
        prepare = dying_with_parent(unmasked)
        for file, variables in zip(self._files, rank_environments(num_ranks), strict=True):
            rank_variables = {**variables, "OMP_NUM_THREADS": threads, ERROR_FILE: str(file)}
            try:
                self._processes.append(
                    subprocess.Popen(
                        command, env={**os.environ, **rank_variables}, stdin=subprocess.DEVNULL, start_new_session=True,
                        preexec_fn=prepare,
                    )
                )  # fmt: skip
            except BaseException:
                self.kill()
                raise

    def wait(self, grace_s: float) -> None:
        """Wait for all ranks, passing signals on; return early if ranks outlast the grace period after a failure."""
        deadline = float("inf")
        while len(self.ended) < len(self._processes):
            timeout = min(deadline - time.monotonic(), _POLL_EVERY_S)
            received = signal.sigtimedwait(_AWAITED, timeout) if timeout > 0 else None
            if received is None and time.monotonic() >= deadline:
                return
            if received is not None and received.si_signo in _FORWARDED:
                if received.si_signo == signal.SIGINT and self._interrupted:
                    return
                self._interrupted |= received.si_signo == signal.SIGINT
                self._send(received.si_signo)
            failed_before = self.has_failed
            self._collect()
            if self._interrupted or (self.has_failed and not failed_before):
                deadline = min(deadline, time.monotonic() + grace_s)

    @property
    def has_failed(self) -> bool:
        """True if a rank has ended with an error."""
        return any(self.ended.values())

    def kill(self) -> None:
        """Kill what remains of every rank's session, and wait until the ranks have ended."""
        kill_sessions(self._processes)

    @property
    def exit_code(self) -> int:
        """Exit code of the job as in `launch_local`; only ranks that ended by themselves count."""
        codes = [128 - code if code < 0 else code for code in self.ended.values()]
        failed = [code for code in codes if code]
        if 2 in failed:
            return 2
        if self._interrupted:
            return 130
        return next((code for code in failed if code != _PREEMPTED), failed[0] if failed else 0)

    def final_messages(self) -> list[str]:
        """Return the ranks' final messages, equal lines once, and a line for a rank that failed without a message."""
        ranks_by_line: dict[str, list[int]] = {}
        for rank, file in enumerate(self._files):
            for line in file.read_text("utf-8", "replace").splitlines() if file.exists() else ():
                ranks_by_line.setdefault(line, []).append(rank)
        lost = {line: ranks_by_line.pop(line) for line in list(ranks_by_line) if line.startswith(LOST_RANK)}
        followers = {rank for ranks in lost.values() for rank in ranks}  # these only noticed the loss of another rank
        speakers = {rank for ranks in ranks_by_line.values() for rank in ranks}
        lines = [line if 0 in ranks else f"rank {ranks[0]}: {line}" for line, ranks in ranks_by_line.items()]
        if self._interrupted:
            return lines or ["interrupted: the ranks were killed before they reported anything"]
        silent = {
            rank: code
            for rank, code in self.ended.items()
            if code not in (0, _PREEMPTED) and rank not in followers and (code != _USER_ERROR or rank not in speakers)
        }
        if silent:
            first = next(iter(silent.values()))  # only the first failure matters; the others followed from it
            lines.append(self._silent_end([rank for rank, code in silent.items() if code == first], first))
        return lines or [line.removeprefix(LOST_RANK) for line in lost][:1]

    def _silent_end(self, ranks: Sequence[int], code: int) -> str:
        """Return the line about ranks that ended in the same way without saying why."""
        names = f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, sorted(ranks)))}"
        verb = "was" if len(ranks) == 1 else "were"
        end = f"{verb} killed by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return f"error: {names} {end}" + ("; the others were ended" if len(ranks) < len(self._processes) else "")

    def _send(self, number: int) -> None:
        for rank, process in enumerate(self._processes):
            if rank not in self.ended:
                process.send_signal(number)

    def _collect(self) -> None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                self.ended.setdefault(rank, code)
