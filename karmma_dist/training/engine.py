"""DeepSpeed behind five verbs: forward, backward, step, save, load. The only file that imports it.

Every method must be called by every rank unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from karmma_dist.errors import Stopped
from karmma_dist.recipe import Recipe
from karmma_dist.training import presence
from karmma_dist.training.presence import Presence
from karmma_dist.training.rendezvous import World

_TIMEOUT = datetime.timedelta(minutes=15)
"""Torch's own limit on a collective, which ends a process without a word on who was missing: `Presence` comes first."""

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR at import)
import deepspeed.ops  # noqa: E402


def device_of(world: World) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")


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
                auto_mpi_discovery=False, verbose=False, timeout=_TIMEOUT,
            )
        if world.size == 1:
            yield
            return
        with Presence(store(), world.rank, world.size, collective_timeout_s, on_loss) as present:
            presence.begin(present)
            try:
                yield
                barrier()
            except BaseException as error:
                _leave(present, error)
                raise
            finally:
                presence.begin(None)
                if present.lost is None:
                    dist.destroy_process_group()


def _leave(present: Presence, error: BaseException) -> None:
    """End this rank's part in good order where the others still are.

    Raises:
        Stopped: instead of `error`, where that is only what a collective says of another rank's end.
    """
    if isinstance(error, Stopped) and present.lost is None:
        barrier()  # agreed: every rank comes here
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


def store() -> dist.Store:
    """The job's key-value store, which reaches every rank also while a collective waits."""
    return dist.PrefixStore("karmma_dist", dist.distributed_c10d._get_default_store())


_barriers = itertools.count()


def barrier() -> None:
    """Wait for every rank, for as long as it lives: unlike a collective it may be long about it.

    Raises:
        Stopped: a rank died or left.
    """
    if dist.get_world_size() == 1:
        return
    presence.mark("waiting for the other ranks", presence.START_S)
    name, meeting = f"barrier/{next(_barriers)}", store()
    if meeting.add(name, 1) == dist.get_world_size():
        meeting.set(f"{name}/open", "")
    presence.wait_for(meeting, f"{name}/open")


def highest(number: int) -> int:
    """The highest of the ranks' numbers, on every rank."""
    if dist.get_world_size() == 1:
        return number
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    numbers = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


@dataclass(frozen=True)
class Update:
    """What became of an optimizer step, the same on every rank."""

    norm: float | None
    """Norm of the gradient before clipping; None: no update was due, or none was made."""
    skipped: bool = False
    """The gradient was not finite: parameters and optimizer state are what they were, bit for bit."""


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
        """Accumulate gradients of one forward pass (divided by the accumulation steps).

        A loss that is not finite makes every gradient NaN, also where it would leave some of them finite: the reduced
        gradient then tells every rank of it.
        """
        finite = torch.isfinite(loss.detach())
        self._deepspeed.backward(loss * torch.where(finite, 1.0, torch.nan).to(loss))

    def step(self, lr: float) -> Update:
        """End one forward pass; at the end of an accumulation, reduce, clip and update.

        The update is skipped where the norm of the whole reduced gradient is not finite, which is one number for all
        ranks: they agree before any of them touches its parameters.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()
            return Update(None)
        norm = self._plain_norm() if self._is_plain else None
        if norm is not None and not math.isfinite(norm):
            # Without gradients torch's optimizers do nothing; DeepSpeed, before it calls them, needs some to clip.
            dropping = self._optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
            self._deepspeed.step()
            dropping.remove()
            return Update(None, skipped=True)
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            return Update(None, skipped=True)
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        return Update(None if norm is None else float(norm))

    @property
    def _is_plain(self) -> bool:
        """Whether DeepSpeed calls torch's optimizer itself (stage 0, fp32); its own look at the norm, that one not."""
        return self._deepspeed.optimizer is self._optimizer and isinstance(self._optimizer, torch.optim.Optimizer)

    def _plain_norm(self) -> float:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

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
