"""DeepSpeed behind five verbs: forward, backward, step, save, load. The only file that imports it.

Every method must be called by every rank unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karmma_dist.errors import LostRankError
from karmma_dist.recipe import Recipe
from karmma_dist.training.rendezvous import World

_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
"""How gloo and NCCL say that the process at the other end has gone."""

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR at import)
import deepspeed.ops  # noqa: E402


def device_of(world: World) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def process_group(world: World) -> Iterator[None]:
    """Join the ranks of `world` for as long as the block lasts.

    Ranks leave in order: without a barrier one can abort the others at exit, but after an error the others may never
    arrive, so only a clean end waits for them. A process that is alone keeps its group: DeepSpeed remembers the first
    one it saw and cannot use another in the same process.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Without this, DeepSpeed compiles a shared-memory extension at first use; a killed build blocks every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    variables = {
        "RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size,
        "MASTER_ADDR": world.address, "MASTER_PORT": world.port,
    }
    with _environment({name: str(value) for name, value in variables.items()}):
        if torch.cuda.is_available():
            torch.cuda.set_device(world.local_rank)
        if not dist.is_initialized():
            deepspeed.init_distributed(
                dist_backend="nccl" if torch.cuda.is_available() else "gloo",
                auto_mpi_discovery=False, verbose=False, timeout=_COLLECTIVE_TIMEOUT,
            )
        if world.size == 1:
            yield
            return
        try:
            yield
            dist.barrier()
        except RuntimeError as error:
            if any(sign in str(error) for sign in _LOST_PEER):
                raise LostRankError(str(error)) from error
            raise
        finally:
            dist.destroy_process_group()


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


def gather(items: list[Any]) -> list[Any]:
    """The lists of all ranks joined in rank order, on every rank."""
    parts: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Mean of each value over the ranks."""
    names = sorted(values)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(names, (packed / dist.get_world_size()).tolist(), strict=True))


def barrier() -> None:
    """Wait for every rank."""
    dist.barrier()


class Engine:
    """A model, its optimizer and its sharding."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: World) -> None:
        self.device = device_of(world)
        precision = recipe.training.precision
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=_optimizer(model, recipe),
            config=_config(recipe, world, precision),
            dist_init_required=False,
        )

    @property
    def model(self) -> nn.Module:
        """The model itself; under ZeRO-3 its parameters are in pieces: see `whole_state`."""
        module: nn.Module = self._deepspeed.module
        return module

    def forward(self, inputs: dict[str, Tensor], present_BM: Tensor) -> dict[str, Tensor]:
        """Logits per head, in the training precision, which `inputs` must have (`prepare` with `self.dtype`)."""
        logits: dict[str, Tensor] = self._deepspeed(inputs, present_BM)
        return logits

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of one forward pass (divided by the accumulation steps)."""
        self._deepspeed.backward(loss)

    def step(self, lr: float) -> float | None:
        """End one forward pass; at the end of an accumulation, reduce, clip and update.

        Returns:
            The gradient norm before clipping where an update was made, else None.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        updates = bool(self._deepspeed.is_gradient_accumulation_boundary())
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm() if updates else None
        return None if norm is None else float(norm)

    def whole_state(self) -> dict[str, Tensor]:
        """A copy of every parameter and buffer, whole on every rank, also where ZeRO-3 shards them."""
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=None):
            return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write this rank's part of the training state into `folder`, with `state` beside it."""
        ours = {"karmma_dist": state}  # nested: DeepSpeed's own keys would be overwritten by equal ones
        self._deepspeed.save_checkpoint(str(folder), tag="state", client_state=ours, save_latest=False)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote with the same world size and ZeRO stage; returns its `state`."""
        _, client_state = self._deepspeed.load_checkpoint(str(folder), tag="state")
        if client_state is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint")
        state: dict[str, Any] = client_state["karmma_dist"]
        return state


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters, in groups with and without weight decay."""
    settings = recipe.optimizer
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [] if settings.decay_norms else [name for name, p in trained.items() if _is_undecayed(name, p)]
    groups = [
        {"params": [p for name, p in trained.items() if name not in plain], "weight_decay": settings.weight_decay},
        {"params": [trained[name] for name in plain], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases, learnable tokens and position tables."""
    return parameter.ndim < 2 or any(word in name for word in ("token", "position", "pos_embed"))


def _config(recipe: Recipe, world: World, precision: str) -> dict[str, Any]:
    training = recipe.training
    return {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // (world.size * training.accumulation),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
