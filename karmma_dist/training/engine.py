"""DeepSpeed behind five methods: forward, backward, step, snapshot, restore. No other file imports DeepSpeed.

DeepSpeed's own checkpoints are not used. They load only on the same number of ranks at the same stage, or after a
conversion (for stages 1 to 3, with all ranks waiting), they are not atomic, and stage 1 omits frozen parameters. See
`zero_state`.

Every rank must call every method, unless its docstring says otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from karmma_dist.distributed.process_group import device_of
from karmma_dist.distributed.world import World
from karmma_dist.errors import UserError
from karmma_dist.models.karmma import KarmmaModel, KnownTokens
from karmma_dist.recipe import Recipe
from karmma_dist.recipe.micro_batches import divide_batch
from karmma_dist.training.checkpoint.zero_state import SavedState, StateShards
from karmma_dist.training.optim import build_optimizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DS_LOG_LEVEL", "error")

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR at import)
import deepspeed.ops  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# Otherwise DeepSpeed compiles a shared-memory extension at first use; a killed build blocks every later run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# DeepSpeed imports the optimizer Muon, which no recipe uses; Muon calls torch.compile at import, and every rank would
# spend a second on loading Inductor.
_former = os.environ.get("TORCHDYNAMO_DISABLE")
os.environ["TORCHDYNAMO_DISABLE"] = "1"
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.original_muon
del os.environ["TORCHDYNAMO_DISABLE"]
if _former is not None:
    os.environ["TORCHDYNAMO_DISABLE"] = _former

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step, equal on every rank."""

    norm: float | None
    """Norm of the gradient before clipping; None: no update was due, or the update was skipped."""
    skipped: bool = False
    """True if the gradient was not finite; parameters and optimizer state are then unchanged, bit for bit."""


class Engine:
    """A model in training with its optimizer, sharded by DeepSpeed."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: World) -> None:
        self.device = device_of(world)
        precision = _precision(recipe)
        self.dtype = _DTYPES[precision]
        self._optimizer_name = recipe.optimizer.name
        self._frozen_crc32 = _crc32_of_frozen(model)
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model.to(device=self.device, dtype=self.dtype),  # buffers too: DeepSpeed casts only parameters
            optimizer=build_optimizer(model, recipe),
            config=_config(recipe, world, precision),
            dist_init_required=False,
        )
        self._shards = StateShards(
            self.model, self._optimizer, self._deepspeed.basic_optimizer, world.rank, world.size
        )

    @property
    def model(self) -> nn.Module:
        """The model itself; under ZeRO-3 its parameters are sharded: see `full_state`."""
        module: nn.Module = self._deepspeed.module
        return module

    def forward(
        self, inputs: dict[str, Tensor], present_BM: Tensor, known: Mapping[str, KnownTokens] | None = None
    ) -> dict[str, Tensor]:
        """Return logits per head in the training precision, which `inputs` must have (`prepare` with `self.dtype`).

        Args:
            inputs: See `KarmmaModel.encode`.
            present_BM: See `KarmmaModel.encode`.
            known: Known tokens of frozen encoders; see `KarmmaModel.encode`.
        """
        logits: dict[str, Tensor] = self._deepspeed(inputs, present_BM, **({"known": known} if known else {}))
        return logits

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one forward pass, divided by the number of accumulation steps.

        A loss that is not finite makes every gradient NaN, even those that would be finite, so that every rank detects
        it from the reduced gradient.
        """
        finite = torch.isfinite(loss.detach())
        self._deepspeed.backward(loss * torch.where(finite, 1.0, torch.nan).to(loss))

    def step(self, lr: float) -> Update:
        """Finish one forward pass; after the last one of an accumulation, reduce and clip the gradient and update.

        The update is skipped if the norm of the full reduced gradient is not finite. This norm is equal on all ranks,
        so they agree before any rank changes its parameters.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()
            return Update(None)
        norm = self._plain_norm() if self._is_plain else None
        if norm is not None and not math.isfinite(norm):
            # torch's optimizers do nothing without gradients, but DeepSpeed needs gradients to clip before the call.
            hook = self._optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad())
            self._deepspeed.step()
            hook.remove()
            return Update(None, skipped=True)
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            return Update(None, skipped=True)
        norm = self._deepspeed.get_global_grad_norm() if norm is None else norm
        return Update(None if norm is None else float(norm))

    @property
    def _is_plain(self) -> bool:
        """True if DeepSpeed calls torch's optimizer directly (stage 0, fp32), and so does not check the norm itself."""
        return self._deepspeed.optimizer is self._optimizer and isinstance(self._optimizer, torch.optim.Optimizer)

    def _plain_norm(self) -> float:
        grads = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def full_state(self) -> dict[str, Tensor]:
        """Return copies of all full parameters and buffers on every rank, also under ZeRO-3."""
        with deepspeed.zero.GatheredParameters(list(self.model.parameters()), modifier_rank=None):
            return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return this rank's part of the training state, copied to host memory, and the state common to all ranks.

        Not collective. Call it only between optimizer steps, when no gradient is pending.
        """
        common = {"optimizer": self._optimizer_name, "frozen_crc32": self._frozen_crc32}
        return self._shards.snapshot(), {**common, "scalars": self._shards.scalars()}

    def restore(self, saved: SavedState, common: dict[str, Any]) -> None:
        """Load the state of snapshots made by any number of ranks at any ZeRO stage. Not collective.

        Raises:
            UserError: the snapshots are of another model or optimizer, or frozen parameters, which are not saved but
                built from the recipe and its weights files, have changed since.
        """
        if common["optimizer"] != self._optimizer_name:
            raise UserError(
                f"the checkpoint was saved with optimizer.name={common['optimizer']}, this run has "
                f"{self._optimizer_name}: set it back, or start over with --resume never"
            )
        if common["frozen_crc32"] != self._frozen_crc32:
            raise UserError(
                "the frozen parameters differ from those of the checkpoint: a weights file that the recipe names "
                "(model.encoders.*.weights) has changed: restore it, or start over with --resume never"
            )
        self._shards.restore(saved, common["scalars"])


def full_model(engine: Engine, recipe: Recipe, classes: dict[str, list[str]]) -> KarmmaModel:
    """Return the model in training, or under ZeRO-3 a copy with all parameters. Every rank must call this.

    Under ZeRO-3 the model's forward hooks gather parameters layer by layer, which requires every rank to make the same
    calls. In validation, a rank whose last batch is all padding makes no call.
    """
    model = engine.model
    if recipe.training.zero_stage == 3:
        heads = {head: len(names) for head, names in classes.items()}
        model = KarmmaModel(recipe.model, recipe.inputs, recipe.modalities, heads)
        model.to(device=engine.device, dtype=engine.dtype).load_state_dict(engine.full_state())
    assert isinstance(model, KarmmaModel)
    return model


def _crc32_of_frozen(model: nn.Module) -> int:
    crc = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            crc = zlib.crc32(name.encode(), crc)
            crc = zlib.crc32(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc


class ShardedModule:
    """A frozen module whose parameters are sharded over the ranks: ZeRO-3 without an optimizer.

    Ranks gather a layer's parameters when they run the layer, so all ranks must run the same layers in every call.

    Args:
        module: in CPU memory and of one dtype; it is sharded parameter by parameter, so no device ever holds all of it.
        recipe: the run's recipe, for its precision.
        world: this rank.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, world: World) -> None:
        device, precision = device_of(world), _precision(recipe)
        config = {
            "train_batch_size": world.size,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": precision == "bf16"},
            "fp16": {"enabled": precision == "fp16"},
            "steps_per_print": 2**31,
        }
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=_DTYPES[precision])
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        self._deepspeed, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        self._deepspeed.eval()

    @property
    def module(self) -> nn.Module:
        """The module itself, with sharded parameters."""
        module: nn.Module = self._deepspeed.module
        return module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the module's forward pass."""
        return self._deepspeed(*arguments, **named)


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Return the type in which a recipe's model computes on this machine."""
    return _DTYPES[_precision(recipe)]


def _precision(recipe: Recipe) -> str:
    """Return fp32, bf16 or fp16."""
    precision = recipe.training.precision
    if precision == "auto":
        return "bf16" if torch.cuda.is_available() else "fp32"
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("training.precision fp16: this device does not support it: use bf16 or fp32")
    return precision


def _zero(recipe: Recipe, world: World) -> dict[str, Any]:
    """Return DeepSpeed's ZeRO settings: the stage, and what is offloaded to CPU memory (nothing if run on a CPU)."""
    zero: dict[str, Any] = {"stage": recipe.training.zero_stage}
    offload = recipe.training.offload
    if offload != "none" and not torch.cuda.is_available():
        if world.is_main:
            _logger.warning("training.offload %s has no effect: everything is in CPU memory already", offload)
        return zero
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero


def _config(recipe: Recipe, world: World, precision: str) -> dict[str, Any]:
    division = divide_batch(recipe, world.size)
    return {
        "train_batch_size": recipe.training.batch_size,
        "train_micro_batch_size_per_gpu": division.micro_batch_size,
        "gradient_accumulation_steps": division.accumulation,
        "gradient_clipping": recipe.optimizer.clip,
        "zero_optimization": _zero(recipe, world),
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed would compile it at first use
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
