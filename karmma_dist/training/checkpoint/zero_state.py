"""Where each parameter's float32 weight and optimizer state lie on this rank, whatever DeepSpeed made of them.

    stage 0, fp32         the parameter itself and torch's optimizer; the same on every rank
    stage 0, bf16, fp16   one float32 copy per parameter; the same on every rank
    stage 1, 2            one flat tensor per group of parameters, of which this rank holds a part
    stage 3               flat tensors of this rank's part of every parameter

A checkpoint is made of such pieces by parameter name and element, so any number of ranks at any stage reads what any
other wrote, without a conversion in between: each takes the elements it holds out of the pieces there are.

    weight     float32
    step       how many updates the optimizer has made to it; one number
    others     what the optimizer keeps of the weight's size: AdamW `exp_avg`, `exp_avg_sq`
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
class Piece:
    """Elements [start, start + numel) of a flattened parameter are elements [offset, offset + numel) of `flat`."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece's elements of `tensor`, which has the size of `flat`: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


class Pieces:
    """This rank's pieces of a model in training.

    Args:
        module: the model, as DeepSpeed left it.
        optimizer: what DeepSpeed made of the optimizer.
        torch_optimizer: torch's optimizer within it.
        rank: this rank.
        num_ranks: all of them.
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
        of_id = {id(parameter): name for name, parameter in self._trained.items()}
        self._is_replicated = False
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self._pieces = list(_of_stage_3(optimizer, self._trained, rank))
            self._flats = list(optimizer.fp32_partitioned_groups_flat)
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self._pieces = list(_of_stages_1_and_2(optimizer, of_id))
            self._flats = list(optimizer.single_partition_of_fp32_groups)
        else:
            self._is_replicated = True
            self._pieces = list(_of_stage_0(optimizer, self._trained, of_id))
            self._flats = [piece.flat for piece in self._pieces]

    def snapshot(self) -> dict[str, Tensor]:
        """Copies, in host memory, of what this rank has to save; later steps do not change them.

        Together the ranks' snapshots hold every element once.
        """
        copies: dict[str, Tensor] = {}
        for piece in self._own():
            state = self._state.get(piece.flat, {})
            tensors = {"weight": piece.flat} | {kind: v for kind, v in state.items() if _is_like(v, piece.flat)}
            for kind, tensor in tensors.items():
                copies[_key(kind, piece.start, piece.name)] = _host_copy(piece.of(tensor))
            if "step" in state:
                copies[_key("step", piece.start, piece.name)] = torch.tensor([float(state["step"])])
        if self._rank == 0:
            for name, buffer in self._buffers.items():
                copies[_key("buffer", 0, name)] = _host_copy(buffer.detach())
        return copies

    def scalars(self) -> dict[str, float]:
        """What is one number for the whole model: the state of a loss scale that moves (fp16)."""
        values = {name: getattr(self._scaler, name, None) for name in _SCALER_FIELDS}
        return {name: value for name, value in values.items() if value is not None}

    def restore(self, saved: SavedPieces, scalars: Mapping[str, float]) -> None:
        """Take weights, optimizer state and buffers from a checkpoint, in place.

        Raises:
            UserError: it is of another model or another optimizer.
        """
        saved.check(self._trained, self._buffers)
        for flat in self._flats:
            self._restore_state(flat, [piece for piece in self._pieces if piece.flat is flat], saved)
        for name, parameter in self._trained.items():
            _restore_parameter(parameter, saved.read("weight", name, 0, _numel(parameter)), self._rank)
        for name, buffer in self._buffers.items():
            buffer.data.copy_(saved.buffer(name))
        for field, value in scalars.items():
            if hasattr(self._scaler, field):
                setattr(self._scaler, field, value)

    def _own(self) -> Iterator[Piece]:
        """What this rank saves: all it holds, or its share where every rank holds everything."""
        loads = [0] * self._num_ranks
        for piece in self._pieces:
            owner = loads.index(min(loads)) if self._is_replicated else self._rank
            loads[owner] += piece.numel
            if owner == self._rank:
                yield piece

    def _restore_state(self, flat: Tensor, pieces: Sequence[Piece], saved: SavedPieces) -> None:
        steps = [step for piece in pieces if (step := saved.step(piece.name)) is not None]
        kinds = saved.kinds if steps or not pieces else []
        state: dict[str, Any] = {kind: torch.zeros_like(flat, requires_grad=False) for kind in kinds}
        for piece in pieces:
            piece.of(flat).copy_(saved.read("weight", piece.name, piece.start, piece.numel))
            for kind in kinds:
                if saved.step(piece.name) is not None:
                    piece.of(state[kind]).copy_(saved.read(kind, piece.name, piece.start, piece.numel))
        self._state.pop(flat, None)  # type: ignore[attr-defined]
        if saved.last_step is not None and (steps or not pieces):
            state["step"] = torch.tensor(max(steps, default=saved.last_step))
        if state:
            self._state[flat] = state  # type: ignore[index]


class SavedPieces:
    """The pieces in a checkpoint's files, by kind, parameter and element; a context manager.

    Raises:
        UserError: a file is no safetensors file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._stack = list(files), ExitStack()
        self._index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in self._files:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: not a part of a checkpoint: {error}") from None
            for key in file.keys():  # noqa: SIM118 (no mapping)
                kind, start, name = key.split(":", 2)
                numel = torch.Size(file.get_slice(key).get_shape()).numel()
                self._index.setdefault((kind, name), []).append((int(start), numel, file, key))
        self._steps = {name: self._number(name) for kind, name in self._index if kind == "step"}
        self.last_step = max(self._steps.values(), default=None)
        self.kinds = sorted({kind for kind, _ in self._index} - {"weight", "step", "buffer"})

    def __enter__(self) -> SavedPieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._index = {}

    def check(self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Raise `UserError` where the names or sizes are not those of these parameters and buffers."""
        for kind, expected in (("weight", parameters), ("buffer", buffers)):
            found = {name: sum(n for _, n, _, _ in parts) for (k, name), parts in self._index.items() if k == kind}
            sizes = {name: _numel(tensor) for name, tensor in expected.items()}
            wrong = sorted(name for name in found.keys() | sizes.keys() if found.get(name) != sizes.get(name))
            if wrong:
                shown = ", ".join(f"{name} ({found.get(name, 0)} -> {sizes.get(name, 0)})" for name in wrong[:_SHOWN])
                raise UserError(
                    f"{self._files[0].parent}: saved of another model: {len(wrong)} trained parameters or buffers "
                    f"differ in size, e.g. {shown}: resume with the recipe beside it, or start over with --resume never"
                )

    def step(self, name: str) -> float | None:
        """How many updates a parameter had; None: none, or by an optimizer that does not count."""
        return self._steps.get(name)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one kind of a parameter.

        Raises:
            UserError: the checkpoint does not hold all of them.
        """
        whole, filled = torch.empty(numel, dtype=torch.float32), 0
        for at, held, file, key in self._index.get((kind, name), []):
            first, end = max(start, at), min(start + numel, at + held)
            if first < end:
                whole[first - start : end - start] = file.get_slice(key)[first - at : end - at]
                filled += end - first
        if filled != numel:
            raise UserError(
                f"{self._files[0].parent}: {kind} of {name}: {filled} of {numel} elements are there: "
                "saved by another optimizer, or by another version: start over with --resume never"
            )
        return whole

    def buffer(self, name: str) -> Tensor:
        """A buffer, whole."""
        ((_, _, file, key),) = self._index[("buffer", name)]
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def _number(self, name: str) -> float:
        _, _, file, key = self._index[("step", name)][0]
        return float(file.get_tensor(key))


def _key(kind: str, start: int, name: str) -> str:
    return f"{kind}:{start}:{name}"


def _numel(parameter: Tensor) -> int:
    """Elements of the whole parameter, also where ZeRO-3 left none of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape == flat.shape


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _of_stage_0(optimizer: Any, trained: Mapping[str, Tensor], of_id: Mapping[int, str]) -> Iterator[Piece]:
    if hasattr(optimizer, "fp32_groups"):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                yield Piece(of_id[id(low)], 0, high.numel(), high, 0)
    else:
        assert isinstance(optimizer, torch.optim.Optimizer), type(optimizer)
        for name, parameter in trained.items():
            yield Piece(name, 0, parameter.numel(), parameter, 0)


def _of_stages_1_and_2(optimizer: Any, of_id: Mapping[int, str]) -> Iterator[Piece]:
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(of_id[id(parameter)], low.start, low.numel, flat, high.start)


def _of_stage_3(optimizer: Any, trained: Mapping[str, Any], rank: int) -> Iterator[Piece]:
    for name, parameter in trained.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * numel  # parameters are cut in equal parts, the last ones padded or empty
        held = min(numel, parameter.ds_numel - start)
        if held > 0:
            yield Piece(name, start, held, optimizer.fp32_partitioned_groups_flat[group], offset)


def _restore_parameter(parameter: Any, weight: Tensor, rank: int) -> None:
    """Set what forward passes see, which may be of lower precision than `weight`, flat and whole."""
    if hasattr(parameter, "ds_tensor"):
        part = parameter.ds_tensor.data.view(-1)
        mine = weight[rank * part.numel() : (rank + 1) * part.numel()]
        part[: mine.numel()].copy_(mine)
        if parameter.data.numel() != weight.numel():
            return  # not gathered now
    parameter.data.copy_(weight.view(parameter.shape))
