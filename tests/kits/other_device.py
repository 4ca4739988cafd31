"""Tensors that claim to be on another device but are on the CPU: operations that fail on a GPU fail here too.

    with OtherDevice():
        model.to(DEVICE)(x.to(DEVICE))      # the CPU's values
        model.to(DEVICE)(x)                 # RuntimeError, as on a GPU

The device is called meta, torch's only one besides the CPU that is on every machine. An operation on tensors of both
devices is refused, but for what CUDA takes: numbers (0-d tensors), copies, and masks or indices on the CPU.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

_COPIES = ("copy_", "_to_copy", "_local_scalar_dense")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class _There(torch.Tensor):
    """A tensor on the other device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _There:
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _carry_out(operation, arguments, named or {})


def _carry_out(operation: Any, arguments: Any, named: dict[str, Any]) -> Any:
    name = operation.overloadpacket.__name__
    tensors = [of for of in tree_leaves((arguments, named)) if isinstance(of, Tensor)]
    there = [of for of in tensors if isinstance(of, _There)]
    if there and name not in _COPIES:
        _refuse_mixtures(name, arguments, tensors)
    if name == "copy_":
        result_there = isinstance(arguments[0], _There)
    elif named.get("device") is not None:
        result_there = torch.device(named["device"]) == DEVICE
        named = {**named, "device": torch.device("cpu")}
    else:
        result_there = bool(there)
    result = operation(*tree_map(_values, arguments), **tree_map(_values, named))
    if name.endswith("_") and not name.endswith("__") and isinstance(arguments[0], _There):
        return arguments[0]
    return tree_map(lambda of: _There(of) if isinstance(of, Tensor) else of, result) if result_there else result


def _refuse_mixtures(name: str, arguments: Any, tensors: list[Tensor]) -> None:
    here = [of for of in tensors if not isinstance(of, _There) and of.dim()]
    if name in _INDEXING and isinstance(arguments[0], _There):
        here = [of for of in here if of is arguments[0] or any(of is value for value in arguments[2:3])]
    if here:
        raise RuntimeError(f"{name}: tensors on both devices; on the CPU: {[tuple(of.shape) for of in here]}")


def _values(of: Any) -> Any:
    return of.values if isinstance(of, _There) else of


class OtherDevice(TorchDispatchMode):
    """Provide the other device inside the block."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _carry_out(operation, arguments, named or {})

    def __enter__(self) -> Any:
        self._stack = ExitStack()
        new_tensor, tensor = torch.Tensor.new_tensor, torch.tensor

        def new_tensor_there(like: Tensor, data: Any, **options: Any) -> Tensor:
            if not isinstance(like, _There):
                return new_tensor(like, data, **options)
            return tensor(data, dtype=options.get("dtype", like.dtype)).to(DEVICE)

        def tensor_there(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            made = tensor(data, **options)
            return made if device is None else made.to(device)

        # Both are made in C++, out of reach of a dispatch mode; and a module keeps what `to` makes only if told to.
        self._stack.enter_context(mock.patch.object(torch.Tensor, "new_tensor", new_tensor_there))
        self._stack.enter_context(mock.patch.object(torch, "tensor", tensor_there))
        before = torch.__future__.get_swap_module_params_on_conversion()
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._stack.close()
