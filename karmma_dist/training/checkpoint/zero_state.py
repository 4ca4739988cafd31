"""Location of each parameter's float32 weight and optimizer state on this rank, for every DeepSpeed layout.

    stage 0, fp32         the parameter itself and torch's optimizer; equal on every rank
    stage 0, bf16, fp16   one float32 copy per parameter; equal on every rank
    stage 1, 2            one flat tensor per parameter group, of which this rank holds a part
    stage 3               flat tensors that hold this rank's part of every parameter

A checkpoint stores these shards by parameter name and first element. Any number of ranks at any stage can therefore
read a checkpoint of any other layout without conversion: each rank reads the elements that it holds.

    weight     float32
    step       the number of optimizer updates of the parameter; one number
    others     optimizer state of the weight's size: AdamW `exp_avg`, `exp_avg_sq`
    buffer     a module's persistent buffers, in their own dtype and shape
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from karmma_dist.errors import UserError

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_SHOWN = 3


@dataclass(frozen=True)
class StateShard:
    """A range of a flattened parameter: its elements [start, start + numel) are `flat`'s [offset, offset + numel)."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view_of(self, tensor: Tensor) -> Tensor:
        """Return a view of this shard's elements of `tensor`, which has the size of `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class StateShards:
    """This rank's shards of a model in training.

    Args:
        module: the model, as prepared by DeepSpeed.
        optimizer: DeepSpeed's wrapper of the optimizer.
        torch_optimizer: the wrapped torch optimizer.
        rank: this rank.
        num_ranks: the world size.
    """

    def __init__(
        self, module: nn.Module, optimizer: Any, torch_optimizer: torch.optim.Optimizer, rank: int, num_ranks: int
    ) -> None:
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        names, state = dict(module.named_parameters()), module.state_dict(keep_vars=True)
        self._buffers = {name: tensor for name, tensor in state.items() if name not in names}
        self._state: Mapping[Tensor, dict[str, Any]] = torch_optimizer.state
        self._rank, self._num_ranks = rank, num_ranks
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
        self._scaler = scaler if is_dynamic else None
        name_of_id = {id(parameter): name for name, parameter in self._trained.items()}
        self._is_replicated = False
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self._shards = list(_shards_of_stage_3(optimizer, self._trained, rank))
            self._flats = list(optimizer.fp32_partitioned_groups_flat)
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self._shards = list(_shards_of_stages_1_and_2(optimizer, name_of_id))
            self._flats = list(optimizer.single_partition_of_fp32_groups)
        else:
            self._is_replicated = True
            self._shards = list(_shards_of_stage_0(optimizer, self._trained, name_of_id))
            self._flats = [shard.flat for shard in self._shards]

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies in host memory of what this rank saves; later steps do not change them.

        Together, the snapshots of all ranks hold every element exactly once.
        """
        copies: dict[str, Tensor] = {}
        for shard in self._saved_here():
            state = self._state.get(shard.flat, {})
            tensors = {"weight": shard.flat} | {kind: v for kind, v in state.items() if _is_like(v, shard.flat)}
            for kind, tensor in tensors.items():
                copies[_key(kind, shard.start, shard.name)] = _host_copy(shard.view_of(tensor))
            if "step" in state:
                copies[_key("step", shard.start, shard.name)] = torch.tensor([float(state["step"])])
        if self._rank == 0:
            for name, buffer in self._buffers.items():
                copies[_key("buffer", 0, name)] = _host_copy(buffer.detach())
        return copies

    def scalars(self) -> dict[str, float]:
        """Return the state that is one number for the whole model: that of a dynamic loss scale (fp16)."""
        values = {name: getattr(self._scaler, name, None) for name in _SCALER_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def restore(self, saved: SavedState, scalars: Mapping[str, float]) -> None:
        """Load weights, optimizer state and buffers from a checkpoint, in place.

        Raises:
            UserError: the checkpoint is of another model or another optimizer.
        """
        saved.check(self._trained, self._buffers)
        for flat in self._flats:
            self._restore_state(flat, [shard for shard in self._shards if shard.flat is flat], saved)
        for name, parameter in self._trained.items():
            _restore_parameter(parameter, saved.read("weight", name, 0, _numel(parameter)), self._rank)
        for name, buffer in self._buffers.items():
            buffer.data.copy_(saved.buffer(name))
        for field, value in scalars.items():
            if hasattr(self._scaler, field):
                setattr(self._scaler, field, value)

    def _saved_here(self) -> Iterator[StateShard]:
        """Yield what this rank saves: all its shards, or a share of them if every rank holds everything."""
        loads = [0] * self._num_ranks
        for shard in self._shards:
            owner = loads.index(min(loads)) if self._is_replicated else self._rank
            loads[owner] += shard.numel
            if owner == self._rank:
                yield shard

    def _restore_state(self, flat: Tensor, shards: Sequence[StateShard], saved: SavedState) -> None:
        steps = [step for shard in shards if (step := saved.step(shard.name)) is not None]
        kinds = saved.kinds if steps or not shards else []
        state: dict[str, Any] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
        for shard in shards:
            shard.view_of(flat).copy_(saved.read("weight", shard.name, shard.start, shard.numel))
            for kind in kinds:
                if saved.step(shard.name) is not None:
                    shard.view_of(state[kind]).copy_(saved.read(kind, shard.name, shard.start, shard.numel))
        self._state.pop(flat, None)  # type: ignore[attr-defined]
        if saved.last_step is not None and (steps or not shards):
            state["step"] = torch.tensor(max(steps, default=saved.last_step))
        if state:
            self._state[flat] = state  # type: ignore[index]


class SavedState:
    """The shards in a checkpoint's files, by kind, parameter and first element; a context manager.

    Raises:
        UserError: a file is not a safetensors file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._stack = list(files), ExitStack()
        self._index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in self._files:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a part of a checkpoint: {error}") from None
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                kind, start, name = key.split(":", 2)
                numel = torch.Size(file.get_slice(key).get_shape()).numel()
                self._index.setdefault((kind, name), []).append((int(start), numel, file, key))
        self._steps = {name: self._number(name) for kind, name in self._index if kind == "step"}
        self.last_step = max(self._steps.values(), default=None)
        self.kinds = sorted({kind for kind, _ in self._index} - {"weight", "step", "buffer"})

    def __enter__(self) -> SavedState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._index = {}

    def check(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Raise `UserError` unless names and sizes match these parameters and buffers."""
        for kind, expected in (("weight", parameters), ("buffer", buffers)):
            saved = {name: sum(n for _, n, _, _ in parts) for (k, name), parts in self._index.items() if k == kind}
            sizes = {name: _numel(tensor) for name, tensor in expected.items()}
            wrong = sorted(name for name in saved.keys() | sizes.keys() if saved.get(name) != sizes.get(name))
            if wrong:
                shown = ", ".join(f"{name} ({saved.get(name, 0)} -> {sizes.get(name, 0)})" for name in wrong[:_SHOWN])
                raise UserError(
                    f"{self._files[0].parent}: saved from another model: {len(wrong)} trained parameters or buffers "
                    f"differ in size, e.g. {shown}: resume with the recipe in that folder, "
                    "or start over with --resume never"
                )

    def step(self, name: str) -> float | None:
        """Return the number of updates of a parameter; None if it had none or its optimizer does not count them."""
        return self._steps.get(name)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of one kind of a parameter's state, as float32.

        Raises:
            UserError: the checkpoint does not hold all these elements.
        """
        elements, filled = torch.empty(numel, dtype=torch.float32), 0
        for shard_start, held, file, key in self._index.get((kind, name), []):
            first, end = max(start, shard_start), min(start + numel, shard_start + held)
            if first < end:
                elements[first - start : end - start] = file.get_slice(key)[first - shard_start : end - shard_start]
                filled += end - first
        if filled != numel:
            raise UserError(
                f"{self._files[0].parent}: {kind} of {name}: {filled} of {numel} elements found: "
                "it was saved by another optimizer or another version: start over with --resume never"
            )
        return elements

    def buffer(self, name: str) -> Tensor:
        """Return a buffer."""
        ((_, _, file, key),) = self._index[("buffer", name)]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def _number(self, name: str) -> float:
        _, _, file, key = self._index[("step", name)][0]
        return float(file.get_tensor(key))


def is_buffer(key: str) -> bool:
    """Return True if a tensor of a snapshot is a module's buffer."""
    return key.startswith("buffer:")


def _key(kind: str, start: int, name: str) -> str:
    return f"{kind}:{start}:{name}"


def _numel(parameter: Tensor) -> int:
    """Return the number of elements of the full parameter, even if ZeRO-3 left none of it on this rank."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == flat.shape


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _shards_of_stage_0(
    optimizer: Any, trained: Mapping[str, Tensor], name_of_id: Mapping[int, str]
) -> Iterator[StateShard]:
    if hasattr(optimizer, "fp32_groups"):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                yield StateShard(name_of_id[id(low)], 0, high.numel(), high, 0)
    else:
        assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
        for name, parameter in trained.items():
            yield StateShard(name, 0, parameter.numel(), parameter, 0)


def _shards_of_stages_1_and_2(optimizer: Any, name_of_id: Mapping[int, str]) -> Iterator[StateShard]:
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield StateShard(name_of_id[id(parameter)], low.start, low.numel, flat, high.start)


def _shards_of_stage_3(optimizer: Any, trained: Mapping[str, Any], rank: int) -> Iterator[StateShard]:
    for name, parameter in trained.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * numel  # each parameter is cut into equal parts, the last ones padded or empty
        held = min(numel, parameter.ds_numel - start)
        if held > 0:
            yield StateShard(name, start, held, optimizer.fp32_partitioned_groups_flat[group], offset)


def _restore_parameter(parameter: Any, weight: Tensor, rank: int) -> None:
    """Copy `weight`, the full flat parameter, into what forward passes use, which may have a lower precision."""
    if hasattr(parameter, "ds_tensor"):
        part = parameter.ds_tensor.data.view(-1)
        local = weight[rank * part.numel() : (rank + 1) * part.numel()]
        part[: local.numel()].copy_(local)
        if parameter.data.numel() != weight.numel():
            return  # the parameter is not gathered at the moment
    parameter.data.copy_(weight.view(parameter.shape))
