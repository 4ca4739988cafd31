"""Peak memory of a computation, counted from the tensors that PyTorch's eager operators make.

It works on the meta device, where tensors have sizes but no bytes, and on any other. What an operator allocates and
frees before it returns (a convolution's workspace) is not seen, nor is what a caching allocator keeps in reserve.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karmma_dist.models.karmma import KarmmaModel
from karmma_dist.training.losses import cross_entropy


def inference_peak(model: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor) -> int:
    """Peak bytes of inputs and activations of a forward pass without gradients; the model keeps its mode."""
    device = next(iter(inputs.values())).device
    with torch.no_grad(), FusedAttention(), PeakMemory(device) as memory:
        _outside(memory, model, inputs)
        model(inputs, present_BM)
    return memory.peak_bytes


def training_peak(model: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor) -> int:
    """Peak bytes of inputs, activations and gradients of a forward and a backward pass on labels.

    The model is left in training mode, without gradients.
    """
    device = next(iter(inputs.values())).device
    model.train()
    with FusedAttention(), PeakMemory(device) as memory:
        _outside(memory, model, inputs)
        logits = model(inputs, present_BM)
        labels = {head: torch.zeros(len(logit), dtype=torch.int64, device=device) for head, logit in logits.items()}
        cross_entropy(logits, labels).backward()
    model.zero_grad()
    return memory.peak_bytes


def _outside(memory: PeakMemory, model: KarmmaModel, inputs: dict[str, Tensor]) -> None:
    memory.ignore([*model.parameters(), *model.buffers()])
    memory.hold(inputs.values())


class PeakMemory(TorchDispatchMode):
    """Context in which the bytes of live tensors are followed.

    A storage counts once, however many views it has, from the operator that makes it until nothing refers to it.

    Args:
        device: Only tensors on this type of device count.
    """

    live_bytes: int
    """Bytes of the tensors that live now."""
    peak_bytes: int
    """Most bytes that ever lived at once."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._device = torch.device(device).type
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside the context, such as inputs."""
        for tensor in tensors:
            self._note(tensor, counted=True)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, nor views of them: weights."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made."""
        del types
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=True)
        return out

    def _note(self, tensor: Tensor, counted: bool) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # PyTorch keeps one Python object per storage for as long as the storage lives
        if key in self._storages:
            return
        num_bytes = storage.nbytes() if counted else 0

        def freed(_: Any) -> None:
            del self._storages[key]
            self.live_bytes -= num_bytes

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class FusedAttention(TorchFunctionMode):
    """Context in which attention on the meta device is one operator, as it is on a GPU.

    Otherwise the meta device breaks `scaled_dot_product_attention` into products and a softmax and makes the whole
    matrix of attention weights, which the fused kernels never do. Counted is the memory-efficient kernel: it takes
    masks and additive biases, gives gradients to both, and makes its output and, for the backward pass, one float32
    per head and query.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace attention on meta tensors; everything else runs as it is."""
        del types
        if func is F.scaled_dot_product_attention and args[0].device.type == "meta":
            return _efficient_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _efficient_attention(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    bias = attn_mask
    if bias is not None:
        if bias.dtype == torch.bool:
            bias = torch.zeros_like(bias, dtype=query_BHTD.dtype)
        # A view: the kernel reads a broadcast bias without a copy.
        bias = bias.expand(*query_BHTD.shape[:3], key_BHTD.shape[2])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query_BHTD, key_BHTD, value_BHTD))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query_BHTD, key_BHTD, value_BHTD, bias, needs_grad, dropout_p, is_causal, scale=scale
    )[0]
    return out
