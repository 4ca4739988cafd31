"""Ranks for tests: a recipe that trains in seconds, processes that run it, and the figures that it leaves.

Ranks are forked from one process that has imported torch and DeepSpeed, since that takes longer than these trainings.
They are processes all the same: each has its own environment, signals and sockets. Only the seed of Python's hashes is
the same in all of them; it differs between the ranks of a launcher, as in `test_exactness.py`, `test_ranks.py`, the
tests of studies and those on Slurm.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from karmma_dist.distributed.world import free_port
from kits.patience import HANGS_S
from kits.recipes import tiny_recipe

RECIPE = tiny_recipe(
    ["video", "flow", "audio"],
    name="student",
    seed=5,
    data={"modality_dropout": {"probability": 0.5}},
    optimizer={"name": "sgd", "lr": 0.1, "clip": 1.0},
    training={"epochs": 3, "batch_size": 6, "log_every_steps": 1},
)
ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.003", "optimizer.weight_decay=0.01")

_IMPORTED_ONCE = [
    "karmma_dist.distributed.preflight.preflight",  # first: it quietens torch, which reads that when it is imported
    "karmma_dist.training.chain", "karmma_dist.evaluation.run", "torch._dynamo", "torch.utils.tensorboard",
]  # fmt: skip


class Rank:
    """A process that runs `karmma-dist ARGUMENTS` in a folder, after a script of Python.

    Args:
        folder: Its working directory.
        arguments: Those of the command.
        world: Variables of its environment.
        script: Python that runs first, for instance to replace a function of the package.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], world: dict[str, str], script: str = "") -> None:
        self._outputs = [Path(tempfile.mkstemp(dir=folder.parent, prefix=f"{name}-")[1]) for name in ("out", "err")]
        environment = {**os.environ, **world}
        self._process = _fork_server().Process(
            target=_run, args=(folder, list(arguments), environment, script, self._outputs), daemon=False
        )
        self._process.start()

    def wait(self) -> int:
        """Wait until the process has ended; return its exit code, negative where a signal killed it."""
        self._process.join(HANGS_S)
        assert self._process.exitcode is not None, f"a rank hangs:\n{self.stderr}"
        return self._process.exitcode

    @property
    def is_running(self) -> bool:
        """True if the process has not ended."""
        return self._process.exitcode is None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the process if it still runs, and wait until it has ended."""
        self._process.kill()
        self._process.join()

    @property
    def stdout(self) -> str:
        """Its standard output so far."""
        return self._outputs[0].read_text()

    @property
    def stderr(self) -> str:
        """Its standard error so far."""
        return self._outputs[1].read_text()


def start_ranks(folder: Path, *commands: Sequence[str], scripts: Sequence[str] = ()) -> list[Rank]:
    """Start one rank per command, all of one world; `scripts` has one for each rank, or none."""
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Rank(folder, arguments, {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, script)
        for rank, (arguments, script) in enumerate(zip(commands, scripts or [""] * len(commands), strict=True))
    ]


def run_ranks(folder: Path, *commands: Sequence[str], scripts: Sequence[str] = ()) -> list[tuple[int, str, str]]:
    """Start ranks as `start_ranks` does and wait for all; return exit code, stdout and stderr of each."""
    ranks = start_ranks(folder, *commands, scripts=scripts)
    try:
        return [(rank.wait(), rank.stdout, rank.stderr) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def start(folder: Path, shards: Path, num_ranks: int, *overrides: str, script: str = "") -> list[Rank]:
    """Start the ranks of a training of `RECIPE`; the script runs first in each of them."""
    arguments = ["train", *command(folder, shards, *overrides)]
    return start_ranks(folder, *[arguments] * num_ranks, scripts=[script] * num_ranks)


def karmma_dist(folder: Path, *arguments: str, num_ranks: int = 1, script: str = "") -> None:
    """Run `karmma-dist ARGUMENTS` on ranks in `folder`, after a script of Python; fail with their output."""
    ended = run_ranks(folder, *[arguments] * num_ranks, scripts=[script] * num_ranks)
    assert [code for code, *_ in ended] == [0] * num_ranks, ended


def command(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """Write `RECIPE` into `folder`; return the arguments of `karmma-dist train` for a run of it in `folder`/runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    places = [f"runs_dir={folder / 'runs'}", f"data.shards={shards}"]
    return ["recipe.yaml", *(f"--set={text}" for text in (*places, *overrides))]


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Return the final weights and the loss of every step."""
    run = folder / "runs" / "student"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / "weights.safetensors"), [line["loss"] for line in lines if line["kind"] == "train"]


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def _run(folder: Path, arguments: list[str], environment: dict[str, str], script: str, outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the rank's own processes start as they do in any program
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["karmma-dist", *arguments]
    exec(script, {"__name__": "__main__"})
    from karmma_dist.cli import main

    sys.exit(main(arguments))
