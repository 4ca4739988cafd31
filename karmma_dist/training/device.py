"""Which device a rank computes on."""

from __future__ import annotations

import torch

from karmma_dist.errors import UserError
from karmma_dist.training.rendezvous import World


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
