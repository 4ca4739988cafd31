"""Start a run's ranks on this machine with torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

_GRACE_S = 30.0


def local_command(num_ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command that runs `karmma-dist ARGUMENTS` on `num_ranks` ranks, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    return [*torchrun, "--module", "karmma_dist", *arguments]


def launch_local(num_ranks: int, arguments: Sequence[str]) -> int:
    """Run it and return its exit status; Ctrl-C reaches the ranks and is waited for."""
    with subprocess.Popen(local_command(num_ranks, arguments)) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal has sent SIGINT to the whole group already: give torchrun time to end its ranks.
                try:
                    return process.wait(_GRACE_S)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGTERM)
