"""Peak memory of a computation, counted from the tensors that PyTorch's eager operators make.

Counting works on every device, including the meta device, where tensors have sizes but no bytes. Memory that an
operator allocates and frees before it returns (a convolution's workspace) and memory that a caching allocator keeps in
reserve are not counted.

Legend: B clips, T tokens, D width, H heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karmma_dist.models.karmma import FusionBlock, KarmmaModel
from karmma_dist.models.losses import cross_entropy

FUSION_CLIPS = 32
"""Batch size at which a fusion block's memory reproduces the paper's Tab. V [fit]."""


def inference_peak(model: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor) -> int:
    """Count the peak bytes of inputs and activations of a forward pass without gradients; the model keeps its mode."""
    device = next(iter(inputs.values())).device
    with torch.no_grad(), FusedAttention(), PeakMemory(device) as memory:
        _count_inputs_only(memory, model, inputs)
        model(inputs, present_BM)
    return memory.peak_bytes


def training_peak(model: KarmmaModel, inputs: dict[str, Tensor], present_BM: Tensor) -> int:
    """Count the peak bytes of inputs, activations and gradients of a forward and a backward pass with labels.

    The model is left in training mode, without gradients.
    """
    device = next(iter(inputs.values())).device
    model.train()
    with FusedAttention(), PeakMemory(device) as memory:
        _count_inputs_only(memory, model, inputs)
        logits = model(inputs, present_BM)
        labels = {head: torch.zeros(len(logit), dtype=torch.int64, device=device) for head, logit in logits.items()}
        cross_entropy(logits, labels).backward()
    model.zero_grad()
    return memory.peak_bytes


def fusion_peak(block: FusionBlock, tokens_BTD: Tensor, *, fused: bool = True, training: bool = False) -> int:
    """Count the peak bytes of the fusion block alone, without weights.

    The count includes the given tokens, which the caller holds throughout, and every tensor that the block makes:
    tokens with [CLS] before them, normalised tokens, queries, keys and values, attention, feed-forward. If the
    feed-forward is as wide as the tokens, the peak of inference is in attention. Fused attention then holds 8 tensors
    of (B, 1 + T, D), one of which, the given tokens, is one token shorter. Unfused attention, from a few hundred tokens
    T on, holds 7 of these tensors and two of (B, H, 1 + T, 1 + T), the scores and the weights.

    The count excludes the encoders' outputs, the heads, and the two further copies of all tokens that
    `KarmmaModel.fuse` holds at the same time: each modality's tokens as encoded, and in the order of the batch.

    For the paper's Tab. V (teacher on V+F+A, inference; published: 14.28 GB without token reduction, 2.65 GB at tau
    300), `FUSION_CLIPS` clips in fp32 give 12.96 and 2.28 GB unfused, 1.85 and 0.71 GB fused. The 12.96 GB are for the
    784 tokens that Video Swin makes per modality; the table's 785 tokens give 12.99 GB. With the two copies of
    `KarmmaModel.fuse` the figures would be 13.42 and 2.46 GB unfused, 2.31 and 0.89 GB fused.

    Args:
        block: Fusion block, on any device; it is left in training mode if `training`, otherwise in its current mode.
        tokens_BTD: Projected tokens of all modalities, on the block's device and in its dtype.
        fused: True to compute attention as one operator; False to compute its matrix of weights as PyTorch's math
            backend does, which uses fp32 even if tokens are bf16 or fp16.
        training: True to count a forward and a backward pass with gradients; False to count inference.
    """
    if training:
        block.train()
    with torch.set_grad_enabled(training), attention(fused=fused), PeakMemory(tokens_BTD.device) as memory:
        memory.ignore(block.parameters())
        memory.hold([tokens_BTD])
        mixed_BTD = block(tokens_BTD.detach().requires_grad_(training))
        if training:
            mixed_BTD.sum().backward()
    block.zero_grad()
    return memory.peak_bytes


def attention(*, fused: bool) -> AbstractContextManager[object]:
    """Return a context in which attention is one operator, also on the meta device, or PyTorch's math backend."""
    return FusedAttention() if fused else sdpa_kernel(SDPBackend.MATH)


def _count_inputs_only(memory: PeakMemory, model: KarmmaModel, inputs: dict[str, Tensor]) -> None:
    memory.ignore([*model.parameters(), *model.buffers()])
    memory.hold(inputs.values())


class PeakMemory(TorchDispatchMode):
    """A context that tracks the bytes of live tensors.

    A storage counts once for all its views, from the operator that makes it until its last reference is gone.

    Args:
        device: Device whose type a tensor must have to be counted.
    """

    live_bytes: int
    """Bytes of the tensors that are alive now."""
    peak_bytes: int
    """Most bytes that were alive at once."""

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
        """Exclude tensors and their views, such as weights, from the count."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count the tensors that it returns."""
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
    """A context in which attention on the meta device is one operator, as on a GPU.

    Without it, the meta device splits `scaled_dot_product_attention` into products and a softmax and makes the whole
    matrix of attention weights, which the fused kernels never do. The memory-efficient kernel is counted: it takes
    masks and additive biases, computes gradients of biases, and allocates its output and, for the backward pass, one
    float32 per head and query.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace attention on meta tensors; run every other function unchanged."""
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
