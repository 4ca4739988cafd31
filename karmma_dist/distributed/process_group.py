"""The process group that joins the ranks of a job for the duration of a block, and each rank's device."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from karmma_dist.distributed import heartbeat
from karmma_dist.distributed.collectives import leave_job, store
from karmma_dist.distributed.heartbeat import Heartbeat
from karmma_dist.distributed.rendezvous import rendezvous
from karmma_dist.distributed.world import World
from karmma_dist.errors import Stopped, UserError, one_line

_TIMEOUT = datetime.timedelta(minutes=15)
"""PyTorch's limit on a collective: it ends a process without naming the missing rank, so `Heartbeat` acts earlier."""


def device_of(world: World) -> torch.device:
    """Return this rank's GPU, by its local rank; the CPU if torch sees no GPU.

    Raises:
        UserError: torch sees fewer GPUs than this rank needs.
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
    """Join the ranks of `world` for the duration of the block.

    Ranks leave in order: without a barrier, one rank's exit can abort the others. After an error the other ranks may
    never reach the barrier, so only a clean end or an agreed stop waits for them. A single process keeps its group:
    DeepSpeed remembers the first group and cannot use another in the same process.

    Args:
        world: World of this rank.
        collective_timeout_s: See `TrainingRecipe`.
        on_loss: Called in a thread, before a rank that waits for a lost rank is ended.

    Raises:
        UserError: the ranks cannot meet, or cannot connect to each other.
        Stopped: another rank died, hangs or left because of an error.
    """
    variables = {
        "RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.address, "MASTER_PORT": world.port,
    }
    with _environment({name: str(value) for name, value in variables.items()}):
        job_store = store() if dist.is_initialized() else rendezvous(world)
        if world.size == 1:
            _connect(world, job_store)
            yield
            return
        with Heartbeat(job_store, world.rank, world.size, collective_timeout_s, on_loss) as beating:
            heartbeat.set_current(beating)
            try:
                _connect(world, job_store)  # the others hear from the heartbeat of a rank that fails here
                yield
                leave_job()
            except BaseException as error:
                _leave(beating, error)
                raise
            finally:
                heartbeat.set_current(None)
                if beating.lost is None and dist.is_initialized():
                    dist.destroy_process_group()


def _connect(world: World, job_store: dist.Store) -> None:
    """Choose this rank's device and connect to the other ranks, which have met at the store, if that is not done.

    Raises:
        UserError: this rank has no GPU, or there is no connection.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of(world))
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=job_store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    except RuntimeError as error:
        if not heartbeat.is_collective_error(error):
            raise
        raise UserError(
            f"the ranks have met at {world.endpoint}, but {backend} does not connect them: {one_line(error, 300)}: set "
            f"{'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME to the network interface that joins the nodes"
        ) from None


def _leave(beating: Heartbeat, error: BaseException) -> None:
    """Leave the job after an error, and tell the other ranks why.

    Raises:
        Stopped: another rank is lost, and `error` is only a collective's failure that follows from it.
    """
    if isinstance(error, Stopped) and beating.lost is None:
        leave_job()  # an agreed stop: every rank gets here
        return
    lost = beating.explain(error)
    beating.leave(str(lost or error) or type(error).__name__)
    if lost is not None:
        raise lost from None


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the duration of the block."""
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
