"""The memory of a frozen encoder's tokens of the views of training clips.

Tokens are stored packed, in one of four types:

    float32, bfloat16, float16    the numbers of all tokens, rounded to nearest
    int8                          a scale per token, float32, and then numbers of -127 to 127, which it multiplies

Training takes the tokens that a record gives back, also in the step that computes and stores them: it does not matter
to a run which tokens were stored before it.

Legend: N clips that have the modality, T tokens, D width of the encoder, X bytes of a clip's packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from karmma_dist.memory.memory import DTYPES, Memory, Source

_PRESENT = 1
"""Set of modalities of a record: the encoder's own."""
_INT8_MAX = 127


class TokenMemory(Memory):
    """A memory of tokens."""

    def find(self, source: Source) -> Tensor | None:
        """Return a clip's packed tokens, uint8 (X,), or None.

        Raises:
            UserError: the disk fails.
        """
        packed = self._files.read(source.epoch, source.shard, source.row, _PRESENT)
        return None if packed is None else torch.frombuffer(bytearray(packed), dtype=torch.uint8)

    def store(self, source: Source, packed_X: Tensor) -> None:
        """Store a clip's packed tokens, which must be in host memory.

        Raises:
            DiskError: the disk is full or fails.
            UserError: the folder cannot be written.
        """
        self._files.write(source.epoch, source.shard, source.row, _PRESENT, packed_X.numpy().tobytes())

    def pack(self, tokens_NTD: Tensor) -> Tensor:
        """Return packed tokens, uint8 (N, X), on the same device.

        Raises:
            ValueError: the tokens are not of the header's shape.
        """
        if tokens_NTD.shape[1:] != self.header.shape:
            raise ValueError(f"tokens are {tuple(tokens_NTD.shape[1:])}, expected {self.header.shape}")
        dtype = DTYPES[self.header.dtype]
        if dtype == torch.int8:
            tokens_NTD = tokens_NTD.float()
            largest_NT1 = tokens_NTD.abs().amax(dim=2, keepdim=True)
            scales_NT1 = torch.where(largest_NT1 == 0, 1.0, largest_NT1 / _INT8_MAX)
            rounded_NTD = (tokens_NTD / scales_NT1).round().to(dtype)  # a token with NaN has scale NaN, and stays NaN
            return torch.cat([_as_bytes(scales_NT1), _as_bytes(rounded_NTD)], dim=1)
        if dtype == torch.float16:  # larger numbers would become infinite
            limit = torch.finfo(dtype).max
            tokens_NTD = torch.where(tokens_NTD.isfinite(), tokens_NTD.clamp(-limit, limit), tokens_NTD)
        return _as_bytes(tokens_NTD.to(dtype))

    def unpack(self, packed_NX: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tokens (N, T, D) that packed tokens stand for, on the same device.

        Args:
            packed_NX: Packed tokens, uint8.
            dtype: Type of the result, the model's.
        """
        num, (num_tokens, width) = len(packed_NX), self.header.shape
        stored = DTYPES[self.header.dtype]
        if stored != torch.int8:
            return packed_NX.contiguous().view(stored).reshape(num, num_tokens, width).to(dtype)
        scales, numbers = packed_NX.split([4 * num_tokens, num_tokens * width], dim=1)
        scales_NT1 = scales.contiguous().view(torch.float32).reshape(num, num_tokens, 1)
        numbers_NTD = numbers.contiguous().view(torch.int8).reshape(num, num_tokens, width)
        return (numbers_NTD * scales_NT1).to(dtype)


def _as_bytes(numbers_NTD: Tensor) -> Tensor:
    """Return the bytes of each clip's numbers, uint8 (N, bytes)."""
    return numbers_NTD.contiguous().view(torch.uint8).flatten(1)
