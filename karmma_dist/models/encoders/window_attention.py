"""Attention inside windows of a video's token grid, plain or shifted by half a window (arXiv 2106.13230, Sec. 3.2).

Tokens of a stage are kept in the order of its plain windows, so that plain windows need no copy and shifted windows one
`index_select` in each direction; torchvision pads, rolls, partitions and undoes all three in every block. Shifted
windows are sorted by their mask: at most eight kinds, the first of which needs no mask, instead of one mask per window.

Legend: N clips, P tokens of a clip, R rows of all windows of all clips (padding included), G kinds of window, L tokens
of a window, H heads, D width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from karmma_dist.models.encoders.transformer import INIT_STD

Size = tuple[int, int, int]
"""Size along time, rows and columns."""

_HIDDEN = -100.0
"""Value added to the score of tokens that only the shift made neighbours, as in the authors' code."""


class Arrangement(NamedTuple):
    """The arrangement of the tokens of N clips in windows, and the mask of each kind of window."""

    rows_R: Tensor
    """int64: index of the token, of N * P, in each row of the windows; N * P is padding."""
    tokens: Tensor
    """int64 (N * P,): row of each token."""
    lengths: tuple[int, ...]
    """Rows per clip of each kind of window."""
    hidden_GLL: Tensor
    """0, or -100 if a query (row) must not attend to a key (column)."""
    pairs: Tensor
    """int64 (L * L,): place in the bias table of each pair of tokens."""
    in_place: bool
    """True if the rows are the tokens in their order."""


class WindowOrder(nn.Module):
    """One order of windows over a grid. It has only buffers, and none is saved.

    Args:
        grid: Tokens along each axis.
        window: Size of a full window. It shrinks to the grid, and is not shifted along an axis that it covers.
        shifted: True if windows are shifted by half their size.
    """

    _rows: Tensor
    _tokens: Tensor
    _start: Tensor
    _length: Tensor
    _regions: Tensor
    _pairs: Tensor

    def __init__(self, grid: Size, window: Size, shifted: bool) -> None:
        super().__init__()
        fitted, shift = _fit(grid, window, shifted)
        self.num_tokens = math.prod(grid)
        rows_WL = home_positions(grid, window)[_windows(grid, fitted, shift)]
        rows_WL, kinds, counts, regions_GL = _sort_by_kind(rows_WL, grid, fitted, shift)
        flat = rows_WL.flatten()
        tokens = np.empty(self.num_tokens, dtype=np.int64)
        tokens[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        volume = math.prod(fitted)
        self.lengths = tuple(int(count) * volume for count in counts)
        self._padded = bool((flat < 0).any())
        self._in_place = np.array_equal(flat, np.arange(self.num_tokens))
        kind_of_token = np.repeat(kinds, volume)[tokens]
        starts = np.cumsum([0, *self.lengths[:-1]])
        for name, array in {
            "_rows": flat,
            "_tokens": tokens - starts[kind_of_token],
            "_start": starts[kind_of_token],
            "_length": np.array(self.lengths)[kind_of_token],
            "_regions": regions_GL,
            "_pairs": _pairs(window, volume),
        }.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.int64), persistent=False)

    def forward(self, like_NPD: Tensor) -> Arrangement:
        """Arrange as many clips as `like_NPD` has, with masks of its dtype.

        All windows of one kind are adjacent, those of the first clip first: the whole batch of windows then shares one
        mask, which is never repeated in memory.
        """
        clips = torch.arange(len(like_NPD), device=like_NPD.device)[:, None]
        absent = len(like_NPD) * self.num_tokens
        parts = []
        for kind in self._rows.split(self.lengths):
            rows = kind + clips * self.num_tokens
            parts.append((torch.where(kind < 0, absent, rows) if self._padded else rows).flatten())
        tokens = self._start * len(like_NPD) + clips * self._length + self._tokens
        different = self._regions[:, :, None] != self._regions[:, None, :]
        hidden = torch.zeros_like(different, dtype=like_NPD.dtype).masked_fill_(different, _HIDDEN)
        return Arrangement(torch.cat(parts), tokens.flatten(), self.lengths, hidden, self._pairs, self._in_place)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learnt bias per relative position.

    The parameters have the names and shapes of torchvision's `ShiftedWindowAttention3d`.

    Args:
        width: D, a multiple of `num_heads`.
        num_heads: H.
        window: Size of a full window.
    """

    def __init__(self, width: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        offsets = math.prod(2 * size - 1 for size in window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)

    def forward(self, x_NPD: Tensor, windows: Arrangement) -> Tensor:
        """Return (N, P, D). A token attends to all tokens of its window, padding included (zeros before `qkv`)."""
        x = x_NPD.flatten(0, 1)
        if not windows.in_place:
            x = take_rows(x, windows.rows_R, windows.tokens)
        volume = windows.hidden_GLL.shape[-1]
        table = self.relative_position_bias_table.t().contiguous()  # (H, offsets): a head's bias is contiguous
        bias = table.index_select(1, windows.pairs).view(1, -1, volume, volume)
        qkv = self.qkv(x).unflatten(1, (3, self.num_heads, -1))  # (R, 3, H, D/H)
        lengths = [length * len(x_NPD) for length in windows.lengths]
        parts = []
        for kind, part in enumerate(qkv.split(lengths)):
            query, key, value = part.unflatten(0, (-1, volume)).permute(2, 0, 3, 1, 4).unbind(0)  # (windows, H, L, D/H)
            mixed = attend(query, key, value, bias if kind == 0 else bias + windows.hidden_GLL[kind])
            parts.append(mixed.transpose(1, 2).reshape(-1, x_NPD.shape[-1]))
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
        if not windows.in_place:
            mixed = take_rows(mixed, windows.tokens, windows.rows_R)
        out: Tensor = self.proj(mixed)
        return out.view_as(x_NPD)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Return `softmax(query key^T / sqrt(D/H) + bias) value`, with the fused kernel if one exists.

    Args:
        query: (windows, H, L, D/H), as `key` and `value`.
        key: Keys.
        value: Values.
        bias: (1, H, L, L), of the dtype of `query`.
    """
    if query.is_cpu and bias.requires_grad:
        # PyTorch's fused CPU kernel has no gradient for the bias, and its fallback makes more copies than this code.
        scores = (query * query.shape[-1] ** -0.5).matmul(key.transpose(-2, -1)).add_(bias)
        return scores.softmax(dim=-1).matmul(value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def take_rows(x_RD: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Return `x_RD[rows]`, where no row is taken twice and an index past the end gives zeros.

    Args:
        x_RD: Rows.
        rows: int64, indices of the rows to take.
        inverse: int64, index in the result of every row of `x_RD`, past its end if the row is not taken.
    """
    taken: Tensor = _TakeRows.apply(x_RD, rows, inverse)
    return taken


class _TakeRows(torch.autograd.Function):
    """A selection of rows whose gradient is a selection too. `index_select` adds gradients slowly, row by row."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, inverse)
        if len(inverse) < len(rows):  # some rows are padding
            x_RD = F.pad(x_RD, (0, 0, 0, 1))
        return x_RD.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, inverse = ctx.saved_tensors
        return take_rows(grads[0].contiguous(), inverse, rows), None, None


class Rearrangement(nn.Module):
    """A reordering of the tokens of every clip. It has only buffers, and none is saved.

    Args:
        rows: int64 (R,), indices of the tokens to take, each once; -1 gives a token of zeros.
        num_tokens: P.
    """

    _rows: Tensor
    _tokens: Tensor

    def __init__(self, rows: np.ndarray, num_tokens: int) -> None:
        super().__init__()
        tokens = np.empty(num_tokens, dtype=np.int64)
        tokens[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        self._in_place = np.array_equal(rows, np.arange(num_tokens))
        self.register_buffer("_rows", torch.tensor(rows), persistent=False)
        self.register_buffer("_tokens", torch.tensor(tokens), persistent=False)

    def forward(self, x_NPD: Tensor) -> Tensor:
        """Reorder (N, P, D) to (N, R, D)."""
        if self._in_place:
            return x_NPD
        clips = torch.arange(len(x_NPD), device=x_NPD.device)[:, None]
        rows = self._rows + clips * len(self._tokens)
        if len(self._rows) > len(self._tokens):
            rows = torch.where(self._rows < 0, len(x_NPD) * len(self._tokens), rows)
        tokens = self._tokens + clips * len(self._rows)
        return take_rows(x_NPD.flatten(0, 1), rows.flatten(), tokens.flatten()).unflatten(0, (len(x_NPD), -1))


def home_positions(grid: Size, window: Size) -> np.ndarray:
    """Return int64 (P + 1,): position in the order of plain windows of each token, numbered by time, row and column.

    The last entry is -1, so that -1 for padding stays -1 when positions are looked up.
    """
    fitted, _ = _fit(grid, window, shifted=False)
    tokens = _windows(grid, fitted, (0, 0, 0)).flatten()
    positions = np.full(math.prod(grid) + 1, -1, dtype=np.int64)
    positions[tokens[tokens >= 0]] = np.arange(math.prod(grid))
    return positions


def _fit(grid: Size, window: Size, shifted: bool) -> tuple[Size, Size]:
    """Return window size and shift on this grid."""
    covered = [cells <= size for cells, size in zip(grid, window, strict=True)]
    fitted = [cells if is_covered else size for cells, size, is_covered in zip(grid, window, covered, strict=True)]
    shift = [0 if is_covered or not shifted else size // 2 for size, is_covered in zip(window, covered, strict=True)]
    return (fitted[0], fitted[1], fitted[2]), (shift[0], shift[1], shift[2])


def _windows(grid: Size, window: Size, shift: Size) -> np.ndarray:
    """Return int64 (windows, L): tokens numbered by time, row and column; -1 is padding, at the end of each axis."""
    numbers = np.arange(math.prod(grid), dtype=np.int64).reshape(grid)
    padding = [(0, -cells % size) for cells, size in zip(grid, window, strict=True)]
    numbers = np.pad(numbers, padding, constant_values=-1)
    numbers = np.roll(numbers, [-step for step in shift], axis=(0, 1, 2))
    split = [part for cells, size in zip(numbers.shape, window, strict=True) for part in (cells // size, size)]
    return numbers.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(-1, math.prod(window))


def _sort_by_kind(
    rows_WL: np.ndarray, grid: Size, window: Size, shift: Size
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort windows by their mask; those without a mask come first.

    The last window of a shifted axis holds tokens from both ends of the axis, which must not attend to each other.

    Returns:
        The windows in their new order, the kind of each, windows per kind, and (G, L) the region of each token.
    """
    counts = [-(-cells // size) for cells, size in zip(grid, window, strict=True)]
    last = [(np.arange(count) == count - 1) & (step > 0) for count, step in zip(counts, shift, strict=True)]
    far = [np.arange(size) >= size - step for size, step in zip(window, shift, strict=True)]
    kinds, regions = _flags(last), _flags(far)
    present, kinds, sizes = np.unique(kinds, return_inverse=True, return_counts=True)
    order = np.argsort(kinds, kind="stable")
    return rows_WL[order], kinds[order], sizes, regions[None] & present[:, None]


def _flags(axes: list[np.ndarray]) -> np.ndarray:
    """Combine one bool array per axis to an int64 per grid cell, flattened: bits 4, 2 and 1 for the three axes."""
    time, rows, columns = np.meshgrid(*axes, indexing="ij")
    return (4 * time + 2 * rows + columns).flatten()


def _pairs(window: Size, volume: int) -> np.ndarray:
    """Return int64 (L * L,): row of the bias table for each query and key of a window.

    A window smaller than the full one uses the pairs of the full window's first L tokens, as published models do.
    """
    places = np.stack(np.unravel_index(np.arange(volume), window), axis=-1)  # (L, 3)
    offsets = places[:, None] - places[None, :] + np.array(window) - 1
    spans = [2 * size - 1 for size in window]
    return np.ravel_multi_index(tuple(offsets.transpose(2, 0, 1)), spans).flatten()
