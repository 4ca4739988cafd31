"""Start a run's ranks on this machine: what torchrun does for one node, with signals and exit codes passed on.

Every rank gets torchrun's variables, a session of its own and a file for its last words. INT, TERM, USR2 and HUP to
the launcher reach every rank once. When a rank fails, the others get a moment to end by themselves and are then killed
with all they started; when the launcher itself is killed, the kernel kills the ranks.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from karmma_dist.distributed.world import free_port
from karmma_dist.errors import ERROR_FILE, LOST_RANK
from karmma_dist.processes import dying_with_parent, kill_sessions, signal_name
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import check_batches
from karmma_dist.runs.folder import finished_names
from karmma_dist.terminal import print_line

_GRACE_S = 15.0
"""How long ranks may go on once one of them has failed, or after Ctrl-C."""
_LOOK_EVERY_S = 1.0
"""Ranks are looked at this often whatever signals come: where the process has other threads, one of them may take the
signal of a rank's end."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
_AWAITED = {signal.SIGCHLD, *_FORWARDED}
_PREEMPTED = 85
"""Exit code of ranks that were told to stop and have saved."""


def rank_command(arguments: Sequence[str]) -> list[str]:
    """What every rank runs: `karmma-dist ARGUMENTS`."""
    return [sys.executable, "-m", "karmma_dist", *arguments]


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """The variables of each rank, on a port of this machine that is free now."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(num_ranks)]


def check_local(chain: Sequence[Recipe], num_ranks: int) -> None:
    """Check that so many ranks divide the batch of every recipe of a chain that is left to train.

    Raises:
        UserError: they do not.
    """
    check_batches(chain, num_ranks, finished_names(chain))


def shown_commands(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """The ranks' command lines, as a shell takes them."""
    command = shlex.join(rank_command(arguments))
    return [
        f"{' '.join(f'{name}={value}' for name, value in environment.items())} {command}"
        for environment in rank_environments(num_ranks)
    ]


def launch_local(num_ranks: int, command: Sequence[str], grace_s: float = _GRACE_S) -> int:
    """Run `command` once per rank, wait for all of them, and say on stderr what failed, each line once.

    Args:
        num_ranks: processes.
        command: of every rank.
        grace_s: seconds the ranks have from the first failure, or from Ctrl-C, until they are killed.

    Returns:
        0 when all ranks ended well, 2 when one had an error of the user's, 85 when all ended with it, 128 + signal
        when one was killed, else the exit code of the first that failed.
    """
    # Held back from before the first rank starts and taken one by one below: no signal is lost, none interrupts.
    unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    try:
        with tempfile.TemporaryDirectory(prefix="karmma-dist-launch-") as folder:
            ranks = Ranks(num_ranks, command, Path(folder), unmasked)
            try:
                ranks.wait(grace_s)
            finally:
                ranks.kill()
            for line in ranks.last_words():
                print_line(line, err=True)
            return ranks.exit_code
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)


class Ranks:
    """Processes that are one job."""

    def __init__(
        self, num_ranks: int, command: Sequence[str], folder: Path, unmasked: set[int | signal.Signals]
    ) -> None:
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
        self._files = [folder / str(rank) for rank in range(num_ranks)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ended: dict[int, int] = {}
        """Return codes of the ranks that have ended by themselves, in the order in which they did."""
        self._interrupted = False
        prepare = dying_with_parent(unmasked)
        for file, variables in zip(self._files, rank_environments(num_ranks), strict=True):
            own = {**variables, "OMP_NUM_THREADS": threads, ERROR_FILE: str(file)}
            try:
                self._processes.append(
                    subprocess.Popen(
                        command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, start_new_session=True,
                        preexec_fn=prepare,
                    )
                )  # fmt: skip
            except BaseException:
                self.kill()
                raise

    def wait(self, grace_s: float) -> None:
        """Wait for all ranks, passing signals on; returns early when the others of a failed rank do not end."""
        deadline = float("inf")
        while len(self.ended) < len(self._processes):
            left = min(deadline - time.monotonic(), _LOOK_EVERY_S)
            received = signal.sigtimedwait(_AWAITED, left) if left > 0 else None
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
        """Whether a rank has ended otherwise than well."""
        return any(self.ended.values())

    def kill(self) -> None:
        """End what is left of every rank's session, and wait until the ranks are gone."""
        kill_sessions(self._processes)

    @property
    def exit_code(self) -> int:
        """See `launch_local`; counts only ranks that ended by themselves."""
        codes = [128 - code if code < 0 else code for code in self.ended.values()]
        failed = [code for code in codes if code]
        if 2 in failed:
            return 2
        if self._interrupted:
            return 130
        return next((code for code in failed if code != _PREEMPTED), failed[0] if failed else 0)

    def last_words(self) -> list[str]:
        """What the ranks said before they ended, equal lines once, and who ended without a word."""
        said: dict[str, list[int]] = {}
        for rank, file in enumerate(self._files):
            for line in file.read_text().splitlines() if file.exists() else ():
                said.setdefault(line, []).append(rank)
        lost = {line: said.pop(line) for line in list(said) if line.startswith(LOST_RANK)}
        blind = {rank for ranks in lost.values() for rank in ranks}  # these only saw that another had gone
        lines = [line if 0 in ranks else f"rank {ranks[0]}: {line}" for line, ranks in said.items()]
        if self._interrupted:
            return lines or ["interrupted: the ranks were ended before they said anything"]
        for rank, code in self.ended.items():
            if code < 0:
                lines.append(f"error: rank {rank} was killed by {signal_name(-code)}; the others were ended")
            elif code not in (0, 2, _PREEMPTED) and rank not in blind:
                lines.append(f"error: rank {rank} ended with exit code {code}; the others were ended")
            else:
                continue
            break  # the first to fail; the others followed
        return lines or [line.removeprefix(LOST_RANK) for line in lost][:1]

    def _send(self, number: int) -> None:
        for rank, process in enumerate(self._processes):
            if rank not in self.ended:
                process.send_signal(number)

    def _collect(self) -> None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None:
                self.ended.setdefault(rank, code)
