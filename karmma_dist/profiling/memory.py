"""Peak memory of a computation, counted from the tensors that PyTorch's eager operators make.

It works on the meta device, where tensors have sizes but no bytes, and on any other. What an operator allocates and
frees before it returns (a convolution's workspace) is not seen, nor is what a caching allocator keeps in reserve.

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
"""Clips of the batch at which a fusion block's memory reproduces the paper's Tab. V [fit]."""


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


def fusion_peak(block: FusionBlock, tokens_BTD: Tensor, *, fused: bool = True, training: bool = False) -> int:
    """Count peak bytes of the fusion block alone, without weights.

    Counted are the tokens given, which the caller holds all the while, and what the block makes of them: tokens with
    [CLS] before them, normalised tokens, queries, keys and values, attention, feed-forward. With a feed-forward as
    wide as the tokens inference has its peak in attention: 8 tensors of (B, 1 + T, D), the one given being a token
    shorter, if attention is fused; otherwise, once T is some hundreds, 7 of them and two of (B, H, 1 + T, 1 + T), the
    scores and the weights.

    Not counted are the encoders' outputs, the heads, and the two more copies of all tokens that `KarmmaModel.fuse`
    holds meanwhile, each modality's as it was encoded and in the order of the batch.

    For the paper's Tab. V (teacher on V+F+A, inference; 14.28 GB without token reduction and 2.65 GB at tau 300 are
    published) with `FUSION_CLIPS` in fp32 that is 12.96 and 2.28 GB unfused, 1.85 and 0.71 GB fused. The 12.96 GB are
    of the 784 tokens that Video Swin makes per modality; with the table's 785 they are 12.99. The two copies of
    `KarmmaModel.fuse` would make it 13.42 and 2.46 GB unfused, 2.31 and 0.89 GB fused.

    Args:
        block: Fusion block, on any device; it is left in training mode if `training`, else in its own.
        tokens_BTD: Projected tokens of all modalities, of the block's device and dtype.
        fused: True if attention is one operator; False if it makes its matrix of weights, in PyTorch's own form,
            which computes it in fp32 also where tokens are bf16 or fp16.
        training: True to count a forward and a backward pass, gradients included; False for inference.
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
    """Return a context in which attention is one operator, on the meta device too, or PyTorch's plain products."""
    return FusedAttention() if fused else sdpa_kernel(SDPBackend.MATH)


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
