"""Joins the ranks of a job for as long as a block lasts, and tells each the device it computes on."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from karmma_dist.distributed import heartbeat
from karmma_dist.distributed.collectives import part, store
from karmma_dist.distributed.heartbeat import Presence
from karmma_dist.distributed.world import World
from karmma_dist.errors import Stopped, UserError

_TIMEOUT = datetime.timedelta(minutes=15)
"""Torch's own limit on a collective, which ends a process without a word on who was missing: `Presence` comes first."""


def device_of(world: World) -> torch.device:
    """This rank's GPU, by its number on the node; the CPU where torch sees no GPU.

    Raises:
        UserError: fewer GPUs are visible than this rank needs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_rank >= count:
        raise UserError(
            f"local rank {world.local_rank} needs {world.local_rank + 1} visible GPUs and sees {count}: give each task "
            "all GPUs of its node and start as many tasks as GPUs (no --gpus-per-task, no --gpu-bind)"
        )
    return torch.device("cuda", world.local_rank)


@contextlib.contextmanager
def process_group(
    world: World, collective_timeout_s: float = 60.0, on_loss: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Join the ranks of `world` for as long as the block lasts.

    Ranks leave in order: without a barrier one can abort the others at exit, but after an error the others may never
    arrive, so only a clean end or an agreed stop waits for them. A process that is alone keeps its group: DeepSpeed
    remembers the first one it saw and cannot use another in the same process.

    Args:
        world: this rank.
        collective_timeout_s: see `TrainingRecipe`.
        on_loss: called, in a thread, before a rank is ended that waits for one that is gone.

    Raises:
        Stopped: another rank died, hangs or left because of an error.
    """
    variables = {
        "RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.address, "MASTER_PORT": world.port,
    }
    with _environment({name: str(value) for name, value in variables.items()}):
        if torch.cuda.is_available():
            torch.cuda.set_device(device_of(world))
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
        if world.size == 1:
            yield
            return
        with Presence(store(), world.rank, world.size, collective_timeout_s, on_loss) as present:
            heartbeat.begin(present)
            try:
                yield
                part()
            except BaseException as error:
                _leave(present, error)
                raise
            finally:
                heartbeat.begin(None)
                if present.lost is None:
                    dist.destroy_process_group()


def _leave(present: Presence, error: BaseException) -> None:
    """End this rank's part in good order where the others still are.

    Raises:
        Stopped: instead of `error`, where that is only what a collective says of another rank's end.
    """
    if isinstance(error, Stopped) and present.lost is None:
        part()  # agreed: every rank comes here
        return
    lost = present.explain(error)
    present.leave(str(lost or error) or type(error).__name__)
    if lost is not None:
        raise lost from None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
